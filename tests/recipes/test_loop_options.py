"""Options of the training loop: each does what its line of --help says, seen in what a run leaves behind."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import binary_cross_entropy_with_logits

from dhen.data.loading.batches import BatchLoader
from dhen.data.preparation.caching import prepare_cached
from dhen.data.preparation.settings import PreparationSettings
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.training.saved.checkpoint_folder import checkpoints
from dhen.training.saved.trained_model import TrainedModel
from tests import ROOT
from tests.recipes.launch import TINY, prepared_click_log, run_script, summary

SEED = 4


def train(log: Path, run: Path, *flags: str, ranks: int = 1, ds_config: str = "ds_configs/zero0.json") -> str:
    """Train on the click log; returns what was printed."""
    given = [f"--dataset_name={log}", f"--output_dir={run}", f"--ds_config={ds_config}", f"--seed={SEED}", *TINY]
    done = run_script("train.py", *given, *flags, ranks=ranks)
    assert done.status == 0, done.output
    return done.output


def rows(run: Path, split: str, column: str) -> dict[int, float]:
    """Step -> value of metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row["split"] == split}


def steps_of_checkpoints(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("checkpoint-")) for folder in checkpoints(run)]


@pytest.fixture(scope="module")
def stopped_early(click_log, tmp_path_factory) -> Path:
    """Learning far too fast, so that validation soon gets worse: NE every 2 steps, 3 worse ones are enough."""
    run = tmp_path_factory.mktemp("loop") / "stopped"
    train(
        click_log, run, "--per_device_train_batch_size=64", "--num_train_epochs=20", "--learning_rate=0.03",
        "--table_learning_rate=0.3", "--eval_steps=2", "--early_stopping_patience=3", "--save_total_limit=1",
        "--learning_rate_scaling=linear", "--base_batch_size=32", ranks=2,
    )  # fmt: skip
    return run


def best_and_end(by_step: dict[int, float], patience: int) -> tuple[int, int]:
    """The step of the lowest value, and that of the evaluation at which `patience` have not gone below it."""
    best = None
    for step in sorted(by_step):
        if best is None or by_step[step] < by_step[best]:
            best, since = step, 0
        else:
            since += 1
        if since == patience:
            return best, step
    raise AssertionError(f"never stalled: {by_step}")


def test_early_stopping_ends_the_run_after_so_many_worse_evaluations(stopped_early):
    evaluations = rows(stopped_early, "validation", "ne")
    best, end = best_and_end(evaluations, patience=3)
    assert max(evaluations) == end == summary(stopped_early)["steps"] < 100
    assert 0 < best < end


def test_the_best_checkpoint_and_the_newest_are_kept(stopped_early):
    best, end = best_and_end(rows(stopped_early, "validation", "ne"), patience=3)
    assert steps_of_checkpoints(stopped_early) == [best, end]


def test_the_best_weights_are_tested_and_exported(stopped_early, click_log):
    evaluations = rows(stopped_early, "validation", "ne")
    best, end = best_and_end(evaluations, patience=3)
    results = summary(stopped_early)
    assert results["tested_step"] == best
    assert results["eval"]["ne"] == pytest.approx(evaluations[best], rel=1e-12)
    assert evaluations[end] > evaluations[best] + 0.001
    # The export: NE of the validation split by the plain model.
    (batch,) = BatchLoader(click_log, "validation", batch_size=200).epoch(0)
    model = DhenForClickPrediction.from_pretrained(stopped_early / "model").eval()
    with torch.no_grad():
        logits_B = model(batch.sparse, batch.dense_BN).logits.double()
    rate = batch.labels_B.double().mean()
    entropy = binary_cross_entropy_with_logits(torch.logit(rate).expand(200), batch.labels_B.double())
    ne = binary_cross_entropy_with_logits(logits_B, batch.labels_B.double()) / entropy
    assert ne.item() == pytest.approx(evaluations[best], rel=1e-5)


