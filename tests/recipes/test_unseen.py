"""Values that training never saw: counted by feature, said, and looked up as the mean of their table's rows."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dhen.data.schema import Schema
from dhen.tables import row_uses
from dhen.training.saved import trained_model
from dhen.training.saved.trained_model import TrainedModel
from tests import ROOT
from tests.recipes.launch import TINY, assert_same_metrics, run_script, summary

SCHEMA = """
label: label
dense: [age]
sparse:
  - {name: user, encoding: hash, hash_size: 60}
  - item
  - day
  - {name: tags, separator: "|"}
"""
DAYS = {"train": "mon", "validation": "tue", "test": "wed"}
WARNING = "training never saw more than half of the values of day (100.0%)"


def write_log(folder: Path) -> list[str]:
    """Files by split; every row has the split's own day, and a tenth of the rows blanks for item. Returns the flags."""
    rng = np.random.default_rng(4)
    bias, flags = rng.normal(size=50), []
    for split, day in DAYS.items():
        lines = ["label,age,user,item,day,tags"]
        for _ in range({"train": 2000}.get(split, 500)):
            user, item = rng.integers(50), rng.integers(20)
            label = int(rng.random() < 1 / (1 + np.exp(-2 * bias[user])))
            tags = "|".join(f"t{tag}" for tag in rng.integers(0, 5 if split == "train" else 9, rng.integers(1, 4)))
            lines.append(f"{label},{user % 7},u{user},{'' if rng.random() < 0.1 else f'i{item}'},{day},{tags}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
        flags.append(f"--{split}_file={folder / f'{split}.csv'}")
    (folder / "schema.yaml").write_text(SCHEMA)
    return [*flags, f"--dataset_schema={folder / 'schema.yaml'}"]


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> list[str]:
    return write_log(tmp_path_factory.mktemp("log"))


def train(log: list[str], run: Path, *flags: str, ranks: int = 2, patch: Callable | None = None) -> str:
    set_up = [
        *log, *TINY, f"--output_dir={run}", "--per_device_train_batch_size=32", "--num_train_epochs=2",
        "--learning_rate=0.01", "--table_learning_rate=0.1", "--embedding_init_std=0.7",
    ]  # fmt: skip
    done = run_script("train.py", *set_up, *flags, ranks=ranks, patch=patch)
    assert done.status == 0, done.output
    return done.output


def shares(run: Path) -> dict[tuple[str, str], tuple[int, int]]:
    with (run / "unseen.csv").open() as file:
        return {
            (row["split"], row["feature"]): (int(row["values"]), int(row["unseen"])) for row in csv.DictReader(file)
        }


def assert_exported_means(run: Path) -> None:
    """In the export, the rows that training did not use are the mean of the others, weighted by their uses."""
    trained = TrainedModel.open(run)
    unused = {}
    for table in trained.config.tables:
        weight, uses = trained.table(table.name), trained.uses(table.name)
        unused[table.name] = int((uses == 0).sum())
        mean = (weight.double() * uses[:, None]).sum(0) / uses.sum()
        expected = mean.float().expand(unused[table.name], -1)
        torch.testing.assert_close(weight[uses == 0], expected, rtol=1e-5, atol=1e-6)
    assert unused["day"] > 0
    assert unused["user"] > 0


@pytest.mark.parametrize("encoding", ["vocabulary", "hash"])
def test_unseen_values_are_counted_said_and_the_mean_in_training_and_export(log, tmp_path, encoding):
    run = tmp_path / "run"
    output = train(log, run, f"--id_encoding={encoding}", *(["--hash_size=300"] if encoding == "hash" else []))
    found = shares(run)
    for split in ("validation", "test"):
        assert found[split, "day"] == (500, 500)
        assert found[split, "user"] == (500, 0)
        assert found[split, "item"] == (500, 0), "a blank was seen in training"
        values, unseen = found[split, "tags"]
        assert 0.3 * values < unseen < 0.6 * values
        assert f"{split}: {WARNING}" in output
        tested = summary(run)[{"validation": "eval"}.get(split, split)]["unseen"]
        assert tested == pytest.approx({name: found[split, name][1] / found[split, name][0] for name in tested})
    assert ("(at least: hashed values may share a row)" in output) == (encoding == "hash" or "user" in output)
    assert_exported_means(run)
    scored = [f"--model_name_or_path={run}", f"--output={tmp_path / 'metrics.json'}"]
    done = run_script("evaluate.py", *scored)
    assert f"test: {WARNING}" in done.output
    assert_same_metrics(json.loads((tmp_path / "metrics.json").read_text()), summary(run)["test"], 1e-6)
    done = run_script("predict.py", f"--model_name_or_path={run}", f"--output={tmp_path / 'scores.csv'}")
    assert f"test: {WARNING}" in done.output
    with (tmp_path / "scores.unseen.csv").open() as file:
        assert [(row["feature"], row["unseen"]) for row in csv.DictReader(file)] == [
            (name, str(found["test", name][1])) for name in ("user", "item", "day", "tags")
        ]


def forget_the_means() -> None:
    """As before: a row that was never used is looked up and exported as it is."""
    row_uses.RowUses.is_unused = lambda self, ids, ids_per_table_S: torch.zeros_like(ids, dtype=torch.bool)
    trained_model.fill_unused = lambda rows, uses, mean: rows


def scores(run: Path, day: str, folder: Path) -> np.ndarray:
    """Predictions for the test rows, with another day in all of them."""
    rows = folder / f"{day}.csv"
    rows.write_text((folder / "test.csv").read_text().replace(f",{DAYS['test']},", f",{day},"))
    output = run / f"{day}.csv"
    flags = [f"--dataset_name={rows}", f"--dataset_schema={folder / 'schema.yaml'}", f"--output={output}"]
    done = run_script("predict.py", f"--model_name_or_path={run}", *flags)
    assert done.status == 0, done.output
    with output.open() as file:
        return np.array([float(row["prediction"]) for row in csv.DictReader(file)])


def test_an_unseen_day_counts_as_the_only_day_that_training_knew(log, tmp_path):
    """Where training used one row, that row is the mean."""
    folder = Path(log[0].partition("=")[2]).parent
    flags = ["--id_encoding=vocabulary", "--load_best_model_at_end=false", "--embedding_init_std=2"]
    differences = {}
    for name, patch in (("means", None), ("random", forget_the_means)):
        run = tmp_path / name
        train(log, run, *flags, ranks=1, patch=patch)
        differences[name] = np.abs(scores(run, "mon", folder) - scores(run, "wed", folder)).max()
    assert differences["means"] < 1e-6
    assert differences["random"] > 0.01
    losses = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in differences]
    loss = [[line.split(",")[4] for line in of_run if ",train," in line] for of_run in losses]
    assert loss[0] == loss[1], "training is the same"


