"""Parquet files and hub data sets. The tests of the hub's code path read a local folder."""

import polars as pl
import pyarrow as pa
import pyarrow.parquet
import pytest

from dhen.data.formats import parquet
from dhen.data.formats.hub import hub_splits
from dhen.data.formats.parquet import ParquetReader
from dhen.data.formats.raw_rows import DataError
from dhen.data.formats.roles import load_roles
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings
from tests.data.preparation.reference_preparation import hashed_id, log1p

SCHEMA = """
label: y
dense: [price]
sparse: [user, item, {name: seen, weights: shares}, {name: words, multi_valued: true}]
ignored: "*"
"""
TABLE = pa.table(
    {
        "y": pa.array([0, 1, 1], pa.int8()),
        "price": pa.array([1.5, None, -2.0], pa.float32()),
        "user": pa.array([5, None, -7], pa.int64()),
        "item": pa.array([3.0, None, 4.0], pa.float64()),
        "seen": pa.array([[1, 2], None, []], pa.list_(pa.int32())),
        "shares": pa.array([[0.5, 1.0], [], None], pa.list_(pa.float64())),
        "words": pa.array([["a", None, "b"], [], ["c"]], pa.large_list(pa.large_string())),
        "note": pa.array(["n"] * 3),
    }
)
EXPECTED = [
    (0.0, "1.5", "5", "3", ["1", "2"], [0.5, 1.0], ["a", "b"]),
    (1.0, "", "", "", [], [], []),
    (1.0, "-2", "-7", "4", [], [], ["c"]),
]


def expected_rows():
    return [
        {
            "label": label,
            "price": pytest.approx(log1p(price)),
            "user": hashed_id(user, "user", 50),
            "item": hashed_id(item, "item", 50),
            "seen": [hashed_id(key, "seen", 50) for key in seen],
            "seen:weights": shares,
            "words": [hashed_id(key, "words", 50) for key in words],
        }
        for label, price, user, item, seen, shares, words in EXPECTED
    ]


def write(tmp_path, table, name="raw.parquet", schema=SCHEMA):
    pyarrow.parquet.write_table(table, tmp_path / name)
    (tmp_path / "schema.yaml").write_text(schema)
    return {"dataset_name": str(tmp_path / name), "dataset_schema": tmp_path / "schema.yaml", "hash_size": 50}


def prepared(tmp_path, **options):
    options = {"split_fractions": (1, 0, 0)} | options
    made = prepare(PreparationSettings(**options), tmp_path / "out")
    return made, pl.read_parquet(tmp_path / "out" / "train" / "*.parquet").to_dicts()


def test_every_role_equals_plain_python(tmp_path):
    _, rows = prepared(tmp_path, **write(tmp_path, TABLE))
    assert rows == expected_rows()


def test_a_hub_data_set_equals_its_parquet(tmp_path):
    (tmp_path / "set").mkdir()
    where = write(tmp_path, TABLE)
    pyarrow.parquet.write_table(TABLE, tmp_path / "set" / "train.parquet")
    on_hub = where | {"dataset_name": str(tmp_path / "set"), "dataset_format": "hub"}
    made, rows = prepared(tmp_path, **on_hub)
    assert rows == expected_rows()
    assert made.source["files"] == {"train": [f"{tmp_path / 'set'}:train"]}


def test_the_shards_of_a_hub_data_set_are_prepared_apart_and_in_order(tmp_path):
    (tmp_path / "set").mkdir()
    where = write(tmp_path, TABLE) | {"dataset_name": str(tmp_path / "set"), "dataset_format": "hub"}
    for row in range(3):
        pyarrow.parquet.write_table(TABLE.slice(row, 1), tmp_path / "set" / f"train-{row}.parquet")
    made, rows = prepared(tmp_path, **where)
    assert rows == expected_rows()
    assert made.source["files"] == {"train": [f"{tmp_path / 'set'}:train:{part}/3" for part in (1, 2, 3)]}
    assert len(list((tmp_path / "out" / "train").glob("*.parquet"))) == 3, "a piece for each shard"
    pyarrow.parquet.write_table(
        TABLE.slice(1, 1).set_column(0, TABLE.schema[0].name, [[7]]), tmp_path / "set/train-1.parquet"
    )
    with pytest.raises(DataError, match=r"set:train:2/3: row 1: .* it must be 0 or 1"):
        prepare(PreparationSettings(**where, split_fractions=(1, 0, 0)), tmp_path / "never")


