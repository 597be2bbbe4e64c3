"""Criteo's format, from raw lines to a prepared folder."""

import gzip
import re
from types import MappingProxyType

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dhen.data.formats.criteo import ROLES, CriteoReader
from dhen.data.formats.raw_rows import DataError
from dhen.data.formats.roles import KeptRoles
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import SparseColumn, kept_column
from tests.data.preparation import reference_preparation as reference

ALL_TRAIN = (1.0, 0.0, 0.0)


def write(path, lines, end="\n"):
    path.write_bytes("".join(line + end for line in lines).encode())
    return str(path)


def rows_of(folder, split="train"):
    return pl.read_parquet(folder / split / "*.parquet").to_dicts()


def with_value(line, column, value):
    parts = line.split("\t")
    parts[column] = value
    return "\t".join(parts)


def read_all(path, **options):
    return list(CriteoReader(**options).chunks(path))


def test_equals_plain_python(tmp_path):
    lines = reference.criteo_lines(500)
    raw = write(tmp_path / "raw.txt", lines)
    schema = prepare(PreparationSettings(raw, split_fractions=ALL_TRAIN, hash_size=1000), tmp_path / "out")
    reference.assert_same_rows(rows_of(tmp_path / "out"), reference.prepared_criteo(lines, 1000))
    assert schema.splits["train"].rows == 500
    assert schema.splits["train"].clicks == sum(line.startswith("1") for line in lines)
    assert [column.name for column in schema.dense] == reference.INTEGERS
    assert schema.sparse[25] == SparseColumn("C26", 1000)
    kinds = pl.read_parquet_schema(tmp_path / "out" / "train" / "part-00000.parquet")
    assert (kinds["label"], kinds["I1"], kinds["C1"]) == (pl.Float32, pl.Float32, pl.Int32)


@pytest.mark.parametrize("value", ["0x1F", "1.0", "1e2", "+5", " 7 ", "", "99999999999999999999", "9007199254740993"])
def test_an_integer_is_what_it_is_as_text(tmp_path, value):
    class TextReader(CriteoReader):
        number_types = MappingProxyType({})

    lines = reference.criteo_lines(5)
    raw = write(tmp_path / "raw.txt", [*lines, with_value(lines[0], 3, value)])
    (quick, *_), (slow, *_) = (list(reader().chunks(raw)) for reader in (CriteoReader, TextReader))
    assert (quick.table, quick.bad) == (slow.table, slow.bad)


def test_a_kept_integer_stays_as_it_stands_in_the_file(tmp_path):
    raw = write(tmp_path / "raw.txt", [with_value(reference.criteo_lines(1)[0], 1, "007")])
    (chunk, *_) = read_all(raw, roles=KeptRoles(**vars(ROLES), kept={"I1": None}))
    assert (chunk.table["I1"].to_pylist(), chunk.table[kept_column("I1")].to_pylist()) == ([7], ["007"])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("is_zipped", [False, True])
def test_line_ends_and_gzip_change_nothing(tmp_path, end, is_zipped):
    lines = reference.criteo_lines(50)
    raw = write(tmp_path / "raw.txt", lines, end)
    if is_zipped:
        raw = str(tmp_path / "raw.gz")
        (tmp_path / "raw.gz").write_bytes(gzip.compress((tmp_path / "raw.txt").read_bytes()))
    prepare(PreparationSettings(raw, split_fractions=ALL_TRAIN, hash_size=1000), tmp_path / "out")
    reference.assert_same_rows(rows_of(tmp_path / "out"), reference.prepared_criteo(lines, 1000))


def test_capitals_are_the_same_id_and_a_last_line_end_may_lack(tmp_path):
    line = with_value(reference.criteo_lines(1)[0], 14, "68fd1e64")
    raw = tmp_path / "raw.txt"
    raw.write_text(with_value(line, 14, "68FD1E64") + "\n" + line)
    keys = [key for chunk in read_all(str(raw)) for key in chunk.table["C1"].to_pylist()]
    assert keys == ["68fd1e64", "68fd1e64"]


