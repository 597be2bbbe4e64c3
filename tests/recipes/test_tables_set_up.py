"""Tables cut by columns, half precision, quantized wires and overlap, through the recipe: train, resume, export."""

import functools
import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModel

import dhen.model.modeling_dhen  # noqa: F401 (registers the model)
from dhen.data.loading.batches import BatchLoader
from dhen.runtime.topology import Topology
from dhen.training.saved.scoring import ScoringArguments, load_for_scoring
from dhen.training.saved.trained_model import TrainedModel
from tests import ROOT
from tests.ranks import run_ranks
from tests.recipes.launch import Finished, losses, run_script, summary

STEPS, BATCH = 40, 24
FLAGS = (
    "--embedding_dim=16", "--num_layers=1", "--num_embeddings_out=4", "--logging_steps=1", "--warmup_steps=2",
    f"--max_steps={STEPS}", "--eval_steps=20", "--save_steps=20", "--table_learning_rate=0.1",
)  # fmt: skip
CUT = {"C1": [0, 1], "C3": [1, 0, 1, 0], "C20": [1, 1]}
"""Ranks of column shards; some of one table on one rank."""


def try_to_train(run: Path, click_log: Path, section: dict, *more: str, ranks: int = 2, stage: int = 0) -> Finished:
    """The same steps on any number of ranks, under this "dhen" section."""
    raw = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text())
    run.mkdir(parents=True, exist_ok=True)
    (run / "set_up.json").write_text(json.dumps(raw | {"dhen": section}))
    own = (f"--ds_config={run / 'set_up.json'}", f"--per_device_train_batch_size={BATCH // ranks}")
    return run_script(
        "train.py", f"--dataset_name={click_log}", f"--output_dir={run}", *FLAGS, *own, *more, ranks=ranks
    )


def train(run: Path, click_log: Path, section: dict, *more: str, ranks: int = 2, stage: int = 0) -> None:
    done = try_to_train(run, click_log, section, *more, ranks=ranks, stage=stage)
    assert done.status == 0, done.output


def config(run: Path) -> dict:
    return json.loads((run / "model" / "config.json").read_text())


def cuts(run: Path) -> dict[str, int]:
    shards = json.loads((run / "placement.json").read_text())["shards"]
    return {name: sum(shard["name"] == name for shard in shards) for name in {shard["name"] for shard in shards}}


def numbers(run: Path, after: int = 0) -> dict[int, float]:
    return {step: float(loss) for step, loss in losses(run).items() if step > after}