def test_linear_scaling_multiplies_the_learning_rate_by_the_batch(stopped_early):
    # 2 ranks of 64 against base_batch_size 32; the first two steps warm up.
    got = rows(stopped_early, "train", "learning_rate")
    assert [got[step] for step in (1, 2, 3)] == pytest.approx([0.06, 0.12, 0.12])


def test_a_plateau_drops_the_learning_rate(click_log, tmp_path):
    train(
        click_log, tmp_path / "run", "--per_device_train_batch_size=64", "--max_steps=24", "--learning_rate=0.02",
        "--table_learning_rate=0.3", "--lr_scheduler_type=reduce_lr_on_plateau", "--plateau_factor=0.5",
        "--plateau_patience=2", "--eval_steps=2", "--warmup_steps=0", "--learning_rate_scaling=sqrt",
        "--base_batch_size=16",
    )  # fmt: skip
    evaluations = rows(tmp_path / "run", "validation", "ne")
    expected, factor, best, since = {}, 1.0, math.inf, 0
    for step in range(1, 25):
        expected[step] = 0.02 * 2 * factor  # sqrt(64 / 16)
        if step % 2 == 0:
            is_better = evaluations[step] < best
            best, since = min(best, evaluations[step]), 0 if is_better else since + 1
            if since == 2:
                factor, since = factor / 2, 0
    assert factor <= 0.25, f"it should have dropped twice: {evaluations}"
    assert rows(tmp_path / "run", "train", "learning_rate") == pytest.approx(expected)


