"""Sealing a prepared folder that another program wrote: what it checks, and what it writes."""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from dhen.data.loading.prepared_rows import find_row_groups
from dhen.data.loading.sealing import seal
from dhen.data.preparation.encoding import vocabulary
from dhen.data.preparation.encoding.vocabulary import Vocabulary
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import Schema, SparseColumn
from tests.data.preparation.reference_preparation import criteo_lines
from tests.data.prepared_folders import random_table, write_prepared, write_split


@pytest.fixture
def folder(tmp_path):
    """21 rows in three files, whose schema has no splits."""
    schema = write_prepared(tmp_path, 21, groups_per_file=1).schema
    replace(schema, splits={}).save(tmp_path)
    values = json.loads((tmp_path / "schema.json").read_text())
    for key in ("splits", "source", "best_possible_ne"):
        del values[key]
    (tmp_path / "schema.json").write_text(json.dumps(values))
    return tmp_path


def test_it_counts_each_split_and_digests_its_values(folder):
    schema = Schema.load(folder)
    write_split(folder / "test", random_table(5, schema.sparse, schema.dense, 1), 7, 1)
    sealed = seal(folder)
    assert Schema.load(folder) == sealed
    assert {split: (counts.rows, counts.clicks) for split, counts in sealed.splits.items()} == {
        "train": (21, 10), "test": (5, 2)
    }  # fmt: skip
    assert len(find_row_groups(folder, "train", sealed)) == 3
    assert seal(folder) == sealed
    table = pyarrow.parquet.read_table(folder / "test/part-00000.parquet")
    changed = table.set_column(1, "I1", pa.array(np.arange(5) + 0.5, pa.float32()))
    pyarrow.parquet.write_table(changed, folder / "test/part-00000.parquet")
    again = seal(folder)
    assert again.splits["train"].digest == sealed.splits["train"].digest
    assert again.splits["test"].digest != sealed.splits["test"].digest


