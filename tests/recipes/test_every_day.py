"""Training further every day: --keep_optimizer goes on as if the run had not ended."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dhen.data.preparation.encoding.vocabulary import load_vocabulary
from dhen.runtime.topology import Topology
from dhen.training.saved import deltas
from dhen.training.saved.checkpoint_folder import read_state
from dhen.training.saved.fine_tuning import start_from
from dhen.training.saved.kept_optimizer import _read_dense
from dhen.training.saved.resharding import converted
from dhen.training.saved.trained_model import TrainedModel
from tests import ROOT
from tests.ranks import run_ranks
from tests.recipes.launch import run_script
from tests.tools.forked_python import Finished, call

ROWS, BATCH = 256, 32
SCHEMA = """label: click
sparse:
  - {name: user, encoding: %s}
  - {name: page, encoding: hash, hash_size: 64}
"""
MODEL = ("--embedding_dim=4", "--num_layers=2", "--num_embeddings_out=4", "--batch_norm=false", "--num_train_epochs=1",
         "--shuffle=none", "--lr_scheduler_type=constant", "--learning_rate=0.01", "--table_learning_rate=0.1",
         "--split_fractions", "1", "0", "0")  # fmt: skip


def write_days(folder: Path, user: str = "hash, hash_size: 30") -> Path:
    """day_1.csv, day_2.csv, and both.csv with the rows of both in order. Every value of day 2 is in day 1."""
    rng, head = np.random.default_rng(0), "click,user,page\n"
    days = [[f"{rng.integers(2)},u{rng.integers(20)},p{rng.integers(40)}\n" for _ in range(ROWS)] for _ in range(2)]
    (folder / "schema.yaml").write_text(SCHEMA % user)
    for name, lines in (("day_1", days[0]), ("day_2", days[1]), ("both", days[0] + days[1])):
        (folder / f"{name}.csv").write_text(head + "".join(lines))
    return folder


def train(
    days: Path,
    day: str,
    run: str,
    *more: str,
    stage: int = 0,
    config: str = "",
    ranks: int = 1,
    dhen: dict | None = None,
) -> str:
    raw = json.loads((ROOT / f"ds_configs/{config or f'zero{stage}'}.json").read_text())
    raw["dhen"] |= dhen or {}
    (days / f"{run}.json").write_text(json.dumps(raw))
    done = run_script(
        "train.py", *MODEL, f"--ds_config={days / run}.json", f"--train_file={days / day}.csv", "--dataset_format=csv",
        f"--dataset_schema={days / 'schema.yaml'}", f"--output_dir={days / run}",
        f"--per_device_train_batch_size={BATCH // ranks}", *more, ranks=ranks,
    )  # fmt: skip
    assert done.status == 0, done.output
    return done.output


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    model = TrainedModel.open(run)
    return model.dense_weights() | {name: model.table(name) for name in ("user", "page")}


def largest_difference(one: Path, other: Path) -> float:
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> Path:
    return write_days(tmp_path_factory.mktemp("days"))


@pytest.fixture(scope="module")
def first(days) -> str:
    """A run over day 1 and, as `once`, one over both days."""
    train(days, "both", "once")
    train(days, "day_1", "first")
    return f"--model_name_or_path={days / 'first'}"


def test_two_days_equal_one_run_over_both(days, first):
    train(days, "day_2", "forgot", first)
    output = train(days, "day_2", "second", first, "--keep_optimizer=true")
    assert f"keep_optimizer: the optimizers go on from {days / 'first'}/checkpoint-8: states of " in output
    assert largest_difference(days / "once", days / "second") < 1e-6
    assert largest_difference(days / "once", days / "forgot") > 1e-3, "the test cannot fail"


GROUPS = {"shard_group": 2, "table_group": 2}
"""Hybrid shards and replicas of the tables, on four ranks."""


@pytest.mark.parametrize(
    ("before", "after", "optimizer"),
    [((2, 2), (3, 4, GROUPS), "adagrad"), ((3, 4, GROUPS), (0, 2), "adam"), ((0, 1), (1, 2), "rowwise_adagrad")],
    ids=["ZeRO 2 to HSDP", "HSDP to ZeRO 0", "ZeRO 0 to 1"],
)
def test_ranks_stage_and_groups_may_be_others(days, before, after, optimizer):
    """(ZeRO stage, ranks, dhen section) on the first day and on the second."""
    table, runs = f"--table_optimizer={optimizer}", [f"{kind}_{optimizer}" for kind in ("both", "1", "2")]
    ways = [dict(zip(("stage", "ranks", "dhen"), way, strict=False)) for way in (before, after)]
    train(days, "both", runs[0], table)
    train(days, "day_1", runs[1], table, **ways[0])
    more = (table, f"--model_name_or_path={days / runs[1]}", "--keep_optimizer=true")
    train(days, "day_2", runs[2], *more, **ways[1])
    assert not list((days / runs[1] / "checkpoint-8").glob("universal*"))
    assert largest_difference(days / runs[0], days / runs[2]) < 1e-5  # sums over ranks are rounded otherwise


def states_of_dense(topology: Topology, run: str) -> dict[str, dict[str, torch.Tensor]]:
    """Of the newest checkpoint, read twice at the same time."""
    trained, checkpoint = TrainedModel.open(run), Path(run, (Path(run) / "latest").read_text().strip())
    with converted(checkpoint, topology) as other:
        states = _read_dense(SimpleNamespace(topology=topology), trained, read_state(checkpoint), checkpoint)
        assert (other / "zero").is_dir()
    return states


def test_states_in_bf16_are_kept(days):
    """Also by the hybrid shards of paper.json, whose optimizer has fp32 nowhere."""
    train(days, "day_1", "1_paper", ranks=2, config="paper")
    more = (f"--model_name_or_path={days / '1_paper'}", "--keep_optimizer=true", "--write_delta=true")
    train(days, "day_2", "2_paper", "--max_steps=1", *more, ranks=2, config="paper")
    (before,), (after,) = (run_ranks(1, states_of_dense, str(days / run)) for run in ("1_paper", "2_paper"))
    assert before.keys() == after.keys()
    for name, states in before.items():
        assert after[name]["step"] == states["step"] + 1 == 9
        squares = [of["exp_avg_sq"].float() for of in (states, after[name])]  # a step keeps 0.999 of them
        assert (squares[1] >= 0.99 * squares[0]).all(), name
        assert squares[0].any()
    done = apply(days / "1_paper", days / "2_paper" / "delta", "--output", days / "applied")
    assert done.status == 0, done.stderr
    assert files_of(days / "applied") == files_of(days / "2_paper" / "model")


def test_states_of_replicated_tables_are_kept(days, costs_of_a_slow_machine):
    placement = {"placement": {"replicate_below_rows": 1000, "costs": str(costs_of_a_slow_machine)}}
    runs, dhen = ("both_replicated", "1_replicated", "2_replicated"), {"dhen": placement}
    assert "replicated in the dense part: " in train(days, "both", runs[0], **dhen)
    train(days, "day_1", runs[1], **dhen)
    more = (f"--model_name_or_path={days / runs[1]}", "--keep_optimizer=true")
    output = train(days, "day_2", runs[2], *more)  # replicates what the states belong to, unasked
    assert "replicated in the dense part: " in output
    assert largest_difference(days / runs[0], days / runs[2]) < 1e-6


def states_of(run: Path, table: str) -> dict[str, torch.Tensor]:
    """The states of the table's rows in the newest checkpoint, by key."""
    folder = run / (run / "latest").read_text().strip()
    (name,) = (
        name for name in load_file(folder / "tables-00000.safetensors") if re.fullmatch(rf"{table}/.*/sum", name)
    )
    states = load_file(folder / "tables-00000.safetensors")[name]
    return dict(zip(load_vocabulary(run / "model", table).keys.to_pylist(), states[1:], strict=True))