def drops_of(evaluations: dict[int, float], patience: int) -> dict[int, int]:
    """The step of each drop of a plateau -> that of the best evaluation until then."""
    drops, best, since = {}, min(evaluations), 0
    for step in sorted(evaluations)[1:]:
        is_better = evaluations[step] < evaluations[best]
        best, since = step if is_better else best, 0 if is_better else since + 1
        if since == patience:
            drops[step], since = best, 0
    return drops


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (3, 2)])
def test_a_plateau_goes_back_to_the_best_checkpoint_and_a_resumed_run_after_it_is_exact(
    click_log, tmp_path, stage, ranks
):
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    flags = [
        f"--per_device_train_batch_size={64 // ranks}", "--max_steps=20", "--learning_rate=0.02",
        "--table_learning_rate=0.3", "--lr_scheduler_type=reduce_lr_on_plateau", "--plateau_factor=0.5",
        "--eval_steps=2", "--plateau_restores_best", "--dropout=0.1", "--save_total_limit=100",
    ]  # fmt: skip
    launch = {"ranks": ranks, "ds_config": f"ds_configs/zero{stage}.json"}
    printed = train(click_log, run, *flags, **launch)
    drops = drops_of(rows(run, "validation", "ne"), patience=1)
    (first, best), *_ = drops.items()
    assert len(drops) > 2, drops
    said = re.findall(r"training goes on from the weights of step (\d+)", printed)
    assert [int(step) for step in said] == list(drops.values())
    for pattern in ("tables-*", "*model_states.pt", "*optim_states.pt"):
        paths = sorted((run / f"checkpoint-{best}").glob(pattern))
        for path in paths:
            pair = [read_tensors(run / f"checkpoint-{step}" / path.name) for step in (best, first)]
            assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0]), path
    # A new run folder with the checkpoints up to the first drop.
    shutil.copytree(run, resumed)
    train(click_log, resumed, *flags, f"--resume_from_checkpoint={resumed}/checkpoint-{first}", **launch)
    for split, column in (("train", "loss"), ("train", "learning_rate"), ("validation", "ne")):
        assert rows(resumed, split, column) == rows(run, split, column)
    assert summary(resumed)["test"] == summary(run)["test"]
    if stage:
        return
    # In another folder the best checkpoint is missing.
    same_weights = ["--learning_rate=0", "--table_learning_rate=0"]  # so that no evaluation is better
    elsewhere = [f"--resume_from_checkpoint={run}/checkpoint-{first}", *same_weights]
    printed = train(click_log, tmp_path / "other", *flags, *elsewhere)
    warning = f"the best checkpoint, {tmp_path}/other/checkpoint-{best}: trainer_state.json cannot be read: "
    assert warning in printed
    assert "Training goes on from the last weights instead" in printed
    assert printed.count("Testing the last weights instead") == 1


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file of a checkpoint."""
    if path.suffix == ".safetensors":
        return load_file(path)
    found, left = {}, [("", torch.load(path, weights_only=False))]
    for name, value in left:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{name}/{key}", each) for key, each in items]
    assert found, path
    return found


def test_a_metric_that_validation_does_not_have_neither_stops_the_run_nor_lowers_the_learning_rate(tmp_path):
    log = prepared_with_clicks_only(tmp_path)
    printed = train(
        log, tmp_path / "run", "--per_device_train_batch_size=32", "--max_steps=8", "--eval_steps=1",
        "--early_stopping_patience=2", "--lr_scheduler_type=reduce_lr_on_plateau", "--warmup_steps=0",
        "--metric_for_best_model=auc",
    )  # fmt: skip
    results = summary(tmp_path / "run")
    assert (results["steps"], results["tested_step"]) == (8, 8)
    assert set(rows(tmp_path / "run", "train", "learning_rate").values()) == {1e-3}
    assert results["eval"]["auc"] is None
    said = "the labels of the validation split are all 1, so its auc and ne do not exist. So auc chooses no checkpoint"
    assert printed.count(said) == 1


def prepared_with_clicks_only(folder: Path) -> Path:
    """A prepared log whose validation rows are all clicks."""
    lines = {}
    for split, rate in (("train", 3), ("validation", 1), ("test", 3)):
        lines[split] = [f"{int(index % rate == 0)},{index % 5},k{index % 7}" for index in range(200)]
        (folder / f"{split}.csv").write_text("\n".join(["click,visits,key", *lines[split]]))
    files = {f"{split}_file": str(folder / f"{split}.csv") for split in lines}
    schema = folder / "schema.yaml"
    schema.write_text("label: click\ndense: [visits]\nsparse: [key]\n")
    return prepare_cached(PreparationSettings(**files, dataset_schema=str(schema)), folder / "prepared")


def test_evaluations_and_checkpoints_come_when_asked_for(click_log, tmp_path):
    run = tmp_path / "run"
    flags = ["--per_device_train_batch_size=60", "--dataloader_drop_last", "--eval_steps=3", "--save_steps=4"]
    train(click_log, run, *flags, "--no_load_best_model_at_end", "--save_total_limit=100")
    # 640 rows, 60 a step: 10 steps and 40 rows left out.
    assert summary(run)["steps"] == summary(run)["tested_step"] == 10
    assert summary(run)["samples_seen"] == 600
    assert sorted(rows(run, "validation", "ne")) == [3, 6, 9, 10]
    assert steps_of_checkpoints(run) == [4, 8, 10]
    assert summary(run)["eval"]["ne"] == pytest.approx(rows(run, "validation", "ne")[10], rel=1e-12)


def test_without_drop_last_the_smaller_step_is_taken(click_log, tmp_path):
    run = tmp_path / "run"
    train(click_log, run, "--per_device_train_batch_size=60", "--save_total_limit=2", "--save_steps=3")
    assert (summary(run)["steps"], summary(run)["samples_seen"]) == (11, 640)
    assert sorted(rows(run, "validation", "ne")) == [11]  # eval_steps 0: after every epoch
    assert steps_of_checkpoints(run) == [9, 11]


def test_accumulation_changes_no_loss_of_the_dense_part(click_log, tmp_path):
    """With tables that don't learn: 4 micro steps are 4 smaller updates of them. Relative tolerance 1e-5, 12 steps."""
    flags = ["--table_learning_rate=0", "--max_steps=12", "--learning_rate=0.01"]
    train(click_log, tmp_path / "whole", *flags, "--per_device_train_batch_size=56")
    micro = ["--per_device_train_batch_size=7", "--gradient_accumulation_steps=4"]
    train(click_log, tmp_path / "pieces", *flags, *micro, ranks=2)
    whole, pieces = (rows(tmp_path / name, "train", "loss") for name in ("whole", "pieces"))
    assert list(whole) == list(range(1, 13))  # the 12th is the epoch's last, of 24 rows
    assert pieces == pytest.approx(whole, rel=1e-5)
    # Negative control: the steps aren't all alike.
    assert pieces != pytest.approx({step: whole[max(step - 1, 1)] for step in whole}, rel=1e-2)


