"""A model whose features share a table, two ordered: trained, resumed, scored and fine-tuned by the scripts."""

import json
import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModel

import dhen.model.modeling_dhen  # noqa: F401 (registers the architecture)
from dhen.data.loading.batches import BatchLoader
from dhen.data.schema import Schema
from dhen.training.saved.trained_model import TrainedModel
from tests.recipes.launch import TINY, assert_same_metrics, losses, run_script, summary

SCHEMA = """label: label
sparse:
  - item
  - {name: items, column: history, separator: "|", table: item, pooling: attention, target: item, max_length: 2}
  - {name: latest, column: history, separator: "|", table: item, pooling: transformer, target: item, max_length: 2}
  - place
  - {name: history, separator: "|", pooling: mean, table: item}
"""


def write_log(folder: Path, items: int = 20) -> Path:
    numbers = random.Random(items)
    lines = ["label,item,place,history"]
    for _ in range(600):
        item = numbers.randrange(items)
        history = "|".join(f"i{numbers.randrange(items)}" for _ in range(numbers.randrange(5)))
        lines.append(f"{int(numbers.random() < item / items)},i{item},p{numbers.randrange(4)},{history}")
    folder.mkdir(exist_ok=True)
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    (folder / "schema.yaml").write_text(SCHEMA)
    return folder


def train(folder: Path, run: str, ds_config: Path, *flags: str, ranks: int = 2) -> Path:
    data = [
        f"--dataset_name={folder}/log.csv",
        f"--dataset_schema={folder}/schema.yaml",
        f"--output_dir={folder}/{run}",
    ]
    done = run_script(
        "train.py",
        f"--ds_config={ds_config}",
        *data,
        *TINY,
        "--embedding_dim=8",
        "--per_device_train_batch_size=32",
        *flags,
        ranks=ranks,
    )
    assert done.status == 0, done.output
    return folder / run


@pytest.fixture(scope="module", params=["sharded", "replicated"])
def trained(request, tmp_path_factory, costs_of_a_slow_machine) -> tuple[Path, Path]:
    """A run, and its ds_config: with whole and cut tables, or with tables in the dense part under ZeRO-3."""
    folder = write_log(tmp_path_factory.mktemp(request.param) / "data")
    replicated = {"replicate_below_rows": 100, "costs": str(costs_of_a_slow_machine)}
    placement = {"tables": {"item": [0, 1]}} if request.param == "sharded" else replicated
    values = json.loads(Path("ds_configs/zero3.json").read_text())
    values["dhen"] = values.get("dhen", {}) | {"placement": placement}
    ds_config = folder / "ds_config.json"
    ds_config.write_text(json.dumps(values))
    return train(folder, "run", ds_config, "--save_steps=4"), ds_config


def test_the_table_is_placed_and_exported_once(trained):
    run, ds_config = trained
    placement = json.loads((run / "placement.json").read_text())
    names = placement["replicated"] or [shard["name"] for shard in placement["shards"]]
    assert set(names) == {"item", "place"}
    assert names.count("item") == (2 if "item" in ds_config.read_text() else 1), "column shards"
    model = TrainedModel.open(run)
    assert model.table("item").shape == (21, 8)
    assert [(of.name, of.table) for of in model.config.features] == [
        ("item", "item"),
        ("items", "item"),
        ("latest", "item"),
        ("place", "place"),
        ("history", "item"),
    ]
    assert [path.name for path in sorted((run / "model/vocabulary").iterdir())] == ["item.parquet", "place.parquet"]


def test_a_resumed_run_is_the_same_to_the_bit(trained):
    run, ds_config = trained
    again = train(run.parent, "again", ds_config, "--save_steps=4", f"--resume_from_checkpoint={run}/checkpoint-4")
    after = {step: loss for step, loss in losses(run).items() if step > 4}
    assert after
    assert after == {step: loss for step, loss in losses(again).items() if step > 4}
    assert torch.equal(TrainedModel.open(again).table("item"), TrainedModel.open(run).table("item"))


def test_zero3_on_two_ranks_has_the_losses_of_one_rank(tmp_path):
    folder = write_log(tmp_path / "data")
    two = losses(train(folder, "two", Path("ds_configs/zero3.json")))
    values = json.loads(Path("ds_configs/zero3.json").read_text()) | {"zero_optimization": {"stage": 0}}
    (tmp_path / "ds_config.json").write_text(json.dumps(values))
    batch = "--per_device_train_batch_size=64"
    run = train(folder, "one", tmp_path / "ds_config.json", batch, ranks=1)
    assert len(two) > 5
    assert {step: float(loss) for step, loss in losses(run).items()} == pytest.approx(
        {step: float(loss) for step, loss in two.items()}, abs=2e-6
    )
    cut = sum(max(line.count("|") - 1, 0) for line in (folder / "log.csv").read_text().splitlines())
    splits = Schema.load(run / "model").splits
    assert sum(split.cut_ids["items"] for split in splits.values()) == cut
    assert splits["train"].cut_ids["items"] > 100


def test_evaluate_and_predict_agree_with_the_run_and_with_transformers(trained, tmp_path):
    run, _ = trained
    metrics, scores = tmp_path / "metrics.json", tmp_path / "scores.parquet"
    done = run_script("evaluate.py", f"--model_name_or_path={run}", f"--output={metrics}", ranks=2)
    assert done.status == 0, done.output
    assert_same_metrics(json.loads(metrics.read_text()), summary(run)["test"], 1e-6)
    flags = [f"--model_name_or_path={run}", f"--dataset_name={run.parent}/log.csv"]
    done = run_script("predict.py", *flags, f"--dataset_schema={run.parent}/schema.yaml", f"--output={scores}", ranks=2)
    assert done.status == 0, done.output
    found = pl.read_parquet(scores)["prediction"].to_numpy()
    model = AutoModel.from_pretrained(run / "model").eval()
    (prepared,) = (
        path
        for path in (run.parent / "prepared").iterdir()
        if len(list((path / "test").glob("*"))) and not (path / "train").exists()
    )
    (batch,) = BatchLoader(prepared, "test", batch_size=600).epoch(0)
    with torch.no_grad():
        expected = model(batch.sparse, batch.dense_BN).logits.sigmoid().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_fine_tuning_keeps_the_rows_of_the_table_by_key(trained, tmp_path):
    run, ds_config = trained
    new = write_log(tmp_path / "new", items=25)
    still = ["--max_steps=1", "--learning_rate=1e-12", "--table_learning_rate=1e-12", "--warmup_steps=0"]
    tuned = train(new, "run", ds_config, f"--model_name_or_path={run}", *still)
    old, after = TrainedModel.open(run), TrainedModel.open(tuned)
    assert len(after.table("item")) == 26
    kept = old.uses("item") > 0
    torch.testing.assert_close(after.table("item")[:21][kept], old.table("item")[kept], rtol=0, atol=1e-9)


def test_a_checkpoint_of_another_sharing_is_refused(trained):
    run, ds_config = trained
    (run.parent / "own.yaml").write_text(SCHEMA.replace("mean, table: item", "mean"))
    flags = [f"--dataset_name={run.parent}/log.csv", f"--dataset_schema={run.parent}/own.yaml", *TINY]
    resumed = [f"--output_dir={run.parent}/other", f"--resume_from_checkpoint={run}/checkpoint-4"]
    batch = "--embedding_dim=8", "--per_device_train_batch_size=32"
    done = run_script("train.py", f"--ds_config={ds_config}", *flags, *batch, *resumed, ranks=2)
    assert done.status == 1
    assert "saved with rows of tables" in done.output