def test_a_folder_of_ours_keeps_its_digests(tmp_path):
    (tmp_path / "raw.txt").write_text("\n".join(criteo_lines(50)) + "\n")
    wanted = PreparationSettings(str(tmp_path / "raw.txt"), hash_size=100, id_encoding="hash")
    schema = prepare(wanted, tmp_path / "out")
    assert seal(tmp_path / "out").splits == schema.splits


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("label", pa.array([1.0, 0, 1, 2, 0, 0, 0], pa.float32()), "'label' is 2.0 in row 10 of the split. It must"),
        ("label", pa.array([1.0, np.nan] + [0] * 5, pa.float32(), from_pandas=False), "'label' is nan in row 8"),
        ("label", pa.array([1] * 7), "'label' must be float32, but is int64"),
        ("I2", pa.array([0, np.inf] + [0] * 5, pa.float32()), "'I2' is inf in row 8 of the split. It must be finite"),
        ("I2", pa.array([0, 1, None] + [0] * 4, pa.float32()), "'I2' has 1 null values, the first in row 9 of"),
        ("site", pa.array([1] * 6 + [50], pa.int32()), "'site' is 50 in row 13 .* a row of its table, 0 to 49"),
        ("tags", pa.array([[1, 2], [], [3, -1]] + [[]] * 4, pa.list_(pa.int64())), "'tags' is -1 in row 9 "),
        ("tags", pa.array([[1, None]] + [[]] * 6, pa.list_(pa.int32())), "'tags' has 1 null values, .* in row 7"),
        ("tags", pa.array([1] * 7, pa.int32()), "'tags' must be a list of int32 or int64, but is int32"),
        ("words:weights", pa.array([[1.0] * 9] * 7, pa.list_(pa.float32())), "has 9 weights for . ids in row 7 of"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_file_and_row(folder, column, values, message):
    before, path = (folder / "schema.json").read_text(), folder / "train/part-00001.parquet"
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.set_column(table.column_names.index(column), column, values), path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: column .*{message}"):
        seal(folder)
    assert (folder / "schema.json").read_text() == before


def test_a_missing_column_and_an_empty_folder_are_named(folder):
    path = folder / "train/part-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop_columns("zone"), path)
    with pytest.raises(ValueError, match="column 'zone' must be int32 or int64, but is missing"):
        seal(folder)
    for file in (folder / "train").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no Parquet files in train/, validation/ and test/"):
        seal(folder)


@pytest.mark.parametrize("place", ["train/day=1", "valid", "."])
def test_rows_that_training_would_not_read_are_refused(folder, place):
    other = folder / place / "a.parquet"
    other.parent.mkdir(exist_ok=True)
    for copy in (other, other.with_name("b.parquet")):
        copy.write_bytes((folder / "train/part-00000.parquet").read_bytes())
    with pytest.raises(ValueError, match=rf"^{re.escape(str(other))} and 1 more .* not directly in train/, .* Move"):
        seal(folder)


def test_a_vocabulary_has_a_key_for_each_id(folder):
    schema = replace(Schema.load(folder), sparse=(SparseColumn("zone", 9, "vocabulary"),))
    schema.save(folder)
    with pytest.raises(FileNotFoundError, match=r"zone\.parquet: no such file"):
        seal(folder)
    Vocabulary(pa.array(["a", "b"]), np.array([2, 1])).save(folder, "zone")
    with pytest.raises(
        ValueError, match=r"there are 2 keys, but schema\.json says that 'zone' has num_embeddings 9\. Use 3"
    ):
        seal(folder)
    Vocabulary(pa.array(list("abcdefgh")), np.ones(8, int)).save(folder, "zone")
    assert seal(folder).splits["train"].rows == 21


BINS = {"encoding": "bins", "num_embeddings": 4, "bins": 3}


@pytest.mark.parametrize(
    ("kind", "feature", "message"),
    [
        ("sparse", {"name": "site", "num_embeddings": 50}, "'site' has the name of another column"),
        ("dense", {"name": "site"}, "'site' has the name of another column"),
        (
            "dense",
            {"name": "label"},
            "'label' has the name of another column. Rename one: names must differ, also from 'label'",
        ),
        ("dense", {"name": "words:weights"}, "'words:weights' has the name of another column"),
        ("dense", {"name": "new", "mean": 3}, "'new' has mean 3.0 and std None. Give both, or neither"),
        ("dense", {"name": "new", "missing_of": "site"}, "'new' has missing_of 'site'. Use a dense feature: I1, I2"),
        ("sparse", {"name": "new", **BINS}, "'new' has encoding 'bins'. Give bins and edges with 'bins'"),
        ("sparse", {"name": "new", "num_embeddings": 4, "bins": 3}, "'new' has encoding 'hash'. Give bins and edges"),
        ("sparse", {"name": "new", **BINS, "edges": [2, 1]}, r"'new' has edges \[2.0, 1.0\]. They must ascend"),
        (
            "sparse",
            {"name": "new", "num_embeddings": 4, "is_weighted": True},
            "'new' is weighted, but not multi",
        ),
    ],
)
def test_a_wrong_feature_is_named_before_the_rows_are_read(folder, kind, feature, message):
    path = folder / "schema.json"
    values = json.loads(path.read_text())
    values[kind].append(feature)
    path.write_text(json.dumps(values))
    (folder / "train/part-00000.parquet").write_text("not read")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: feature {message}"):
        seal(folder)


@pytest.fixture
def zones(folder):
    """The path of the vocabulary of the only sparse feature, which has eight keys."""
    replace(Schema.load(folder), sparse=(SparseColumn("zone", 9, "vocabulary"),)).save(folder)
    Vocabulary(pa.array(list("abcdefgh")), np.ones(8, int)).save(folder, "zone")
    return folder / "vocabulary/zone.parquet"


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("key", [*"abcdefga"], "the key 'a' appears twice. Write each key once"),
        ("key", [*"abcdefg", None], "column 'key' is null in row 7"),
        ("key", [*"abcdefg", ""], "the key of id 8 is empty. A blank has id 0"),
        ("key", list(range(8)), "column 'key' must be string, but is int64"),
        ("id", [1, 2, 3, None, 5, 6, 7, 8], "column 'id' is null in row 3"),
        ("id", [1.0] * 8, "column 'id' must be int64, but is double"),
        ("id", [1] * 8, "the ids are not 1 to 8"),
        ("id", None, "column 'id' must be int64, but is missing"),
        ("count", [None, *range(7)], "column 'count' is null in row 0"),
        ("count", None, "column 'count' must be int64, but is missing"),
    ],
)
def test_a_wrong_vocabulary_is_named_with_its_file(folder, zones, column, values, message):
    table = pyarrow.parquet.read_table(zones).drop_columns(column)
    pyarrow.parquet.write_table(table if values is None else table.append_column(column, pa.array(values)), zones)
    with pytest.raises(ValueError, match=f"^{re.escape(str(zones))}: {message}"):
        seal(folder)


def test_a_vocabulary_that_is_no_parquet_file_is_named(folder, zones):
    zones.write_text("a,1,2")
    with pytest.raises(ValueError, match=f"^{re.escape(str(zones))}: cannot be read: "):
        seal(folder)


@pytest.mark.parametrize("key", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_the_columns_of_a_vocabulary_may_come_in_any_order_and_have_other_widths(folder, zones, key):
    table = pyarrow.parquet.read_table(zones).select(["count", "key", "id"])
    types = zip(table.column_names, (pa.uint32(), key, pa.int32()), strict=True)
    pyarrow.parquet.write_table(table.cast(pa.schema(types)), zones)
    assert seal(folder).splits["train"].rows == 21


def test_keys_of_one_hash_are_told_from_equal_keys(folder, zones, monkeypatch):
    monkeypatch.setattr(vocabulary, "hash_texts", lambda texts, salt: np.zeros(len(texts), np.uint64))
    with pytest.raises(ValueError, match=f"^{re.escape(str(zones))}: 'zone': two keys have the same 64-bit hash"):
        seal(folder)