def test_self_ensemble_trains_with_dropout_and_without_it_changes_nothing(click_log, tmp_path):
    """Loss of the mean prediction, relative tolerance 1e-5, 10 steps: 1 rank at ZeRO 0, and 2 ranks at ZeRO 3."""
    flags = ["--max_steps=10", "--per_device_eval_batch_size=8"]
    line = "self_ensemble has no effect: dropout is 0 in all layers"
    printed = {
        "plain": train(click_log, tmp_path / "plain", *flags, "--per_device_train_batch_size=64"),
        "twice": train(
            click_log, tmp_path / "twice", *flags, "--per_device_train_batch_size=32", "--self_ensemble", ranks=2,
            ds_config="ds_configs/zero3.json",
        ),
        "dropout": train(
            click_log, tmp_path / "dropout", *flags, "--per_device_train_batch_size=64", "--self_ensemble",
            "--dropout=0.2",
        ),
    }  # fmt: skip
    assert [name for name in printed if line in printed[name]] == ["twice"]
    plain, twice, dropout = (rows(tmp_path / name, "train", "loss") for name in printed)
    assert twice == pytest.approx(plain, rel=1e-5)
    assert dropout != pytest.approx(plain, rel=1e-3)
    needs = [float(re.search(r"need at most ([\d.]+) of", printed[name])[1]) for name in ("plain", "dropout")]
    assert needs[1] > needs[0]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["whole_table_l2", "looked_up_l2"])
def test_regularisation_is_its_formula(click_log, tmp_path, kind, ranks):
    """One SGD step on 32 rows, against plain torch: tolerance 1e-6."""
    learning_rate, l2 = 0.5, 0.3
    path = tmp_path / "sgd.json"
    values = json.loads((ROOT / "ds_configs" / "zero0.json").read_text())
    path.write_text(json.dumps(values | {"dhen": {"table_optimizer": "sgd"}}))
    train(
        click_log, tmp_path / "run", f"--{kind}={l2}", f"--table_learning_rate={learning_rate}", "--max_steps=1",
        f"--per_device_train_batch_size={32 // ranks}", "--warmup_steps=0", ranks=ranks, ds_config=str(path),
    )  # fmt: skip
    trained = TrainedModel.open(tmp_path / "run")
    # Rows without uses are exported as the mean of the others.
    used = {table.name: trained.uses(table.name) > 0 for table in trained.config.tables}
    got = {name: trained.table(name)[is_used] for name, is_used in used.items()}
    differences = {
        other: max((plain[name][used[name]] - got[name]).abs().max().item() for name in got)
        for other in ("whole_table_l2", "looked_up_l2", "none")
        for plain in [one_plain_step(click_log, trained, other, learning_rate, l2)]
    }
    assert differences.pop(kind) < 1e-6
    assert min(differences.values()) > 1e-4  # the other one, and none, are something else


