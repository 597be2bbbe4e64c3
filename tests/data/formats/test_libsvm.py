"""libsvm, libfm and libffm text."""

import polars as pl
import pytest

from dhen.data.formats.raw_rows import DataError
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings
from tests.data.preparation.reference_preparation import hashed_id

FFM_SCHEMA = """
sparse:
  - 0
  - {name: tags, column: "1", multi_valued: true}
  - {name: words, column: "2", weights: value}
dense: [{name: price, column: "3", transform: identity}]
ignored: [9]
"""


def prepared(tmp_path, text, schema=None, name="raw.libsvm", **options):
    (tmp_path / name).write_text(text)
    if schema:
        (tmp_path / "schema.yaml").write_text(schema)
        options["dataset_schema"] = tmp_path / "schema.yaml"
    wanted = PreparationSettings(str(tmp_path / name), split_fractions=(1, 0, 0), hash_size=50, **options)
    return prepare(wanted, tmp_path / "out"), pl.read_parquet(tmp_path / "out" / "train" / "*.parquet").to_dicts()


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
@pytest.mark.parametrize("name", ["raw.libsvm", "raw.txt"])
def test_a_token_is_a_field_by_its_place(tmp_path, block_bytes, name):
    _, rows = prepared(tmp_path, "1 17:1 203:1\n-1\t4:1.0  203:1 \r\n+1 5:1 8\n", name=name, block_bytes=block_bytes)
    expected = [(1.0, "17", "203"), (0.0, "4", "203"), (1.0, "5", "8")]
    assert rows == [{"label": y, "1": hashed_id(a, "1", 50), "2": hashed_id(b, "2", 50)} for y, a, b in expected]


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_libffm_names_its_fields_and_may_leave_them_out(tmp_path, block_bytes):
    text = "1 0:17:1 1:5:1 1:6:1 2:9:.5 2:8:-2\n0 1:5:1 3:x:7.5 9:1:1\n0 2:4:3 0:3:1\n1\n"
    _, rows = prepared(tmp_path, text, FFM_SCHEMA, block_bytes=block_bytes)

    def row(label, price, zero, tags, words, weights):
        tags = [hashed_id(tag, "tags", 50) for tag in tags]
        words = [hashed_id(word, "words", 50) for word in words]
        zero = hashed_id(zero, "0", 50)
        return {"label": label, "price": price, "0": zero, "tags": tags, "words": words, "words:weights": weights}

    assert rows == [
        row(1.0, 0.0, "17", ["5", "6"], ["9", "8"], [0.5, -2.0]),
        row(0.0, 7.5, "", ["5"], [], []),
        row(0.0, 0.0, "3", [], ["4"], [3.0]),
        row(1.0, 0.0, "", [], [], []),
    ]


def test_labels_may_be_absent_where_they_are_not_required(tmp_path):
    schema, rows = prepared(tmp_path, "17:1 203:1\n4:1 5:1\n", is_label_required=False)
    assert schema.splits["train"].unlabelled == 2
    assert [row["1"] for row in rows] == [hashed_id("17", "1", 50), hashed_id("4", "1", 50)]


@pytest.mark.parametrize(
    ("line", "schema", "message"),
    [
        ("0 1:1", None, "the row has 1 fields, but most of the first rows have 2"),
        ("0 1:1 2:1 3:1", None, "the row has 3 fields, but most of the first rows have 2"),
        ("0 1:0.5 2:1", None, "field 1: a value is not 1. If the values are weights"),
        ("0 1:x 2:1", None, "the value of a token is not a finite number"),
        ("0 1:1 2:1:1", None, "a token does not have the form id:value"),
        ("2 1:1 2:1", None, "the label is '2'; it must be 0 or 1"),
        ("1:1 2:1", None, "the label is blank; it must be 0 or 1"),
        ("0 7:1:1", FFM_SCHEMA, "the row has a field other than"),
        ("0 0:1:1 0:2:1", FFM_SCHEMA, "field 0 appears 2 times"),
        ("0 0:1", FFM_SCHEMA, "a token does not have the form field:id:value"),
        ("0 1:1e39 2:1", None, "the value of a token is not a finite number"),
        ("0 2:1:nan", FFM_SCHEMA, "the value of a token is not a finite number"),
    ],
)
def test_a_bad_row_is_named_or_skipped(tmp_path, line, schema, message):
    good = "1 0:1:1 1:2:1" if schema else "1 1:1 2:1"
    text = f"{good}\n{good}\n{line}\n{good}\n"
    with pytest.raises(DataError, match=rf"raw\.libsvm: row 3: .*{message}.*reads '{line}'"):
        prepared(tmp_path, text, schema)
    made, rows = prepared(tmp_path, text, schema, bad_rows="skip")
    assert len(rows) == 3
    assert made.splits["train"].bad_rows == 1


@pytest.mark.parametrize("name", ["raw.libsvm", "raw.txt"])
@pytest.mark.parametrize("first", ["1 5:1", "1 5:1 6:1:1", "1", "hello", "1 0:5:1 1:6:1"])
def test_a_bad_first_row_is_a_row_like_any_other(tmp_path, name, first):
    text = f"{first}\n1 5:1 6:1\n0 7:1 8:1\n1 5:1 8:1\n"
    with pytest.raises(DataError, match=rf"{name}: row 1: "):
        prepared(tmp_path, text, name=name)
    made, rows = prepared(tmp_path, text, name=name, bad_rows="skip")
    assert (len(rows), made.splits["train"].bad_rows) == (3, 1)
    assert list(rows[0]) == ["label", "1", "2"]


def test_a_schema_must_fit_the_number_of_fields(tmp_path):
    with pytest.raises(ValueError, match="the column '2' has no role"):
        prepared(tmp_path, "1 5:1 6:1\n", "sparse: [1]")
    with pytest.raises(ValueError, match="no column '3'"):
        prepared(tmp_path, "1 5:1 6:1\n", "sparse: [1, 2, 3]")