def test_a_hub_data_set_with_several_splits_keeps_them(tmp_path):
    (tmp_path / "set").mkdir()
    where = write(tmp_path, TABLE) | {"dataset_name": str(tmp_path / "set"), "dataset_format": "hub"}
    for split, rows in (("train", 2), ("test", 3)):
        pyarrow.parquet.write_table(TABLE.slice(0, rows), tmp_path / "set" / f"{split}.parquet")
    made = prepare(PreparationSettings(**where), tmp_path / "out")
    assert {split: counts.rows for split, counts in made.splits.items()} == {"train": 2, "test": 3}


def test_one_split_of_a_hub_data_set_is_read_alone(tmp_path):
    (tmp_path / "set").mkdir()
    where = write(tmp_path, TABLE) | {"dataset_name": str(tmp_path / "set"), "dataset_format": "hub"}
    for split, rows in (("train", 2), ("test", 3)):
        pyarrow.parquet.write_table(TABLE.slice(0, rows), tmp_path / "set" / f"{split}.parquet")
    made = prepare(PreparationSettings(**where, only_split="train"), tmp_path / "out")
    assert {split: counts.rows for split, counts in made.splits.items()} == {"train": 2}
    with pytest.raises(DataError, match=r"there is no split validation\. Use one of: train, test"):
        prepare(PreparationSettings(**where, only_split="validation"), tmp_path / "never")


def test_two_splits_of_a_hub_data_set_that_mean_the_same_are_refused(monkeypatch):
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda *_: ["train", "validation", "dev"])
    with pytest.raises(DataError, match="the splits validation and dev both map to validation"):
        hub_splits("owner/name")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("y", pa.array([0, 1, 3]), "row 3: column 'y': the label is 3; it must be 0 or 1"),
        ("y", pa.array([0, None, 1]), "row 2: column 'y': the label is blank"),
        ("price", pa.array([0, 1, float("inf")]), "row 3: column 'price': inf is not a finite number"),
        ("item", pa.array([0, 1.5, 1]), "row 2: column 'item': the id 1.5 is neither text nor an integer"),
        ("shares", pa.array([[0.5, 1.0], [1.0], []]), "row 2: column 'seen' has 0 ids, but 'shares' has 1 weights"),
        ("user", pa.array([[1], [2], [3]]), r"column 'user' has lists .*multi_valued: true"),
        ("user", pa.array([{"a": 1}] * 3), r"column 'user' has the type struct"),
    ],
)
def test_a_bad_value_is_named_with_file_and_row(tmp_path, column, values, message):
    table = TABLE.set_column(TABLE.schema.get_field_index(column), column, values)
    where = write(tmp_path, table)
    with pytest.raises(DataError, match=rf"raw\.parquet: {message}"):
        prepared(tmp_path, **where)
    if message.startswith("row"):
        made, rows = prepared(tmp_path, **where, bad_rows="skip")
        assert (len(rows), made.splits["train"].bad_rows) == (2, 1)


def test_an_absent_column_is_named(tmp_path):
    where = write(tmp_path, TABLE.rename_columns({"user": "usr"}))
    with pytest.raises(ValueError, match=r"raw\.parquet: there is no column 'user'.*Did you mean 'usr'"):
        prepared(tmp_path, **where)


@pytest.mark.parametrize("keep", [0, 10, 0.9])
def test_a_truncated_file_is_an_error_even_when_skipping(tmp_path, keep):
    where = write(tmp_path, TABLE)
    data = (tmp_path / "raw.parquet").read_bytes()
    (tmp_path / "raw.parquet").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=r"raw\.parquet: not a complete Parquet file"):
        prepared(tmp_path, **where, bad_rows="skip")


def test_batches_are_bounded_whatever_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "BATCH_ROWS", 100)
    where = write(tmp_path, pa.concat_tables([TABLE] * 1000))
    reader = ParquetReader(load_roles(where["dataset_schema"]))
    chunks = list(reader.chunks(where["dataset_name"]))
    assert [len(chunk.rows) for chunk in chunks] == [100] * 30
    assert chunks[-1].rows[-1] == 3000
    assert [rows for rows, _ in reader.row_counts(where["dataset_name"])] == [3000]


def test_a_schema_is_asked_for(tmp_path):
    where = write(tmp_path, TABLE)
    with pytest.raises(ValueError, match="the format parquet needs dataset_schema"):
        prepared(tmp_path, **(where | {"dataset_schema": None}))
