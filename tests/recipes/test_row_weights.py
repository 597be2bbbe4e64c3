"""Weights of rows, from a raw file to the metrics: a row of weight k counts as k equal rows. And left-out negatives."""

import csv
import json
import math
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
from dhen.data.schema import Schema
from tests.recipes.launch import ROOT, run_script

SCHEMA = "label: click\nrow_weight: w\nsparse: [user]\ndense: [price]\n"
ROWS = 96


def table(rows: int, seed: int) -> pa.Table:
    draw = np.random.Generator(np.random.PCG64(seed))
    user, price = draw.integers(0, 8, rows), draw.normal(size=rows)
    click = draw.random(rows) < 1 / (1 + np.exp(-(user - 4) / 2 - price))
    return pa.table({"click": click.astype(int), "user": user, "price": price, "w": np.arange(rows) % 4})


def repeated(rows: pa.Table) -> pa.Table:
    """Each row as often as its weight says, with weight 1."""
    copies = rows.take(np.repeat(np.arange(len(rows)), rows["w"].to_numpy()))
    return copies.set_column(3, "w", pa.array(np.ones(len(copies), np.int64)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files of weighted rows and of copies, as CSV and Parquet, and a schema."""
    path = tmp_path_factory.mktemp("weights")
    (path / "schema.yaml").write_text(SCHEMA)
    for seed, split in enumerate(("train", "validation")):
        rows = table(ROWS, seed)
        for name, of in (("weighted", rows), ("copies", repeated(rows))):
            pyarrow.csv.write_csv(of, path / f"{name}_{split}.csv")
            pyarrow.parquet.write_table(of, path / f"{name}_{split}.parquet")
    return path


def settings(folder: Path, name: str, suffix: str = "csv", **more: object) -> PreparationSettings:
    files = {f"{split}_file": str(folder / f"{name}_{split}.{suffix}") for split in ("train", "validation")}
    return PreparationSettings(**files, dataset_schema=str(folder / "schema.yaml"), hash_size=100, **more)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_weights_arrive_over_their_mean(folder, tmp_path, suffix):
    schema = prepare(settings(folder, "weighted", suffix), tmp_path / "out")
    assert schema.has_weights
    assert schema.splits["train"].weight == sum(range(4)) * ROWS / 4
    (batch,) = BatchLoader(tmp_path / "out", "train", batch_size=ROWS).epoch(0)
    np.testing.assert_allclose(batch.weights_B.numpy(), np.arange(ROWS) % 4 / 1.5, rtol=1e-6)
    assert seal(tmp_path / "out").splits == schema.splits
    assert Schema.load(tmp_path / "out").has_weights


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, dict]:
    """summary.json, the logged losses and the log of runs on weighted rows and on copies: a step has all rows."""
    config = json.loads((ROOT / "ds_configs/zero0.json").read_text())
    config["optimizer"] = {"type": "SGD", "params": {"lr": "auto"}}  # Adam would make rounding large
    (folder / "sgd.json").write_text(json.dumps(config))
    found = {}
    for name, rows in (("weighted", ROWS), ("copies", ROWS * 3 // 2)):
        flags = [f"--{key}={value}" for key, value in {
            "train_file": folder / f"{name}_train.csv", "validation_file": folder / f"{name}_validation.csv",
            "dataset_schema": folder / "schema.yaml", "hash_size": 100, "output_dir": folder / name,
            "per_device_train_batch_size": rows, "per_device_eval_batch_size": 50, "max_steps": 6, "logging_steps": 1,
            "num_layers": 1, "num_dense_embeddings": 2, "table_learning_rate": 0.1, "learning_rate": 0.01,
            "ds_config": folder / "sgd.json", "shuffle": "none", "table_optimizer": "sgd",
        }.items()]  # fmt: skip
        done = run_script("train.py", *flags)
        assert done.status == 0, done.output
        lines = list(csv.DictReader((folder / name / "metrics.csv").open()))
        losses = [float(line["loss"]) for line in lines if line["split"] == "train"]
        found[name] = json.loads((folder / name / "summary.json").read_text()) | {"losses": losses}
    return found


def test_a_run_with_weights_is_one_with_copies(runs):
    weighted, copies = runs["weighted"], runs["copies"]
    assert len(weighted["losses"]) == 6
    assert weighted["losses"] == pytest.approx(copies["losses"], rel=1e-6)
    for name in ("auc", "ne", "logloss", "calibration"):
        assert weighted["eval"][name] == pytest.approx(copies["eval"][name], rel=1e-6), name
    assert (weighted["eval"]["examples"], copies["eval"]["examples"]) == (ROWS, ROWS * 3 // 2)


def test_evaluate_weights_too_and_predict_needs_no_weights(runs, folder, tmp_path):
    model = f"--model_name_or_path={folder / 'weighted' / 'model'}"
    data = (f"--dataset_name={folder / 'weighted_validation.csv'}", f"--dataset_schema={folder / 'schema.yaml'}")
    done = run_script("evaluate.py", model, *data, f"--output={tmp_path / 'metrics.json'}", ranks=2)
    assert done.status == 0, done.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["ne"] == pytest.approx(runs["weighted"]["eval"]["ne"], rel=1e-6)
    rows = pyarrow.csv.read_csv(folder / "weighted_validation.csv")
    nothing = rows.slice(0, 1).set_column(3, "w", pa.array([0]))
    pyarrow.csv.write_csv(rows.drop_columns(["w"]), tmp_path / "new.csv")
    pyarrow.csv.write_csv(nothing, tmp_path / "one.csv")
    data = (f"--dataset_name={tmp_path / 'one.csv'}", f"--dataset_schema={folder / 'schema.yaml'}")
    done = run_script("predict.py", model, *data, f"--output={tmp_path / 'score [1].csv'}")
    assert done.status == 0, done.output
    assert len((tmp_path / "score [1].csv").read_text().splitlines()) == 2
    data = (f"--dataset_name={tmp_path / 'new.csv'}", f"--dataset_schema={folder / 'schema.yaml'}")
    done = run_script("predict.py", model, *data, f"--output={tmp_path / 'scores.csv'}")
    assert done.status == 0, done.output
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == ROWS + 1
    done = run_script("evaluate.py", model, *data)
    assert done.status == 1
    assert "some rows of test have no weight, or all have 0, in the column that row_weight names" in done.output


def test_left_out_negatives_do_not_move_the_predictions(folder):
    """Half of the rows without a click are left out: log(2) more in the logits of the rest."""
    rows = table(40_000, 3)
    clicks, others = rows.filter(rows["click"].to_numpy() == 1), rows.filter(rows["click"].to_numpy() == 0)
    kept = pa.concat_tables([clicks, others.take(np.arange(0, len(others), 2))])
    pyarrow.csv.write_csv(kept.set_column(3, "w", pa.array(np.ones(len(kept)))), folder / "sampled_train.csv")
    pyarrow.csv.write_csv(table(4000, 4).set_column(3, "w", pa.array(np.ones(4000))), folder / "sampled_validation.csv")
    cut = (f"--dataset_name={folder / 'sampled_train.csv'}", f"--dataset_schema={folder / 'schema.yaml'}")
    done = run_script("train.py", *cut, "--negative_sampling_rate=0.5", f"--output_dir={folder / 'cut'}")
    assert done.status == 1
    assert "negative_sampling_rate is 0.5, but all splits are cut from the same rows" in done.output
    calibration = {}
    for rate in (1.0, 0.5):
        flags = [f"--{key}={value}" for key, value in {
            "train_file": folder / "sampled_train.csv", "validation_file": folder / "sampled_validation.csv",
            "dataset_schema": folder / "schema.yaml", "output_dir": folder / f"sampled_{rate}", "hash_size": 100,
            "per_device_train_batch_size": 500, "num_train_epochs": 2, "num_layers": 1, "num_dense_embeddings": 2,
            "learning_rate": 0.005, "ds_config": "ds_configs/zero0.json", "negative_sampling_rate": rate,
        }.items()]  # fmt: skip
        done = run_script("train.py", *flags)
        assert done.status == 0, done.output
        calibration[rate] = json.loads((folder / f"sampled_{rate}" / "summary.json").read_text())["eval"]["calibration"]
    assert calibration[0.5] == pytest.approx(1, abs=0.05)
    assert calibration[1.0] > 1.15, "without the rate, predictions are too high"
    assert math.isfinite(calibration[1.0])


@pytest.mark.parametrize(
    ("schema", "rows", "message"),
    [
        (SCHEMA.replace("w\n", "x\n"), "1,1,1,1", "there is no column 'x'"),
        (SCHEMA.replace("w\n", "click\n"), "1,1,1,1", "row_weight is 'click', which is a label"),
        (SCHEMA.replace("w\n", "[w]\n"), "1,1,1,1", "row_weight"),
        (SCHEMA, "1,1,1,0", "the weights of all rows of the split train are 0"),
        (SCHEMA, "1,1,1,-1", "row 2: column 'w': the row's weight is '-1'; it must be a number from 0 on"),
        (SCHEMA, "1,1,1,", "row 2: column 'w': the row's weight is blank"),
        (SCHEMA, "1,1,1,inf", "row 2: column 'w': the row's weight is 'inf'"),
    ],
)
def test_wrong_weights_are_named(tmp_path, schema, rows, message):
    (tmp_path / "schema.yaml").write_text(schema)
    (tmp_path / "rows.csv").write_text(f"click,user,price,w\n{rows}\n")
    wanted = PreparationSettings(
        train_file=str(tmp_path / "rows.csv"), dataset_schema=str(tmp_path / "schema.yaml"), hash_size=10
    )
    with pytest.raises(ValueError, match="(?s).*" + message.replace("[", "\\[")):
        prepare(wanted, tmp_path / "out")


def test_formats_without_weights_refuse_them(tmp_path):
    (tmp_path / "schema.yaml").write_text("row_weight: w\nsparse: [1]\n")
    (tmp_path / "rows.svm").write_text("1 1:1\n")
    wanted = PreparationSettings(
        train_file=str(tmp_path / "rows.svm"), dataset_schema=str(tmp_path / "schema.yaml"), dataset_format="libsvm"
    )
    with pytest.raises(ValueError, match="libsvm files have no weights of rows"):
        prepare(wanted, tmp_path / "out")
