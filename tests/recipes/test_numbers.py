"""Bins and scales are those of the trained model: in evaluate.py, in predict.py and in fine-tuning."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModel

import dhen.model.modeling_dhen  # noqa: F401 (registers the architecture)
from dhen.data.loading.batches import BatchLoader
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import Schema
from dhen.training.dataset import check_prepared_for
from dhen.training.saved.fine_tuning import start_from
from dhen.training.saved.trained_model import TrainedModel
from tests.recipes.launch import TINY, assert_same_metrics, run_script, summary

COLUMNS = """
label: click
dense: [{name: age, scale: standard, missing_indicator: true}]
sparse: [{name: age_bin, column: age, bins: 8}, {name: age_id, column: age}]
"""
FILES = ("train", "validation", "test")


def write_files(folder: Path, shift: int) -> list[str]:
    """Rows with blanks, the schema of their columns, and the flags that name them."""
    folder.mkdir()
    rng = np.random.default_rng(shift)
    (folder / "columns.yaml").write_text(COLUMNS)
    for split, rows in zip(FILES, (400, 150, 150), strict=True):
        age = rng.integers(20, 60, rows) + shift
        texts = [str(one) if keep else "" for one, keep in zip(age, rng.random(rows) < 0.9, strict=True)]
        pl.DataFrame({"age": texts, "click": (rng.random(rows) < (age - shift) / 60).astype(int)}).write_csv(
            folder / f"{split}.csv"
        )
    return [*(f"--{split}_file={folder / f'{split}.csv'}" for split in FILES),
            f"--dataset_schema={folder / 'columns.yaml'}"]  # fmt: skip


def run(script: str, *flags: str) -> str:
    done = run_script(script, *flags)
    assert done.status == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`old` is trained; `tuned` is fine-tuned from it, on rows that are 30 years older."""
    place = tmp_path_factory.mktemp("numbers")
    common = [*TINY, "--ds_config=ds_configs/zero0.json", "--per_device_train_batch_size=32"]
    run("train.py", *write_files(place / "young", 0), *common, f"--output_dir={place / 'old'}")
    flags = [*write_files(place / "older", 30), *common, f"--model_name_or_path={place / 'old'}"]
    output = run("train.py", *flags, f"--output_dir={place / 'tuned'}")
    assert "    age_bin: 9 of 9 rows kept, 0 dropped (same bins)" in output
    assert "age: scale" not in output
    return place


def test_fine_tuning_keeps_the_bins_and_the_scale(runs):
    old, tuned = (Schema.load(runs / name / "model") for name in ("old", "tuned"))
    assert old.dense == tuned.dense
    assert old.sparse[0] == tuned.sparse[0]
    assert old.sparse[0].edges[0] < 30


@pytest.mark.parametrize(("model", "rows"), [("old", "young"), ("tuned", "older")])
def test_evaluate_reads_raw_rows_as_the_run_did(runs, tmp_path, model, rows):
    output = tmp_path / "metrics.json"
    data = [f"--dataset_name={runs / rows / 'test.csv'}", f"--dataset_schema={runs / rows / 'columns.yaml'}"]
    run("evaluate.py", f"--model_name_or_path={runs / model}", *data, f"--output={output}")
    assert_same_metrics(json.loads(output.read_text()), summary(runs / model)["test"], 1e-6)


def ages_in(file: Path) -> np.ndarray:
    """NaN if blank."""
    ages = pl.read_csv(file, infer_schema=False)["age"].cast(pl.Float64, strict=False)
    return ages.fill_null(float("nan")).to_numpy()


def test_predict_on_other_rows_uses_the_fit_of_training(runs, tmp_path):
    output, columns = tmp_path / "scores.parquet", runs / "older/columns.yaml"
    data = [f"--dataset_name={runs / 'older/test.csv'}", f"--dataset_schema={columns}"]
    run("predict.py", f"--model_name_or_path={runs / 'old'}", *data, f"--output={output}")
    found = pyarrow.parquet.read_table(output)["prediction"].to_numpy()
    # As the documentation says it: the inputs by hand, and the model as transformers loads it.
    (batch,) = BatchLoader(prepared_like(runs, tmp_path / "p"), "test", batch_size=150).epoch(0)
    ages, train = ages_in(runs / "older/test.csv"), ages_in(runs / "young/train.csv")
    train = train[~np.isnan(train)]
    logs = np.log1p(train)
    scaled = np.nan_to_num((np.log1p(ages) - logs.mean()) / logs.std(), nan=0.0)
    np.testing.assert_allclose(batch.dense_BN.numpy(), np.stack([scaled, np.isnan(ages)], axis=1), rtol=1e-5)
    edges = [edge for edge in np.unique(np.quantile(train, np.arange(1, 8) / 8)) if edge < train.max()]
    ids = [0 if np.isnan(age) else 1 + sum(edge < age for edge in edges) for age in ages]
    assert batch.sparse.ids[: len(ids)].tolist() == ids
    model = AutoModel.from_pretrained(runs / "old/model").eval()
    with torch.no_grad():
        expected = model(batch.sparse, batch.dense_BN).logits.sigmoid().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def prepared_like(runs: Path, folder: Path, **more) -> Path:
    settings = PreparationSettings(
        test_file=str(runs / "older/test.csv"),
        dataset_schema=runs / "older/columns.yaml",
        schema_from=runs / "old/model",
    )
    prepare(replace(settings, **more), folder)
    return folder


def test_a_folder_with_other_bins_is_refused_or_starts_anew(runs, tmp_path):
    trained = TrainedModel.open(runs / "old")
    assert check_prepared_for(prepared_like(runs, tmp_path / "same"), trained.folder).dense == trained.schema.dense
    own = {"schema_from": None, "train_file": str(runs / "older/train.csv")}
    other = prepared_like(runs, tmp_path / "other", **own)
    schema = Schema.load(other)
    with pytest.raises(ValueError, match="dense feature 'age' is "):
        check_prepared_for(other, trained.folder)
    replace(schema, dense=trained.schema.dense).save(other)
    with pytest.raises(ValueError, match="the bins of 'age_bin' have other edges than those of the model in"):
        check_prepared_for(other, trained.folder)
    report = start_from(trained, other, schema).report()
    assert "age_bin: 0 of 9 rows kept, 9 dropped (the bins have other edges)" in report
    assert "    age: scale (mean, standard deviation) was (3.6" in report
    text = COLUMNS.replace("bins: 8", "bins: 3").replace("scale: standard", "scale: none")
    (runs / "older/three.yaml").write_text(text)
    three = prepared_like(runs, tmp_path / "three", **own, dataset_schema=runs / "older/three.yaml")
    report = start_from(trained, three, Schema.load(three)).report()
    assert "age_bin: 0 of 4 rows kept, 9 dropped (bins were 8, are now 3)" in report
    assert "is now none" in report