def test_states_move_with_their_rows_and_new_rows_have_none(tmp_path):
    days = write_days(tmp_path, "vocabulary")
    rows = [f"{index % 2},u{index % 9 + 15},p{index}\n" for index in range(ROWS)]  # u20 to u23 are new
    (days / "grown.csv").write_text("click,user,page\n" + "".join(rows))
    train(days, "day_1", "first")
    more = (f"--model_name_or_path={days / 'first'}", "--freeze=tables", "--keep_optimizer=true")
    train(days, "grown", "second", *more, "--vocabulary_keys=new")
    before, after = states_of(days / "first", "user"), states_of(days / "second", "user")
    assert after.keys() == {f"u{number}" for number in range(15, 24)}
    for key, state in after.items():
        assert torch.equal(state, before.get(key, torch.zeros(()))), key
        assert bool(state) == (key in before)


def test_states_of_a_weight_move_with_its_features(days, first):
    trained = TrainedModel.open(days / "first")
    schema = trained.schema
    start = start_from(
        trained, trained.folder, replace(schema, sparse=(replace(schema.sparse[1], name="new"), *schema.sparse))
    )
    states = {name: torch.full_like(weight, 2.0) for name, weight in trained.dense_weights().items()}
    moved = start.matched(states)
    name = "model.layers.0.interactions.1.mix.weight"
    assert moved.keys() == start.dense_weights.keys()
    assert [column.name for column in start.schema.sparse] == ["user", "page", "new"]
    assert moved[name][:, :2].eq(2).all()
    assert not moved[name][:, 2:].any()