@pytest.fixture(scope="module")
def whole(click_log, tmp_path_factory) -> Path:
    """Adagrad tables, none cut, on two ranks."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run, click_log, {"table_optimizer": "adagrad", "placement": {"max_column_shards": 1}})
    assert set(cuts(run).values()) == {1}
    return run


@pytest.fixture(scope="module")
def cut(click_log, tmp_path_factory) -> Path:
    """The same with three tables cut."""
    run = tmp_path_factory.mktemp("cut") / "run"
    train(run, click_log, {"table_optimizer": "adagrad", "placement": {"tables": CUT}})
    assert {name: cuts(run)[name] for name in CUT} == {"C1": 2, "C3": 4, "C20": 2}
    return run


def test_cut_tables_train_as_whole_ones_do(whole, cut):
    assert numbers(cut) == pytest.approx(numbers(whole), rel=1e-6)


def test_cut_tables_are_exported_whole(whole, cut):
    ours, theirs = (AutoModel.from_pretrained(run / "model").state_dict() for run in (cut, whole))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-6)
    scored = run_script("evaluate.py", f"--model_name_or_path={cut}", f"--output={cut / 'again.json'}", ranks=3)
    assert scored.status == 0, scored.output
    again = json.loads((cut / "again.json").read_text())
    assert again["ne"] == pytest.approx(summary(cut)["test"]["ne"], rel=1e-6)


WHOLE = {"max_column_shards": 1}
OVER_THREE = {"tables": {"C1": [0, 1], "C3": [2, 1, 0, 0]}}
OVER_FOUR = {"tables": {"C1": [3, 2, 1, 0]}}
ON_ONE = {"tables": {"C1": [0, 0], "C20": [0, 0, 0, 0]}}


@pytest.fixture(scope="module")
def resumed(click_log, tmp_path_factory, request):
    """A run that goes on from step 20 of the fixture `before`, on other ranks and elsewhere placed; one for each."""

    @functools.cache
    def go_on(before: str, ranks: int, placement: str) -> Path:
        source, run = request.getfixturevalue(before), tmp_path_factory.mktemp("resumed") / "run"
        resume = f"--resume_from_checkpoint={source / 'checkpoint-20'}"
        section = {"table_optimizer": "adagrad", "placement": json.loads(placement)}
        train(run, click_log, section, resume, "--save_steps=10", ranks=ranks)
        return run

    return go_on


@pytest.mark.parametrize(
    ("before", "ranks", "placement"),
    [("cut", 4, WHOLE), ("cut", 1, ON_ONE), ("whole", 3, OVER_THREE), ("whole", 4, OVER_FOUR)],
    ids=["cut on 2 to whole on 4", "cut on 2 to cut on 1", "whole on 2 to cut on 3", "whole on 2 to cut on 4"],
)
def test_a_checkpoint_goes_on_under_any_placement(resumed, request, before, ranks, placement):
    run = resumed(before, ranks, json.dumps(placement))
    assert numbers(run) == pytest.approx(numbers(request.getfixturevalue(before), after=20), rel=2e-5)


@pytest.mark.parametrize(
    ("before", "ranks", "placement", "then", "anew"),
    [("whole", 4, OVER_FOUR, 2, {"tables": CUT}), ("cut", 1, ON_ONE, 3, OVER_THREE)],
    ids=["cut on 4 to cut on 2", "cut on 1 to cut on 3"],
)
def test_a_sliced_checkpoint_goes_on_on_fewer_and_on_more_ranks(
    tmp_path, click_log, resumed, request, before, ranks, placement, then, anew
):
    """From step 30 of a run that was itself resumed on those ranks."""
    source = resumed(before, ranks, json.dumps(placement))
    assert max(cuts(source).values()) == 4
    resume = f"--resume_from_checkpoint={source / 'checkpoint-30'}"
    train(tmp_path, click_log, {"table_optimizer": "adagrad", "placement": anew}, resume, ranks=then)
    assert cuts(tmp_path) != cuts(source)
    assert numbers(tmp_path) == pytest.approx(numbers(request.getfixturevalue(before), after=30), rel=2e-5)


def test_row_wise_adagrad_keeps_its_checkpoints_cuts(tmp_path, click_log):
    source, resumed = tmp_path / "source", tmp_path / "resumed"
    train(source, click_log, {"placement": {"tables": CUT}})
    train(resumed, click_log, {}, f"--resume_from_checkpoint={source / 'checkpoint-20'}", ranks=4)
    assert {name: cuts(resumed)[name] for name in CUT} == {"C1": 2, "C3": 4, "C20": 2}
    assert numbers(resumed) == pytest.approx(numbers(source, after=20), rel=2e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_overlap_changes_no_number(tmp_path, click_log, stage):
    """Not the last bit of a loss or a metric: the same is computed, only when it travels differs."""
    for overlap in (True, False):
        train(tmp_path / str(overlap), click_log, {"overlap_tables": overlap}, stage=stage)
    assert losses(tmp_path / "True") == losses(tmp_path / "False")
    assert summary(tmp_path / "True")["test"] == summary(tmp_path / "False")["test"]


@pytest.mark.parametrize(
    ("section", "tolerance"),
    [
        ({"all_to_all_dtype": "bf16"}, 0.02),
        ({"all_to_all_dtype": {"forward": "fp16", "backward": "int8"}}, 0.02),
        ({"table_dtype": "fp16"}, 0.02),
        ({"table_dtype": "fp16", "table_rounding": "nearest"}, 0.05),
    ],
    ids=str,
)
def test_half_precision_trains_evaluates_and_resumes(tmp_path, click_log, whole, section, tolerance):
    """Close to fp32, yet not it; and to the bit the same when it is broken off and resumed."""
    section = {"table_optimizer": "adagrad", "placement": {"max_column_shards": 1}} | section
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    train(run, click_log, section)
    assert numbers(run) != numbers(whole)
    assert summary(run)["test"]["ne"] == pytest.approx(summary(whole)["test"]["ne"], rel=tolerance)
    train(resumed, click_log, section, f"--resume_from_checkpoint={run / 'checkpoint-20'}")
    assert {step: loss for step, loss in losses(run).items() if step > 20} == losses(resumed)


def test_tables_of_another_dtype_are_not_resumed(tmp_path, click_log, whole):
    resume = f"--resume_from_checkpoint={whole / 'checkpoint-20'}"
    done = try_to_train(tmp_path, click_log, {"table_optimizer": "adagrad", "table_dtype": "fp16"}, resume)
    assert done.status != 0
    assert "saved with table_dtype 'fp32', but this run has 'fp16'" in done.output


@pytest.fixture(scope="module")
def replicated(click_log, costs_of_a_slow_machine, tmp_path_factory) -> Path:
    """Tables of fewer than 60 rows in the dense part, under ZeRO 3, on two ranks."""
    run = tmp_path_factory.mktemp("replicated") / "run"
    section = {"placement": {"replicate_below_rows": 60, "costs": str(costs_of_a_slow_machine)}}
    train(run, click_log, section, stage=3)
    return run


def test_small_tables_are_replicated(replicated):
    placement = json.loads((replicated / "placement.json").read_text())
    rows = {table["name"]: table["num_embeddings"] for table in config(replicated)["sparse_features"]}
    assert set(placement["replicated"]) == {name for name in rows if rows[name] < 60}
    assert {shard["name"] for shard in placement["shards"]} == {name for name in rows if rows[name] >= 60}
    assert len(placement["replicated"]) not in (0, len(rows))


@pytest.mark.parametrize("ranks", [1, 4])
def test_replicated_tables_are_resumed_as_such_exported_and_scored(tmp_path, click_log, replicated, ranks):
    resume = f"--resume_from_checkpoint={replicated / 'checkpoint-20'}"
    train(tmp_path / "run", click_log, {}, resume, stage=3, ranks=ranks)
    assert numbers(tmp_path / "run") == pytest.approx(numbers(replicated, after=20), rel=2e-5)
    scored = run_script("evaluate.py", f"--model_name_or_path={replicated}", f"--output={tmp_path / 'again.json'}")
    assert scored.status == 0, scored.output
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["ne"] == pytest.approx(summary(replicated)["test"]["ne"], rel=1e-6)


def test_replicated_tables_start_from_a_trained_model(tmp_path, click_log, replicated, costs_of_a_slow_machine):
    section = {"placement": {"replicate_below_rows": 60, "costs": str(costs_of_a_slow_machine)}}
    more = (f"--model_name_or_path={replicated}", "--max_steps=1", "--learning_rate=1e-12", "--warmup_steps=0")
    train(tmp_path / "run", click_log, section, *more, stage=3)
    before, after = (AutoModel.from_pretrained(run / "model").state_dict() for run in (replicated, tmp_path / "run"))
    for name in json.loads((tmp_path / "run" / "placement.json").read_text())["replicated"]:
        is_used = TrainedModel.open(replicated).uses(name) > 0
        weights = [state[f"tables.{name}.weight"][is_used] for state in (after, before)]
        torch.testing.assert_close(*weights, rtol=0, atol=1e-9)


def dtypes_in_scoring(topology: Topology, run: Path) -> set[torch.dtype]:
    model, _ = load_for_scoring(ScoringArguments(model_name_or_path=str(run)), topology)
    return {tensors["weight"].dtype for _, tensors in model.tables.shard_tensors()}


def test_fp16_tables_are_exported_and_scored_as_fp16(tmp_path, click_log, costs_of_a_slow_machine):
    """With replicated tables, which are fp32, and tables cut by columns."""
    placement = {"replicate_below_rows": 60, "costs": str(costs_of_a_slow_machine), "tables": {"C3": [0, 1]}}
    train(tmp_path, click_log, {"table_dtype": "fp16", "placement": placement})
    replicated = json.loads((tmp_path / "placement.json").read_text())["replicated"]
    trained = TrainedModel.open(tmp_path)
    dtypes = {table.name: trained.table(table.name).dtype for table in trained.config.tables}
    assert dtypes == {name: torch.float32 if name in replicated else torch.float16 for name in dtypes}
    assert set(dtypes.values()) == {torch.float32, torch.float16}

    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    assert {name: model.get_parameter(f"tables.{name}.weight").dtype for name in dtypes} == dtypes
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModel.from_pretrained(tmp_path / "saved")
    for name, weight in model.named_parameters():
        assert torch.equal(saved.get_parameter(name).to(weight.dtype), weight)
        assert saved.get_parameter(name).dtype == weight.dtype or "tables." in name
    (batch,) = BatchLoader(click_log, "test", batch_size=300).epoch(0)
    with torch.no_grad():
        expected = model(batch.sparse, batch.dense_BN).logits.sigmoid()
    output = [f"--output={tmp_path / 'again.json'}", f"--output={tmp_path / 'scores.parquet'}"]
    for script, to, ranks in zip(("evaluate.py", "predict.py"), output, (3, 2), strict=True):
        done = run_script(script, f"--model_name_or_path={tmp_path}", to, ranks=ranks)
        assert done.status == 0, done.output
    again, tested = json.loads((tmp_path / "again.json").read_text()), summary(tmp_path)["test"]
    assert again.pop("unseen") == tested.pop("unseen")
    assert again == pytest.approx(tested, rel=1e-6)
    assert run_ranks(1, dtypes_in_scoring, tmp_path) == [{torch.float16}]
    predicted = pyarrow.parquet.read_table(tmp_path / "scores.parquet")["prediction"].to_numpy()
    torch.testing.assert_close(torch.from_numpy(predicted.copy()), expected, rtol=1e-6, atol=0)


def test_what_is_for_sharded_tables_alone_is_refused(tmp_path, click_log, costs_of_a_slow_machine):
    section = {"placement": {"replicate_below_rows": 60, "costs": str(costs_of_a_slow_machine)}}
    done = try_to_train(tmp_path, click_log, section, "--whole_table_l2=0.1")
    assert done.status != 0
    assert "whole_table_l2 is 0.1, which works on sharded tables only" in done.output
    assert "or set dhen.placement.replicate_below_rows to 0." in done.output