def test_a_resumed_run_goes_on_counting(log, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = ["--id_encoding=vocabulary", "--load_best_model_at_end=false"]
    train(log, whole, *flags, "--save_steps=20", "--save_total_limit=9")
    train(log, resumed, *flags, f"--resume_from_checkpoint={whole / 'checkpoint-20'}")
    one, other = TrainedModel.open(whole), TrainedModel.open(resumed)
    for table in one.config.tables:
        assert torch.equal(one.uses(table.name), other.uses(table.name))
        assert torch.equal(one.table(table.name), other.table(table.name))
    assert one.uses("day").tolist() == [0, 4000]
    assert shares(whole) == shares(resumed)


def test_replicated_tables_count_and_fill_as_sharded_ones_do(log, tmp_path, costs_of_a_slow_machine):
    base = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    section = {**base.get("dhen", {}), "placement": {"replicate_below_rows": 40, "costs": str(costs_of_a_slow_machine)}}
    (tmp_path / "ds.json").write_text(json.dumps({**base, "dhen": section}))
    run = tmp_path / "run"
    train(log, run, "--id_encoding=vocabulary", f"--ds_config={tmp_path / 'ds.json'}", "--save_steps=40")
    replicated = json.loads((run / "placement.json").read_text())["replicated"]
    assert {"day"} <= set(replicated) < {column.name for column in Schema.load(run / "model").sparse}
    assert shares(run)["test", "day"] == (500, 500)
    assert TrainedModel.open(run).uses("day").sum() == 4000
    assert_exported_means(run)
    done = run_script("evaluate.py", f"--model_name_or_path={run}", f"--output={tmp_path / 'metrics.json'}")
    assert done.status == 0, done.output
    assert_same_metrics(json.loads((tmp_path / "metrics.json").read_text()), summary(run)["test"], 1e-5)
    resumed = tmp_path / "resumed"
    more = [f"--ds_config={tmp_path / 'ds.json'}", f"--resume_from_checkpoint={run / 'checkpoint-40'}"]
    train(log, resumed, "--id_encoding=vocabulary", *more)
    assert torch.equal(TrainedModel.open(run).uses("day"), TrainedModel.open(resumed).uses("day"))