BAD_VALUES = [
    (0, "2", r"label is '2'; it must be 0 or 1"),
    (0, "", r"label is blank; it must be 0 or 1"),
    (0, "-1", r"label is '-1'"),
    (1, "3.5", r"column 'I1': '3.5' is not an integer"),
    (13, "x", r"column 'I13': 'x' is not an integer"),
    (2, "99999999999999999999", r"column 'I2': '9+' is not an integer"),
    (14, "68fd1e6g", r"column 'C1': the id '68fd1e6g' is not hex"),
    (39, "68fd1e640", r"column 'C26': the id '68fd1e640' is not hex"),
    (20, "é", r"column 'C7': the id 'é' is not hex"),
]


@pytest.mark.parametrize(("column", "value", "message"), BAD_VALUES)
def test_a_bad_value_is_named_with_file_and_row(tmp_path, column, value, message):
    lines = reference.criteo_lines(30)
    lines[17] = with_value(lines[17], column, value)
    raw = write(tmp_path / "raw.txt", lines)
    for block_bytes in (1, 1000, 1 << 20):
        with pytest.raises(DataError, match=r"raw\.txt: row 18: .*" + message):
            prepare(PreparationSettings(raw, block_bytes=block_bytes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\t2\t3", "the row has 3 columns, not 40"),
        ("\t" * 40, "the row has 41 columns, not 40"),
        ("a\rb", "a carriage return within the line"),
    ],
)
def test_a_row_of_another_form_is_named(tmp_path, line, message):
    lines = reference.criteo_lines(5)
    lines[3] = line
    raw = write(tmp_path / "raw.txt", lines)
    with pytest.raises(DataError, match=rf"raw\.txt: row 4: .*{message}"):
        prepare(PreparationSettings(raw, dataset_format="criteo"), tmp_path / "out")


def test_a_row_that_is_not_utf8_is_named(tmp_path):
    raw = tmp_path / "raw.txt"
    raw.write_bytes("\n".join(reference.criteo_lines(3)).encode() + b"\n1\t\xff\n")
    with pytest.raises(DataError, match=r"raw\.txt: row 4: the line is not valid UTF-8"):
        prepare(PreparationSettings(str(raw)), tmp_path / "out")


def test_blank_lines_are_left_out_and_row_numbers_stay(tmp_path):
    lines = reference.criteo_lines(4)
    raw = write(tmp_path / "raw.txt", ["", lines[0], "", "", lines[1], lines[2], lines[3], ""])
    chunks = read_all(raw)
    assert [row for chunk in chunks for row in chunk.rows] == [2, 5, 6, 7]
    assert not any(chunk.bad for chunk in chunks)


def bad_line(lines, index, kind):
    values = {"label": (0, "7"), "integer": (5, "1e3"), "hex": (30, "nothex")}
    return "too\tshort" if kind == "short" else with_value(lines[index], *values[kind])


@settings(max_examples=25, deadline=None)
@given(
    bad=st.dictionaries(st.integers(0, 19), st.sampled_from(["label", "integer", "hex", "short"]), max_size=10),
    block_bytes=st.integers(1, 6000),
)
def test_skipping_keeps_just_the_good_rows_whatever_the_blocks(tmp_path_factory, bad, block_bytes):
    folder = tmp_path_factory.mktemp("skip")
    good = reference.criteo_lines(20)
    lines = [bad_line(good, i, bad[i]) if i in bad else line for i, line in enumerate(good)]
    raw = write(folder / "raw.txt", lines)
    wanted = PreparationSettings(
        raw,
        dataset_format="criteo",
        split_fractions=ALL_TRAIN,
        hash_size=1000,
        bad_rows="skip",
        block_bytes=block_bytes,
    )
    schema = prepare(wanted, folder / "out")
    kept = [line for i, line in enumerate(good) if i not in bad]
    reference.assert_same_rows(rows_of(folder / "out"), reference.prepared_criteo(kept, 1000))
    assert schema.splits["train"].bad_rows == len(bad)
    listed = folder / "out" / "bad_rows.csv"
    assert listed.exists() == bool(bad)
    if bad:
        table = pl.read_csv(listed)
        assert table["row"].to_list() == [i + 1 for i in sorted(bad)]
        assert table["text"].to_list() == [lines[i][:200] for i in sorted(bad)]


