"""Files of pretrained vectors: every layout gives the same vectors by id; what is wrong is named with file and row."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dhen.data.formats.column_role import PretrainedRole
from dhen.data.formats.roles import as_yaml, parse_roles
from dhen.data.preparation.encoding.vocabulary import Vocabulary
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import Schema
from dhen.training.saved import pretrained_tables
from dhen.training.saved.pretrained_tables import PretrainedTables

DIM, KEYS = 4, ["7", "8", "9", "10", "11"]
GIVEN = [8, 7, 500, 11]
"""Keys of the file: three of the vocabulary's, and another."""
VECTORS = np.arange(16, dtype=np.float32).reshape(4, DIM) / 8
LISTS = pa.array(VECTORS.tolist())
COLUMNS = {f"v{place}": VECTORS[:, place] for place in range(DIM)}
FLOATS = pa.array([[float(number) for number in row] for row in VECTORS], pa.list_(pa.float64()))
FIXED = pa.FixedSizeListArray.from_arrays(pa.array(VECTORS.ravel().astype(np.float16)), DIM)
LAYOUTS = {
    "lists": {"key": GIVEN, "vector": LISTS},
    "lists of float64": {"key": GIVEN, "vector": FLOATS},
    "fixed lists of float16, texts": {"vector": FIXED, "key": [f" {key} " for key in GIVEN]},
    "columns, large texts": {"key": pa.array(map(str, GIVEN), pa.large_string()), **COLUMNS},
}


@pytest.fixture
def vectors_of(tmp_path):
    """Makes `PretrainedTables` of the columns of a Parquet file, or of an .npz file."""
    Vocabulary(pa.array(KEYS), np.ones(len(KEYS))).save(tmp_path, "item")

    def make(columns, largest=3.4e38, npz=False):
        file = tmp_path / ("vectors.npz" if npz else "vectors.parquet")
        if npz:
            np.savez(file, **columns)
        elif columns is not None:
            pq.write_table(pa.table(columns), file, row_group_size=3)
        return PretrainedTables(tmp_path, {"item": PretrainedRole(str(file))}, DIM, largest)

    return make


def assert_read(vectors):
    weight, uses = torch.full((6, DIM), -1.0), torch.zeros(6)
    vectors.fill_table("item", weight, uses)
    assert weight.tolist() == [[-1] * DIM, *VECTORS[[1, 0]].tolist(), [-1] * DIM, [-1] * DIM, VECTORS[3].tolist()]
    assert uses.tolist() == [0, 1, 1, 0, 0, 1]
    assert vectors.counts("item") == (5, 3, 4)
    columns = torch.zeros(6, 2, dtype=torch.float16)
    vectors.fill_table("item", columns, columns=slice(1, 3))
    assert columns[[2, 1, 5]].tolist() == VECTORS[[0, 1, 3], 1:3].tolist()
    vectors.fill_table("another", columns)


