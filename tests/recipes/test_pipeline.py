"""DhenPipeline scores rows of any kind as predict.py does, and refuses what it cannot read."""

import math
import shutil
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from safetensors.torch import load, save

from dhen.data.formats.roles import COLUMNS_FILE, as_yaml, load_roles, parse_roles
from dhen.exported_index import INDEX_FILE
from dhen.pipeline import DhenPipeline, _as_array
from tests.recipes.launch import ROOT, run_script

SCHEMA = """
label: {column: rating, greater_than: 3}
tasks:
  buy: {column: bought, given_click: true}
null_values: ["", "none"]
dense:
  - {name: price, scale: standard, missing_indicator: true}
sparse:
  - user
  - {name: "cat_*", encoding: vocabulary}
  - {name: tags, separator: "|", pooling: mean}
  - {name: seen, parts: [hour, weekday]}
  - {name: price_bin, column: price, bins: 5}
ignored: [comment]
"""
ROWS = 600


def frame(rows: int = ROWS) -> pl.DataFrame:
    draw = np.random.Generator(np.random.PCG64(0))
    user = draw.integers(0, 9, rows)
    rating = 1 + (user + draw.integers(0, 3, rows)) // 2
    price = pl.Series([None if draw.random() < 0.1 else round(float(value), 2) for value in draw.normal(9, 3, rows)])
    return pl.DataFrame({
        "rating": rating, "bought": draw.integers(0, 2, rows), "user": user, "price": price,
        "cat_1": draw.choice(["a", "b", "none"], rows), "cat_2": draw.choice(["x", "y"], rows),
        "tags": ["|".join(str(tag) for tag in draw.integers(0, 5, draw.integers(0, 4))) for _ in range(rows)],
        "seen": [f"2024-03-{1 + day:02d} {hour:02d}:15" for day, hour in draw.integers(0, 20, (rows, 2))],
        "comment": "-",
    })  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A trained model, its rows as text, and their scores by predict.py, which gets no schema."""
    path = tmp_path_factory.mktemp("pipeline")
    frame().write_csv(path / "rows.csv")
    (path / "schema.yaml").write_text(SCHEMA)
    done = run_script(
        "train.py", f"--dataset_name={path / 'rows.csv'}", f"--dataset_schema={path / 'schema.yaml'}", "--hash_size=50",
        "--ds_config=ds_configs/zero0.json", f"--output_dir={path / 'run'}", "--num_layers=1", "--learning_rate=0.01",
        "--per_device_train_batch_size=50", "--num_train_epochs=4",
    )  # fmt: skip
    assert done.status == 0, done.output
    flags = [f"--model_name_or_path={path / 'run'}", f"--dataset_name={path / 'rows.csv'}"]
    done = run_script("predict.py", *flags, f"--output={path / 'scores.parquet'}")
    assert done.status == 0, done.output
    done = run_script("evaluate.py", *flags)
    assert done.status == 0, done.output
    return path


@pytest.fixture(scope="module")
def pipeline(folder) -> DhenPipeline:
    return DhenPipeline.from_pretrained(folder / "run")


KINDS = {
    "polars": lambda rows: rows,
    "pandas": lambda rows: rows.to_pandas(),
    "categories of pandas": lambda rows: rows.to_pandas().astype({"cat_1": "category", "user": "category"}),
    "Arrow": lambda rows: rows.to_arrow(),
    "dictionaries": lambda rows: rows.to_dicts(),
    "columns": lambda rows: rows.to_dict(as_series=False),
    "a generator": lambda rows: iter(rows.to_dicts()),
    "texts": lambda rows: [{k: None if v is None else str(v) for k, v in row.items()} for row in rows.to_dicts()],
    "mixed types": lambda rows: [row | {"user": str(row["user"]) if n % 2 else row["user"]}
                                 for n, row in enumerate(rows.to_dicts())],
    "record batch": lambda rows: rows.to_arrow().combine_chunks().to_batches()[0],
    "NA and bytes": lambda rows: [{k: pd.NA if v is None else str(v).encode() if k == "user" and n % 2 else v
                                   for k, v in row.items()} for n, row in enumerate(rows.to_dicts())],
    "lists and dates": lambda rows: rows.with_columns(pl.col("seen").str.to_datetime("%Y-%m-%d %H:%M")),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_rows_get_the_scores_of_predict(pipeline, folder, kind):
    expected = pl.read_parquet(folder / "scores.parquet")
    rows = frame().drop("rating", "bought", "comment")
    scores = pipeline.predict_tasks(KINDS[kind](rows), batch_size=77)
    np.testing.assert_allclose(scores["label"], expected["prediction"], atol=1e-6)
    np.testing.assert_allclose(scores["buy"], expected["prediction_buy"], atol=1e-6)
    assert expected["prediction"].std() > 0.05
    np.testing.assert_allclose(pipeline.predict(rows[:5]), scores["label"][:5], atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("greater_than: 3", "greater_than: 4", "greater_than of 'label' was 3.0 in training"),
        ("given_click: true", "given_click: false", "given_click of 'buy' was True in training"),
        ("parts: [hour, weekday]", "parts: [hour, day]", "the feature 'seen_weekday' is sparse"),
        ("bins: 5", "bins: 6", "bins of 'price_bin' was 5 in training"),
    ],
)
def test_another_meaning_of_the_columns_is_refused(folder, tmp_path, old, new, message):
    (tmp_path / "schema.yaml").write_text(SCHEMA.replace(old, new))
    flags = (f"--dataset_name={folder / 'rows.csv'}", f"--dataset_schema={tmp_path / 'schema.yaml'}")
    done = run_script("evaluate.py", f"--model_name_or_path={folder / 'run'}", *flags)
    assert done.status == 1
    assert message in done.output


def test_lists_of_mixed_types_are_lists_of_their_texts():
    found = _as_array("tags", [[1, "2"], None, [b"3", pd.NA]])
    assert found.to_pylist() == [["1", "2"], None, ["3", None]]
    dates = _as_array("seen", [date(2024, 3, 1), datetime(2024, 3, 1, 5, 15), None])
    assert dates.to_pylist() == [datetime(2024, 3, 1), datetime(2024, 3, 1, 5, 15), None]
    assert _as_array("user", [2**63, 1]).to_pylist() in ([2**63, 1], [str(2**63), "1"])
    with pytest.raises(ValueError, match="column 'tags': 'a' stands beside lists"):
        _as_array("tags", [[1], "a"])


def test_no_rows_have_no_scores(pipeline):
    assert pipeline.predict([]).shape == (0,)
    assert pipeline.predict(frame(ROWS)[:0]).shape == (0,)


def test_columns_that_the_model_does_not_need_are_not_looked_at(pipeline):
    rows = frame()[:3].to_dicts()
    more = [row | {"note": object(), 7: 1} for row in rows]
    np.testing.assert_array_equal(pipeline.predict(more), pipeline.predict(rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"usr": 1}], r"the rows have no column 'price'\. They have usr\."),
        (frame().rename({"user": "usr"}), r"no column 'user'.* Did you mean 'usr'\?"),
        (frame().with_columns(price=pl.lit("dear")), r"rows: row 0: column 'price'.*'dear'"),
        (frame().with_columns(price=pl.lit(math.inf)), r"rows: row 0: column 'price'"),
        (frame().with_columns(seen=pl.lit("March")), r"rows: row 0: column 'seen'"),
        (frame().with_columns(user=pl.lit([1])), r"rows: column 'user' has lists"),
        (3, r"the rows have the type int\. Use a pandas"),
        ([{"user": 1}, 2], r"the rows have the type int\. Use a pandas"),
        ([{1: 2}], r"the rows have no column 'price'\. They have 1\."),
        ([{}, {}], r"the rows have no column 'price'\. They have no columns\."),
        ({"user": 1}, r"column 'user' has the type int\. Use a list"),
        ({"user": [1], "price": [1, 2]}, r"different numbers of values: 'user' has 1, 'price' has 2"),
        ([*frame().to_dicts(), {"user": {}}], r"column 'user': \{\} has the type dict"),
        (pa.table([pa.array([1]), pa.array([2])], ["user", "user"]), "two columns of the rows have the same name"),
        ([1, 2], r"the rows have the type int\. Use a pandas"),
    ],
)
def test_rows_that_cannot_be_read_are_refused(pipeline, rows, message):
    with pytest.raises(ValueError, match=message):
        pipeline.predict(rows)


@pytest.mark.parametrize("size", [0, 2.5, "many"])
def test_a_wrong_batch_size_is_refused(pipeline, size):
    with pytest.raises(ValueError, match=f"batch_size is {size!r}. Use a whole number"):
        pipeline.predict(frame()[:3], size)


def test_a_folder_without_a_model_is_refused(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match=rf"no exported model with {COLUMNS_FILE}"):
        DhenPipeline.from_pretrained(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"^runs/none: no such folder here, and nothing came from the .*$"):
        DhenPipeline.from_pretrained("runs/none")


def forget_a_weight(content: bytes) -> bytes:
    weights = load(content)
    del weights["head.0.bias"]
    return save(weights, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("schema.json", None, "schema.json: no such file"),
        ("vocabulary/cat_1.parquet", None, "vocabulary/cat_1.parquet: no such file.* copy the model again"),
        ("config.json", None, "none of the files config.json, model.onnx, model.pt2 is here"),
        ("config.json", lambda content: content[:9], "cannot be loaded .*config.json.*Copy or export the model again"),
        (INDEX_FILE, None, "cannot be loaded .*no file named model.safetensors"),
        (INDEX_FILE, lambda content: content[:99], f"{INDEX_FILE}: cannot be read: .*Copy or export the model again"),
        (INDEX_FILE, lambda content: b"[]", f"{INDEX_FILE}: cannot be read: "),
        (INDEX_FILE, lambda content: content.replace(b"format_version", b"v"), "format_version is None, but this code"),
        ("model-dense.safetensors", forget_a_weight, r"the weights head\.0\.bias are missing"),
        ("model-dense.safetensors", None, "model-dense.safetensors: no such file, but .* names it"),
        ("model-dense.safetensors", lambda content: content[:999], "model-dense.safetensors: damaged: "),
    ],
)
def test_a_model_that_is_not_whole_is_refused(folder, tmp_path, name, change, message):
    """change: of the bytes of a file; None to remove it."""
    file = Path(shutil.copytree(folder / "run/model", tmp_path / "model")) / name
    content = file.read_bytes()
    file.unlink()
    if change is not None:
        file.write_bytes(change(content))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        DhenPipeline.from_pretrained(tmp_path / "model")
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/configs/schemas").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_schema_is_written_as_it_was_read(path):
    roles = load_roles(path)
    assert parse_roles(as_yaml(roles), "again") == roles
    without_blanks = replace(roles, null_values=())
    assert parse_roles(as_yaml(without_blanks), "again") == without_blanks


def test_the_schema_of_all_keys_is_written_as_it_was_read():
    roles = parse_roles(SCHEMA.replace("ignored: [comment]", 'ignored: "*"\nrow_weight: w\ndelimiter: ";"'), "one")
    assert parse_roles(as_yaml(roles), "again") == roles


@pytest.mark.parametrize(
    ("text", "rows", "name"),
    [
        ("1\t" + "\t".join(map(str, range(13))) + "\t" + "\t".join(["68fd1e64"] * 26), None, "criteo"),
        ("1 3:1 7:1 9:1", [{"1": 3, "2": 7, "3": 9}], "libsvm"),
    ],
)
def test_formats_without_names_have_the_names_of_their_features(tmp_path, text, rows, name):
    lines = [text if n % 3 else f"0{text[1:]}" for n in range(90)]
    (tmp_path / "rows.txt").write_text("\n".join(lines) + "\n")
    done = run_script(
        "train.py", f"--dataset_name={tmp_path / 'rows.txt'}", f"--dataset_format={name}", "--hash_size=50",
        "--ds_config=ds_configs/zero0.json", f"--output_dir={tmp_path / 'run'}", "--num_layers=1", "--max_steps=3",
    )  # fmt: skip
    assert done.status == 0, done.output
    flags = [f"--model_name_or_path={tmp_path / 'run'}", f"--dataset_name={tmp_path / 'rows.txt'}"]
    done = run_script("predict.py", *flags, f"--dataset_format={name}", f"--output={tmp_path / 'scores.parquet'}")
    assert done.status == 0, done.output
    rows = rows or [{f"I{n + 1}": n for n in range(13)} | {f"C{n + 1}": "68FD1E64" for n in range(26)}]
    pipeline = DhenPipeline.from_pretrained(tmp_path / "run")
    score = pipeline.predict(pa.Table.from_pylist(rows))
    assert score[0] == pytest.approx(pl.read_parquet(tmp_path / "scores.parquet")["prediction"][0], abs=1e-6)
    if name == "criteo":
        assert np.isfinite(pipeline.predict([rows[0] | {"C2": None, "I3": None}])).all()
        for wrong, message in (
            ({"C2": 12}, "column 'C2' has the type int64"),
            ({"I3": 2.7}, "column 'I3': .* integer"),
        ):
            with pytest.raises(ValueError, match=message):
                pipeline.predict([rows[0] | wrong])
