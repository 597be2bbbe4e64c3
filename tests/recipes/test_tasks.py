"""Several tasks, from a raw file to the metrics and predictions of each."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from dhen.data.loading.batches import BatchLoader
from dhen.data.loading.sealing import seal
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import Schema, TaskColumn
from dhen.model.configuration_dhen import DhenConfig
from tests.recipes.launch import run_script

TASKS = """
tasks:
  buy: {column: bought, given_click: true}
  stay: {column: seconds, greater_than: 30}
"""
FEATURES = "label: click\nsparse: [user]\ndense: [price]\n"
ROWS = 4000


def table(rows: int, seed: int) -> pa.Table:
    """A purchase needs a click. Every seventh row does not say how long the user stayed."""
    draw = np.random.Generator(np.random.PCG64(seed))
    user, price = draw.integers(0, 8, rows), draw.normal(size=rows)
    click = draw.random(rows) < 1 / (1 + np.exp(-(user - 4) - price))
    bought = click & (draw.random(rows) < 1 / (1 + np.exp(-2 * price)))
    seconds = pa.array(30 + 10 * (price + draw.normal(size=rows)), mask=np.arange(rows) % 7 == 0)
    labels = {"click": click.astype(int), "bought": bought.astype(int), "seconds": seconds}
    return pa.table({"user": user, "price": price} | labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    (path / "schema.yaml").write_text(FEATURES + TASKS)
    (path / "one.yaml").write_text(FEATURES + "ignored: [bought, seconds]\n")
    for seed, split in enumerate(("train", "validation", "test")):
        pyarrow.csv.write_csv(table(ROWS, seed), path / f"{split}.csv")
        pyarrow.parquet.write_table(table(ROWS, seed), path / f"{split}.parquet")
    return path


def settings(folder: Path, suffix: str, **more: object) -> PreparationSettings:
    files = {f"{split}_file": str(folder / f"{split}.{suffix}") for split in ("train", "validation")}
    return PreparationSettings(**files, dataset_schema=str(folder / "schema.yaml"), hash_size=100, **more)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_labels_of_tasks_arrive(folder, tmp_path, suffix):
    schema = prepare(settings(folder, suffix), tmp_path / "out")
    assert schema.tasks == (TaskColumn("buy", given_click=True), TaskColumn("stay"))
    rows = table(ROWS, 0)
    click, bought, seconds = (rows[name].to_numpy(zero_copy_only=False) for name in ("click", "bought", "seconds"))
    expected = np.stack([np.where(click == 1, bought, np.nan), np.where(np.isnan(seconds), np.nan, seconds > 30)], 1)
    (batch,) = BatchLoader(tmp_path / "out", "train", batch_size=ROWS).epoch(0)
    np.testing.assert_array_equal(batch.tasks_BT.numpy(), expected)
    assert schema.splits["train"].tasks == {
        name: (int((~np.isnan(labels)).sum()), int((labels == 1).sum()))
        for name, labels in zip(("buy", "stay"), expected.T, strict=True)
    }
    assert seal(tmp_path / "out").splits == schema.splits
    assert Schema.load(tmp_path / "out").tasks == schema.tasks


def flags_of(folder: Path, output: str, schema: str = "schema.yaml", **more: object) -> list[str]:
    values = {f"{split}_file": folder / f"{split}.csv" for split in ("train", "validation", "test")}
    values |= {
        "dataset_schema": folder / schema, "hash_size": 100, "output_dir": folder / output, "num_layers": 1,
        "per_device_train_batch_size": 250, "num_train_epochs": 2, "num_dense_embeddings": 2, "learning_rate": 0.01,
        "ds_config": "ds_configs/zero2.json", "eval_steps": 20,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in (values | more).items()]


@pytest.fixture(scope="module")
def run(folder) -> dict:
    done = run_script("train.py", *flags_of(folder, "run", calibrate="true", task_weights='{"stay": 0.5}'), ranks=2)
    assert done.status == 0, done.output
    return json.loads((folder / "run" / "summary.json").read_text()) | {"output": done.output}


def test_each_task_is_trained_and_reported(run, folder):
    tasks = run["test"]["tasks"]
    assert set(tasks) == {"buy", "stay"}
    rows = table(ROWS, 2)
    assert tasks["buy"]["examples"] == int(rows["click"].to_numpy().sum())
    assert tasks["stay"]["examples"] == ROWS - rows["seconds"].null_count
    for metrics in (run["test"], *tasks.values()):
        assert metrics["auc"] > 0.7
        assert metrics["ne"] < 0.95
    assert "task buy: " in run["output"]
    with (folder / "run" / "metrics.csv").open() as file:
        splits = {line["split"] for line in csv.DictReader(file)}
    assert splits == {"train", "validation", "validation buy", "validation stay"}
    assert DhenConfig.from_pretrained(folder / "run" / "model").tasks == ["buy", "stay"]
    assert "| test, stay |" in (folder / "run" / "model" / "README.md").read_text()


def test_evaluate_and_predict_have_each_task(run, folder, tmp_path):
    """The weights were exported with the logits scaled as on validation."""
    model = f"--model_name_or_path={folder / 'run'}"
    done = run_script("evaluate.py", model, f"--output={tmp_path / 'metrics.json'}", ranks=2)
    assert done.status == 0, done.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(run["task_logit_scales"]) == {"buy", "stay"}
    for name in ("buy", "stay"):
        assert metrics["tasks"][name]["ne"] == pytest.approx(run["test"]["tasks"][name]["ne"], rel=1e-5)
    data = (f"--dataset_name={folder / 'test.csv'}", f"--dataset_schema={folder / 'schema.yaml'}")
    done = run_script("predict.py", model, *data, f"--output={tmp_path / 'scores.parquet'}", ranks=2)
    assert done.status == 0, done.output
    scores = pyarrow.parquet.read_table(tmp_path / "scores.parquet")
    assert scores.column_names[:7] == [
        "row", "prediction", "label", "prediction_buy", "label_buy", "prediction_stay", "label_stay"
    ]  # fmt: skip
    has_label = scores["label_stay"].is_valid().to_numpy()
    p, y = (scores[f"{kind}_stay"].to_numpy()[has_label].astype(np.float64) for kind in ("prediction", "label"))
    loss = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    assert loss == pytest.approx(metrics["tasks"]["stay"]["logloss"], rel=1e-5)
    pyarrow.csv.write_csv(table(ROWS, 2).select(["user", "price"]), tmp_path / "new.csv")
    data = (f"--dataset_name={tmp_path / 'new.csv'}", f"--dataset_schema={folder / 'schema.yaml'}")
    done = run_script("predict.py", model, *data, f"--output={tmp_path / 'unlabelled.parquet'}")
    assert done.status == 0, done.output
    unlabelled = pyarrow.parquet.read_table(tmp_path / "unlabelled.parquet")
    assert unlabelled["label_buy"].null_count == ROWS
    np.testing.assert_allclose(unlabelled["prediction_buy"], scores["prediction_buy"], rtol=1e-5)


def test_a_model_of_one_label_learns_further_tasks(folder):
    """Fine-tuning keeps the head of the label, and begins those of the tasks."""
    done = run_script("train.py", *flags_of(folder, "one", "one.yaml"))
    assert done.status == 0, done.output
    assert "tasks" not in json.loads((folder / "one" / "summary.json").read_text())["test"]
    done = run_script("train.py", *flags_of(folder, "more", model_name_or_path=folder / "one", learning_rate=1e-9))
    assert done.status == 0, done.output
    assert "    new: tasks.heads.buy.0.weight" in done.output
    one, more = (json.loads((folder / name / "summary.json").read_text())["test"] for name in ("one", "more"))
    assert more["ne"] == pytest.approx(one["ne"], rel=0.05)
    assert set(more["tasks"]) == {"buy", "stay"}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("label: click\nsparse: [user]\ndense: [price, bought]\n", "the feature 'bought' uses the column 'bought'"),
        ("label: click\nsparse: [user]\ndense: [price, x]\n", "there is no column 'x'"),
        (FEATURES.replace("user", "nobody"), "there is no column 'nobody'"),
    ],
)
def test_a_feature_that_is_a_label_is_refused(folder, schema, message):
    (folder / "wrong.yaml").write_text(schema + TASKS)
    done = run_script("train.py", *flags_of(folder, "wrong", "wrong.yaml"))
    assert done.status == 1
    assert message in done.output


@pytest.mark.parametrize(
    ("schema", "more", "message"),
    [
        (FEATURES + TASKS.replace("greater_than: 30", "greater_than: 1e9"), {}, "The task stay has 3,428 labels"),
        (FEATURES + TASKS.replace("given_click", "given_clicks"), {}, "tasks.buy.given_clicks"),
        (FEATURES + TASKS.replace("buy:", "a/b:"), {}, "tasks: 'a/b' is not allowed as a name"),
        (FEATURES + TASKS, {"negative_sampling_rate": 0.5}, "the task stay also has labels in rows without a click"),
        (FEATURES + TASKS, {"task_weights": '{"bye": 1}'}, "unknown task in task_weights 'bye'. Did you mean 'buy'"),
        (FEATURES + 'ignored: "*"\n', {"task_weights": "uncertainty"}, "task_weights has no effect"),
    ],
)
def test_wrong_tasks_are_refused_in_a_line(folder, schema, more, message):
    (folder / "wrong.yaml").write_text(schema)
    done = run_script("train.py", *flags_of(folder, "wrong", "wrong.yaml", **more))
    assert done.status == 1
    assert message in done.output