def test_rows_to_predict_may_lack_the_label_column_or_the_label(tmp_path):
    lines = reference.criteo_lines(6)
    without = write(tmp_path / "test.txt", [line.split("\t", 1)[1] for line in lines])
    some = write(tmp_path / "some.txt", [with_value(lines[0], 0, ""), *lines[1:]])
    to_predict = {"split_fractions": (0, 0, 1), "is_label_required": False, "hash_size": 1000}
    schema = prepare(PreparationSettings([without, some], **to_predict), tmp_path / "out")
    assert schema.splits["test"].unlabelled == 7
    expected = reference.prepared_criteo(lines, 1000)
    actual = rows_of(tmp_path / "out", "test")
    assert [row["C3"] for row in actual] == [row["C3"] for row in expected] * 2
    origins = [(row[":file"], row[":row"]) for row in actual]
    assert origins == [(file, row) for file in (without, some) for row in range(1, 7)]
    labels = pl.read_parquet(tmp_path / "out" / "test" / "*.parquet")["label"]
    assert labels.is_nan().to_list() == [True] * 7 + [False] * 5
    assert labels.null_count() == 0
    with pytest.raises(DataError, match=r"test\.txt: row 1: the row has 39 columns, not 40"):
        prepare(PreparationSettings(without), tmp_path / "never")


def with_schema(tmp_path, yaml, **more):
    raw = write(tmp_path / "raw.txt", reference.criteo_lines(200))
    (tmp_path / "schema.yaml").write_text(yaml)
    wanted = {"dataset_format": "criteo", "split_fractions": ALL_TRAIN, "hash_size": 1000} | more
    return prepare(PreparationSettings(raw, dataset_schema=str(tmp_path / "schema.yaml"), **wanted), tmp_path / "out")


def test_a_schema_sets_the_encoding_of_some_features(tmp_path):
    yaml = """
dense: [{name: "I[12]", scale: standard}, {name: I3, transform: identity, missing_indicator: true}]
sparse:
  - {name: C3, hash_size: 40000000}
  - {name: C6, encoding: vocabulary, min_count: 2}
  - {name: "C1?", hash_size: 77}
"""
    schema = with_schema(tmp_path, yaml)
    rows = {column.name: column.num_embeddings for column in schema.sparse}
    assert list(rows) == list(reference.CATEGORIES)
    assert (rows["C3"], rows["C1"], rows["C2"], rows["C10"], rows["C19"]) == (40_000_000, 1000, 1000, 77, 77)
    assert [column.min_count for column in schema.sparse if column.encoding == "vocabulary"] == [2]
    assert [column.name for column in schema.dense if column.mean is not None] == ["I1", "I2"]
    assert [column.name for column in schema.dense][2:5] == ["I3", "I3_is_missing", "I4"]
    plain = PreparationSettings(str(tmp_path / "raw.txt"), split_fractions=ALL_TRAIN, hash_size=1000)
    assert prepare(plain, tmp_path / "plain").dense[3] == schema.dense[4]
    for row, without in zip(rows_of(tmp_path / "out"), rows_of(tmp_path / "plain"), strict=True):
        assert all(row[name] == without[name] for name in ("label", "I4", "C1", "C26"))


def test_a_schema_may_make_every_size_that_of_the_benchmark(tmp_path):
    schema = with_schema(tmp_path, "sparse: [{name: 'C*', hash_size: auto}]", max_hash_size=40_000_000)
    assert {column.num_embeddings for column in schema.sparse} == {4096}
    assert set(schema.source["estimated_keys"]) == set(reference.CATEGORIES)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("sparse: [{name: C27, hash_size: 9}]", "unknown sparse feature of criteo 'C27'. Did you mean"),
        ("dense: [C1]", "unknown dense feature of criteo 'C1'"),
        ("sparse: [{name: C1, column: C2}]", "sparse: C1 has a key that the format criteo does not let you set"),
        ("dense: [I1]\nsparse: [{name: C1, bins: 3}]", "Use only encoding, hash_size, min_count"),
        ("label: clicked\nsparse: [C1]", "sets all keys but dense and sparse"),
        ("sparse: [{name: C1, hash_size: many}]", "sparse.0.hash_size: 'many' is not allowed"),
    ],
)
def test_a_schema_sets_nothing_else(tmp_path, yaml, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        with_schema(tmp_path, yaml)
    assert str(caught.value).startswith(str(tmp_path / "schema.yaml"))