def test_what_cannot_be_kept_is_one_line(days, first, tmp_path):
    def refused(*flags: str) -> str:
        done = run_script(
            "train.py", *MODEL, f"--train_file={days / 'day_2'}.csv", "--dataset_format=csv", "--keep_optimizer=true",
            f"--dataset_schema={days / 'schema.yaml'}", f"--output_dir={tmp_path / 'run'}", *flags,
        )  # fmt: skip
        assert done.status == 1, done.output
        assert not (tmp_path / "run").exists()
        return done.output

    assert "error: keep_optimizer is True, but there is no trained model to start from" in refused()
    shutil.copytree(days / "first" / "model", tmp_path / "alone")
    assert "keep_optimizer: " in (said := refused(f"--model_name_or_path={tmp_path / 'alone'}"))
    assert "it is not in the folder of a run, with summary.json and checkpoints. Restore it, or leave keep_" in said
    shutil.copytree(days / "first", tmp_path / "gone", ignore=shutil.ignore_patterns("checkpoint-*"))
    gone = (
        f"its optimizer states, {tmp_path / 'gone' / 'checkpoint-8'}, is gone. Restore it, or leave keep_optimizer out"
    )
    assert gone in refused(f"--model_name_or_path={tmp_path / 'gone'}")
    assert "table_optimizer" in refused(first, "--ds_config=ds_configs/zero0.json", "--table_optimizer=adam")
    raw = json.loads((ROOT / "ds_configs/zero0.json").read_text())
    raw["optimizer"] = {"type": "SGD", "params": {"lr": "auto"}}
    (tmp_path / "sgd.json").write_text(json.dumps(raw))
    said = refused(first, f"--ds_config={tmp_path / 'sgd.json'}")
    assert "checkpoint-8 has states of " in said
    assert "Use the same optimizer and offload in the ds_config, or leave keep_optimizer out." in said


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def three_days(tmp_path_factory) -> Path:
    """Runs on three days, each from the one before: two ranks and a cut table first; then users are new, then gone."""
    days = write_days(tmp_path_factory.mktemp("three"), "vocabulary")
    cut = {"dhen": {"placement": {"tables": {"user": [0, 1]}}}, "ranks": 2}
    for number, users in ((2, range(10, 30)), (3, range(40))):
        rows = [f"{index % 2},u{users[index % len(users)]},p{index % 3}\n" for index in range(ROWS)]
        (days / f"day_{number}.csv").write_text("click,user,page\n" + "".join(rows))
    dim = "--embedding_dim=8"
    train(days, "day_1", "monday", dim, **cut)
    more = ("--write_delta=true", "--keep_optimizer=true")
    said = train(days, "day_2", "tuesday", f"--model_name_or_path={days / 'monday'}", *more, **cut)
    assert f"{days / 'tuesday' / 'delta'} has what changed: all dense weights, 20 rows of user, " in said
    more = ("--write_delta=true", "--vocabulary_keys=new")
    train(days, "day_3", "wednesday", f"--model_name_or_path={days / 'tuesday'}", *more)
    return days


