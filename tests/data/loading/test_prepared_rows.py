"""A prepared folder that does not match its schema raises an error that names the file and the column."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dhen.data.loading.batches import BatchLoader
from dhen.data.schema import SparseColumn, SplitCounts
from tests.data.prepared_folders import MIXED, write_prepared


@pytest.fixture
def prepared(tmp_path):
    return write_prepared(tmp_path / "prepared", 60)


def second_part(prepared):
    return prepared.folder / "train" / "part-00001.parquet"


def read_all(prepared):
    return list(BatchLoader(prepared.folder, "train", batch_size=8).epoch(0))


def replace_column(path, name, values):
    """Rewrite a file with other values in a column. None removes the column."""
    table = pq.read_table(path)
    at = table.column_names.index(name)
    pq.write_table(table.remove_column(at) if values is None else table.set_column(at, name, values), path)


def assert_says(error, *words):
    for word in words:
        assert word in str(error.value)


def test_a_split_that_is_not_there(prepared):
    with pytest.raises(FileNotFoundError, match=r"there is no split 'test'\. The splits are train"):
        BatchLoader(prepared.folder, "test", batch_size=8)


def test_a_folder_without_schema(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"schema\.json: no such file"):
        BatchLoader(tmp_path, "train", batch_size=8)


def test_a_split_without_rows(prepared):
    empty = replace(prepared.schema, splits={"test": SplitCounts(0, 0)})
    with pytest.raises(ValueError, match="test: the split has no rows"):
        BatchLoader(prepared.folder, "test", batch_size=8, schema=empty)


def test_a_missing_file_shows_in_the_number_of_rows(prepared):
    second_part(prepared).unlink()
    with pytest.raises(ValueError, match=r"have 39 rows, but schema\.json says 60") as error:
        BatchLoader(prepared.folder, "train", batch_size=8)
    assert_says(error, "prepared/train", "damaged", "Prepare the data again")


def test_a_file_that_is_no_parquet(prepared):
    second_part(prepared).write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match="cannot be read as Parquet") as error:
        BatchLoader(prepared.folder, "train", batch_size=8)
    assert_says(error, "part-00001.parquet")


FLOATS = pa.array(np.zeros(21))
LISTS = pa.array([[1.0]] * 21, pa.list_(pa.float64()))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("label", None, "column 'label' must be float32, but is missing"),
        ("I2", FLOATS, "column 'I2' must be float32, but is double"),
        ("site", FLOATS, "column 'site' must be int32 or int64, but is double"),
        ("site", pa.array([1] * 21, pa.uint64()), "column 'site' must be int32 or int64, but is uint64"),
        ("zone", None, "column 'zone' must be int32 or int64, but is missing"),
        ("tags", pa.array([1] * 21), "column 'tags' must be a list of int32 or int64, but is int64"),
        ("words", LISTS, "column 'words' must be a list of int32 or int64, but is list<"),
        ("words:weights", LISTS, "column 'words:weights' must be a list of float32, but is list<"),
        ("words:weights", None, "column 'words:weights' must be a list of float32, but is missing"),
    ],
)
def test_a_column_that_is_missing_or_of_another_type(prepared, column, values, message):
    replace_column(second_part(prepared), column, values)
    with pytest.raises(ValueError, match=r"part-00001\.parquet") as error:
        BatchLoader(prepared.folder, "train", batch_size=8)
    assert_says(error, message, "Prepare the data again")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "site",
            pa.array([1] * 20 + [50], pa.int32()),
            "is 50 in row 41 of the split. It must be a row of its table, 0 to 49",
        ),
        ("site", pa.array([-1] + [1] * 20, pa.int32()), "is -1"),
        ("site", pa.array([2**32] * 21), "is 4294967296"),
        (
            "tags",
            pa.array([[1, 2]] * 20 + [[30]]),
            "is 30 in row 41 of the split. It must be a row of its table, 0 to 29",
        ),
        (
            "I1",
            pa.array([1] * 18 + [math.nan] * 3, pa.float32()),
            "'I1' is nan in row 39 of the split. It must be finite",
        ),
        (
            "I2",
            pa.array([1] * 20 + [-math.inf], pa.float32()),
            "'I2' is -inf in row 41 of the split. It must be finite",
        ),
        ("label", pa.array([1, 0, 2] * 7, pa.float32()), "'label' is 2.0 in row 23 of the split. It must be 0 or 1"),
        (
            "label",
            pa.array([1] * 20 + [math.nan], pa.float32()),
            "'label' is nan in row 41 of the split. It must be 0 or 1",
        ),
        ("zone", pa.array([1] * 20 + [None], pa.int32()), "has 1 null values"),
        ("I1", pa.array([1] * 20 + [None], pa.float32()), "has 1 null values"),
        ("tags", pa.array([[1]] * 20 + [None]), "has 1 null values"),
        ("tags", pa.array([[1]] * 20 + [[3, None]]), "has 1 null values"),
        ("words", pa.array([[1, 2, 3, 4]] * 21), "'words:weights' has 3 weights for 4 ids in row 21 of the split"),
    ],
)
def test_values_that_no_prepared_column_has_reach_the_consumer_as_an_error(prepared, column, values, message):
    replace_column(second_part(prepared), column, values)
    with pytest.raises(ValueError, match=r"part-00001\.parquet") as error:
        read_all(prepared)
    assert_says(error, column, message, "Prepare the data again")


def test_a_weight_that_is_not_finite_reaches_the_consumer_as_an_error(prepared):
    weights = pq.read_table(second_part(prepared))["words:weights"].to_pylist()
    broken = [of_row if row < 9 else [math.nan] * len(of_row) for row, of_row in enumerate(weights)]
    first = next(row for row in range(9, len(weights)) if weights[row])
    replace_column(second_part(prepared), "words:weights", pa.array(broken, pa.list_(pa.float32())))
    with pytest.raises(ValueError, match=rf"00001\.parquet: column 'words:weights' is nan in row {21 + first} of"):
        read_all(prepared)


def test_ids_and_weights_may_be_lists_of_two_sizes(prepared):
    before = [batch.sparse.weights.tolist() for batch in read_all(prepared)]
    for path in (prepared.folder / "train").iterdir():
        weights = pq.read_table(path)["words:weights"]
        replace_column(path, "words:weights", weights.cast(pa.large_list(pa.float32())))
    assert [batch.sparse.weights.tolist() for batch in read_all(prepared)] == before


def test_damaged_pages_reach_the_consumer_as_an_error(prepared):
    loader = BatchLoader(prepared.folder, "train", batch_size=8, window_rows=7)
    content = bytearray(second_part(prepared).read_bytes())
    content[4 : len(content) // 2] = b"\xff" * (len(content) // 2 - 4)
    second_part(prepared).write_bytes(content)
    batches = loader.epoch(0)
    assert next(batches).rows_B.tolist() == list(range(8))
    with pytest.raises(ValueError, match=r"part-00001.parquet: row group 0 cannot be read"):
        list(batches)


def test_row_groups_without_rows_are_passed_over(tmp_path, prepared):
    empty = pq.read_table(second_part(prepared)).slice(0, 0)
    pq.write_table(empty, prepared.folder / "train" / "part-00000b.parquet")
    assert [row for batch in read_all(prepared) for row in batch.rows_B.tolist()] == list(range(60))


def test_ids_of_huge_tables_keep_all_their_bits(tmp_path):
    prepared = write_prepared(tmp_path / "p", 21, (SparseColumn("page", 2**40), MIXED[1]))
    path = prepared.folder / "train" / "part-00000.parquet"
    replace_column(path, "page", pa.array([2**39 + row for row in range(21)]))
    (batch,) = BatchLoader(prepared.folder, "train", batch_size=21).epoch(0)
    assert batch.sparse.ids[:21].tolist() == [2**39 + row for row in range(21)]