@pytest.mark.parametrize("piece_rows", [2, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_of_parquet_give_the_same_vectors(vectors_of, layout, piece_rows, monkeypatch):
    monkeypatch.setattr(pretrained_tables, "_PIECE_ROWS", piece_rows)
    assert_read(vectors_of(LAYOUTS[layout]))


@pytest.mark.parametrize("kind", ["i4", "U5", "S5"])
def test_a_pair_of_numpy_arrays_gives_the_same_vectors(vectors_of, kind, monkeypatch):
    monkeypatch.setattr(pretrained_tables, "_PIECE_ROWS", 3)
    assert_read(vectors_of({"keys": np.array(GIVEN).astype(kind), "vectors": VECTORS.astype("f8")}, npz=True))


def changed(row, place, value):
    numbers = VECTORS.tolist()
    numbers[row][place] = value
    return {"key": GIVEN, "vector": pa.array(numbers, pa.list_(pa.float64()))}


WRONG = {
    "no file": (None, ["vectors.parquet: no such file of pretrained vectors"]),
    "no key": ({"id": GIVEN, "vector": LISTS}, ["no column 'key'", "id, vector", "`key` under `pretrained`"]),
    "lists of keys": ({"key": LISTS, "vector": LISTS}, ["no column 'key' of texts"]),
    "no vector": (
        {"key": GIVEN},
        ["beside the key, use one column with lists of 4 numbers, the embedding_dim, or 4 columns"],
    ),
    "texts": ({"key": GIVEN, "vector": ["a"] * 4}, ["vector (string)", "lists of 4 numbers"]),
    "too few columns": ({"key": GIVEN, "a": [1] * 4, "b": [2] * 4}, ["a (int64), b (int64)", "embedding_dim"]),
    "a short list": (LAYOUTS["lists"] | {"vector": [*VECTORS[:3].tolist(), [1.0]]}, ["row 4", "1 numbers", "is 4"]),
    "a null list": (LAYOUTS["lists"] | {"vector": [None, *VECTORS[1:].tolist()]}, ["row 1", "0 numbers"]),
    "nan": (changed(2, 1, np.nan), ["row 3: number 2 of the vector of '500' is nan", "finite", "3.4e+38"]),
    "null": (changed(2, 1, None), ["row 3: number 2", "nan"]),
    "inf": (changed(3, 0, -np.inf), ["row 4: number 1 of the vector of '11' is -inf"]),
    "beyond float32": (changed(3, 0, 1e39), ["row 4: number 1", "is 1e+39"]),
    "the same key": (LAYOUTS["lists"] | {"key": ["7", "8", "x", "7.0"]}, ["rows 1 and 4", "'7'", "one vector"]),
    "the same unknown key": (LAYOUTS["lists"] | {"key": ["x", "8", "x", "7"]}, ["rows 1 and 3", "'x'"]),
    "a blank key": (LAYOUTS["lists"] | {"key": ["7", "8", "9", " "]}, ["row 4 has no key"]),
    "a null key": (LAYOUTS["lists"] | {"key": [7, None, 9, 8]}, ["row 2 has no key. Leave it out"]),
    "floats": (LAYOUTS["lists"] | {"key": [7.0, 8.5, 9.0, 1.0]}, ["no column 'key' of texts or whole numbers"]),
}
WRONG_ARRAYS = {
    "no array": ({"key": np.array(GIVEN), "vectors": VECTORS}, ["keys is not a file in the archive", "arrays keys"]),
    "objects": ({"keys": np.array(["a", 1, 2, 3], object), "vectors": VECTORS}, ["Object arrays cannot be loaded"]),
    "other lengths": ({"keys": np.array(GIVEN), "vectors": VECTORS[:3]}, ["cannot be read", "(N, D)"]),
    "one dimension": ({"keys": np.array(GIVEN), "vectors": VECTORS[0]}, ["cannot be read", "(N, D)"]),
    "another dimension": ({"keys": np.array(GIVEN), "vectors": VECTORS[:, :3]}, ["row 1", "3 numbers", "is 4"]),
}


@pytest.mark.parametrize("name", [*WRONG, *WRONG_ARRAYS])
def test_what_is_wrong_is_one_line_that_says_what_to_do(vectors_of, name, monkeypatch):
    monkeypatch.setattr(pretrained_tables, "_PIECE_ROWS", 2)
    columns, words = (WRONG | WRONG_ARRAYS)[name]
    vectors = vectors_of(columns, npz=name in WRONG_ARRAYS)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        vectors.counts("item")
    message = str(caught.value)
    assert message.startswith(f"{vectors.roles['item'].file}: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_number_must_fit_the_dtype_of_the_table(vectors_of):
    with pytest.raises(ValueError, match=r"is 70000.0. Use finite numbers up to 6.55e\+04"):
        vectors_of(changed(0, 0, 7e4), largest=65504.0).counts("item")


@pytest.mark.parametrize("name", ["vectors.npz", "vectors.parquet"])
def test_a_file_of_another_kind_is_refused(vectors_of, tmp_path, name):
    (tmp_path / name).write_text("key,vector\n")
    vectors = PretrainedTables(tmp_path, {"item": PretrainedRole(str(tmp_path / name))}, DIM, 1.0)
    with pytest.raises(ValueError, match=rf"{name}: cannot be read \(.*Use a Parquet file, or an .npz file"):
        vectors.counts("item")


ITEM = "sparse:\n  - {name: item, pretrained: {file: v.parquet, key: id, frozen: true}%s}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ITEM % ", encoding: hash", ["'item'", "two values may share a row", "gets a vocabulary"]),
        (ITEM % ", hash_size: 100", ["two values may share a row"]),
        (ITEM % ", bins: 3", ["'item'", "bins", "pretrained"]),
        (ITEM.replace("key", "keys") % "", ["pretrained.keys"]),
        (ITEM.replace("file: v.parquet, ", "") % "", ["pretrained.file"]),
        (ITEM.replace("parquet", "npz") % "", ["key is 'id'", "the arrays keys and vectors. Remove key"]),
        (ITEM % "" + "  - {name: last, table: item, encoding: hash}\n", ["'item'", "two values may share a row"]),
    ],
)  # fmt: skip
def test_a_schema_that_contradicts_pretrained_vectors_is_refused(text, words):
    with pytest.raises(ValueError, match=r"schema\.yaml: ") as caught:
        parse_roles(text, "schema.yaml")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("flags", [{"id_encoding": "hash"}, {"hash_size": 50}, {"id_encoding": "auto"}])
def test_pretrained_vectors_give_the_table_a_vocabulary(tmp_path, flags):
    (tmp_path / "log.csv").write_text("label,item,last\n" + "".join(f"{row % 2},i{row % 3},i3\n" for row in range(60)))
    text = ITEM % "" + "  - {name: last, table: item}\n"
    (tmp_path / "schema.yaml").write_text(text)
    settings = PreparationSettings(str(tmp_path / "log.csv"), dataset_schema=str(tmp_path / "schema.yaml"), **flags)
    prepare(settings, tmp_path / "prepared")
    columns = Schema.load(tmp_path / "prepared").sparse
    assert [(column.encoding, column.num_embeddings) for column in columns] == [("vocabulary", 5)] * 2
    role = PretrainedRole("v.parquet", "id", frozen=True)
    kept = parse_roles((tmp_path / "prepared/columns.yaml").read_text(), "columns.yaml")
    assert kept.tables["item"].pretrained == role
    assert parse_roles(as_yaml(kept), "again") == kept