def one_plain_step(log: Path, trained: TrainedModel, kind: str, learning_rate: float, l2: float) -> dict:
    """The tables after one SGD step on the epoch's first 32 rows, by torch alone."""
    batch = next(iter(BatchLoader(log, "train", batch_size=32, shuffle=True, seed=SEED).epoch(0)))
    torch.manual_seed(SEED)
    model = DhenForClickPrediction(trained.config, table_seed=SEED)
    embeddings_BFD = model.tables(batch.sparse)
    logits_B = model(inputs_embeds=embeddings_BFD, dense=batch.dense_BN).logits
    loss = binary_cross_entropy_with_logits(logits_B, batch.labels_B)
    if kind == "looked_up_l2":
        loss = loss + l2 / 2 * embeddings_BFD.square().sum(dim=(1, 2)).mean()
    loss.backward()
    weights = {}
    for name, weight in model.tables.named_parameters():
        stepped = weight.detach() - learning_rate * weight.grad
        if kind == "whole_table_l2":
            stepped = stepped * (1 - learning_rate * l2)
        weights[name.removesuffix(".weight")] = stepped
    return weights


def test_a_last_step_of_fewer_rows_than_pieces_is_learned(tmp_path):
    """641 rows, 64 a step in 4 micro steps: the last step has one row, so three of its micro steps have none."""
    data = prepared_click_log(tmp_path, rows=641)
    run = tmp_path / "run"
    done = run_script(
        "train.py", f"--dataset_name={data}", f"--output_dir={run}", "--per_device_train_batch_size=16",
        "--gradient_accumulation_steps=4", *TINY,
    )  # fmt: skip
    assert done.status == 0, done.output
    assert summary(run)["samples_seen"] == 641
    assert summary(run)["steps"] == 11


def test_a_run_says_what_it_compiles(click_log, tmp_path):
    path = tmp_path / "compiled.json"
    text = (ROOT / "ds_configs/zero2.json").read_text()
    path.write_text(text.replace('"dhen": {', '"dhen": {"compile": "layers",'))
    said = train(click_log, tmp_path / "run", "--max_steps=2", "--interactions=linear", ds_config=str(path))
    assert "compile: 1 layers by torch.compile" in said
    assert re.search(r"compile: layer 0 for \d+ examples, in \d+\.\d s", said), said


def test_calibrate_scales_the_exported_logits_to_the_least_loss_on_the_validation_split(click_log, tmp_path):
    plain, scaled = tmp_path / "plain", tmp_path / "scaled"
    for run, flags in ((plain, ()), (scaled, ("--calibrate",))):
        train(click_log, run, "--per_device_train_batch_size=32", "--dropout=0.3", *flags, ranks=2)
    before, after = summary(plain), summary(scaled)
    assert after["eval"]["ne"] < before["eval"]["ne"]
    for split in ("eval", "test"):
        assert after[split]["auc"] == pytest.approx(before[split]["auc"], abs=1e-6)
        for metric in ("ne", "calibration"):
            assert after[split][f"{metric}_before_scale"] == before[split][metric]
    # The export says what the summary says, and only the last layer is new.
    weights = [DhenForClickPrediction.from_pretrained(run / "model").eval() for run in (plain, scaled)]
    states = [model.state_dict() for model in weights]
    changed = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert changed == ["head.2.weight", "head.2.bias"]
    torch.testing.assert_close(states[1][changed[0]], states[0][changed[0]] * after["logit_scale"])
    (batch,) = BatchLoader(click_log, "test", batch_size=1000).epoch(0)
    with torch.no_grad():
        logits_B = weights[1](batch.sparse, batch.dense_BN).logits.double()
    loss = binary_cross_entropy_with_logits(logits_B, batch.labels_B.double()).item()
    assert loss == pytest.approx(after["test"]["logloss"], rel=1e-5)
    assert loss != pytest.approx(before["test"]["logloss"], rel=1e-4)
    # A finished run is exported again if it is resumed without the flag.
    back = ("--per_device_train_batch_size=32", "--dropout=0.3", "--resume_from_checkpoint=true", "--calibrate=false")
    train(click_log, scaled, *back, ranks=2)
    restored = DhenForClickPrediction.from_pretrained(scaled / "model").state_dict()
    assert all(torch.equal(restored[name], states[0][name]) for name in states[0])
    assert summary(scaled)["test"] == before["test"]