def apply(*arguments: object) -> Finished:
    return call("tools/apply_deltas.py", *map(str, arguments))


def test_base_and_deltas_equal_the_full_exports_to_the_bit(three_days, tmp_path):
    deltas = [three_days / run / "delta" for run in ("tuesday", "wednesday")]
    for number, run in ((1, "tuesday"), (2, "wednesday")):
        done = apply(three_days / "monday", *deltas[:number], "--output", tmp_path / run)
        assert done.status == 0, done.stderr
        assert files_of(tmp_path / run) == files_of(three_days / run / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuesday", "wednesday"]


def test_a_delta_has_only_rows_that_changed(three_days):
    tensors = load_file(three_days / "tuesday" / "delta" / "delta.safetensors")
    keys = load_vocabulary(three_days / "tuesday" / "model", "user").keys.to_pylist()
    on_day_2 = {index + 1 for index, key in enumerate(keys) if int(key[1:]) in range(10, 30)}
    assert set(tensors["user/rows"].tolist()) == set(tensors["user/uses/rows"].tolist()) == on_day_2
    assert len(keys) == 30
    assert 0 < len(tensors["page/rows"]) <= 3
    assert {path.name for path in (three_days / "tuesday" / "delta").iterdir()} >= {"vocabulary", "schema.json"}


def test_a_wrong_base_order_or_byte_is_refused(three_days, tmp_path):
    tuesday, wednesday = (three_days / run / "delta" for run in ("tuesday", "wednesday"))
    output = ("--output", tmp_path / "model")
    for wrong in ((three_days / "tuesday", tuesday), (three_days / "monday", wednesday)):
        done = apply(*wrong, *output)
        assert done.status == 1
        assert f"apply_deltas: {wrong[1]} was not made from the model of {wrong[0]}" in done.stderr
        assert "in the order of their runs." in done.stderr
    for name in ("delta.safetensors", "delta.json"):
        shutil.copytree(tuesday, tmp_path / name)
        content = (tmp_path / name / name).read_bytes()
        (tmp_path / name / name).write_bytes(content[: len(content) // 2])
        done = apply(three_days / "monday", tmp_path / name, *output)
        assert f"apply_deltas: {tmp_path / name}" in done.stderr
        assert "is damaged" in done.stderr
        assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta.json", "delta.safetensors"]


def test_of_the_models_between_one_is_on_the_disk(three_days, tmp_path, monkeypatch):
    apply_one, there = deltas._apply, []

    def counted(base: TrainedModel, delta: Path, facts: dict, draft: Path) -> None:
        apply_one(base, delta, facts, draft)
        there.append(sorted(path.name for path in draft.parent.iterdir()))

    monkeypatch.setattr(deltas, "_apply", counted)
    days = [three_days / run / "delta" for run in ("tuesday", "wednesday")]
    same = three_days / "same"
    deltas.write_delta(*[TrainedModel.open(three_days / "wednesday")] * 2, same)
    deltas.apply_deltas(TrainedModel.open(three_days / "monday"), [*days, same, same], tmp_path / "model")
    assert there == [["0"], ["0", "1"], ["1", "2"], ["2", "3"]]
    assert files_of(tmp_path / "model") == files_of(three_days / "wednesday" / "model")


def test_a_delta_is_of_the_model_beside_it(three_days):
    """It is there before the summary that ends the run; a resume replaces it, or writes the one that is missing."""
    run, shared = three_days / "wednesday", (f"--model_name_or_path={three_days / 'tuesday'}", "--vocabulary_keys=new")
    delta = run / "delta" / "delta.json"
    assert delta.stat().st_mtime_ns <= (run / "summary.json").stat().st_mtime_ns
    before = delta.read_text()
    shared += ("--resume_from_checkpoint=true", "--num_train_epochs=2")
    train(three_days, "day_3", "wednesday", *shared)
    assert not delta.exists()
    said = train(three_days, "day_3", "wednesday", *shared, "--write_delta=true")
    assert "has what changed" in said
    assert delta.read_text() != before
    said = train(three_days, "day_3", "wednesday", *shared, "--write_delta=true")
    assert "There is nothing left to train" in said
