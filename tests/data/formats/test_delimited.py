"""Delimited text with a YAML schema, and the schema's own errors."""

import csv
from pathlib import Path
from types import MappingProxyType

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dhen.data.formats.column_role import DenseRole, LabelRole, SparseRole
from dhen.data.formats.delimited import DelimitedReader
from dhen.data.formats.raw_rows import DataError
from dhen.data.formats.roles import ColumnRoles, load_roles
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import DenseColumn, SparseColumn
from tests.data.preparation.reference_preparation import hashed_id, log1p

SCHEMA = """
label: click
dense: [price, {name: years, column: age, transform: identity}]
sparse:
  - user
  - {name: genres, separator: "|", pooling: mean}
  - {name: tags, separator: "|", weights: tag_weights}
  - {name: hour, column: time, characters: [6, 8]}
ignored: [comment]
"""
HEADER = "click,price,age,user,genres,tags,tag_weights,time,comment"
ROWS = [
    "1,9.5,31,anna,7|12,a|b,0.5|2,14102107,fine",
    '0,,,"b,ob",,,,,""',
    "0,-3,5,,9||7,c,1,14102123,x",
]


def folder_with(tmp_path, text, schema=SCHEMA, name="raw.csv"):
    raw = tmp_path / name
    raw.write_bytes(text.encode() if isinstance(text, str) else text)
    (tmp_path / "schema.yaml").write_text(schema)
    return {"dataset_name": str(raw), "dataset_schema": tmp_path / "schema.yaml", "split_fractions": (1, 0, 0)}


def prepared(tmp_path, text, schema=SCHEMA, **options):
    out = tmp_path / "out"
    made = prepare(PreparationSettings(**folder_with(tmp_path, text, schema), hash_size=50, **options), out)
    return made, pl.read_parquet(out / "train" / "*.parquet").to_dicts()


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 20])
def test_every_role_equals_plain_python(tmp_path, mark, end, block_bytes):
    schema, rows = prepared(tmp_path, mark + end.join([HEADER, *ROWS]), block_bytes=block_bytes)

    def row(label, price, years, user, genres, tags, weights, hour):
        return {
            "label": label,
            "price": pytest.approx(log1p(price)),
            "years": years,
            "user": hashed_id(user, "user", 50),
            "genres": [hashed_id(key, "genres", 50) for key in genres],
            "tags": [hashed_id(key, "tags", 50) for key in tags],
            "tags:weights": weights,
            "hour": hashed_id(hour, "hour", 50),
        }

    assert rows == [
        row(1.0, "9.5", 31.0, "anna", ["7", "12"], ["a", "b"], [0.5, 2.0], "07"),
        row(0.0, "", 0.0, "b,ob", [], [], [], ""),
        row(0.0, "-3", 5.0, "", ["9", "7"], ["c"], [1.0], "23"),
    ]
    assert schema.dense == (DenseColumn("price"), DenseColumn("years", "identity"))
    assert schema.sparse[1] == SparseColumn("genres", 50, is_multi_valued=True, pooling="mean")
    assert schema.sparse[2] == SparseColumn("tags", 50, is_multi_valued=True, is_weighted=True)


BAD_ROWS = [
    ("1,x,31,anna,7,a,1,14102107,", "column 'price': 'x' is not a finite number"),
    ("1,1e39,31,anna,7,a,1,14102107,", "column 'price': '1e39' is not a finite number up to 3.4e38"),
    ("1,1,31,anna,7,a|b,1|-1e39,14102107,", "column 'tag_weights': a weight is not a finite number"),
    ("1,inf,31,anna,7,a,1,14102107,", "column 'price': 'inf' is not a finite number"),
    ("yes,1,31,anna,7,a,1,14102107,", "column 'click': the label is 'yes'; it must be 0 or 1"),
    ("1,1,31,anna,7,a|b,1,14102107,", "column 'tags' has 2 ids, but 'tag_weights' has 1 weights"),
    ("1,1,31,anna,7,a|b,1|y,14102107,", "column 'tag_weights': a weight is not a finite number"),
    ("1,1,31", "the row has 3 columns, not 9"),
    ('1,1,31,"anna,7,a,1,14102107,', 'a quote (") is misplaced or not closed'),
    ('1,1,31,5" pipe,7,a,1,14102107,', 'a quote (") is misplaced or not closed'),
    ('1,1,31,a",",b,7,a,1', 'a quote (") is misplaced or not closed'),
    ('1,1,31,"a" b"c,",a,1,14102107,', 'a quote (") is misplaced or not closed'),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_named_or_skipped(tmp_path, row, message):
    text = "\n".join([HEADER, ROWS[0], row, ROWS[1], ROWS[2]])
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, text)
    assert f"raw.csv: row 3: {message}" in str(caught.value)
    schema, rows = prepared(tmp_path, text, bad_rows="skip")
    assert len(rows) == 3
    assert schema.splits["train"].bad_rows == 1
    assert [len(one["tags"]) for one in rows] == [2, 0, 1]
    assert pl.read_csv(tmp_path / "out" / "bad_rows.csv")["row"].to_list() == [3]


CELL = st.text(st.sampled_from('ab,"\u00e9\n'), max_size=5)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8), block_bytes=st.integers(1, 60))
def test_quoted_values_are_those_that_the_csv_module_wrote(tmp_path_factory, rows, block_bytes):
    path = tmp_path_factory.mktemp("quoted") / "raw.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("label", "a", "b"), *((1, *row) for row in rows)])
    roles = ColumnRoles(sparse=(SparseRole("a"), SparseRole("b")))
    chunks = list(DelimitedReader(roles, block_bytes=block_bytes).chunks(str(path)))
    assert not any(chunk.bad for chunk in chunks)
    actual = [(row["a"] or "", row["b"] or "") for chunk in chunks for row in chunk.table.to_pylist()]
    assert actual == rows
    lines = [1 + path.read_text()[:at].count("\n") for at in starts_of_rows(path)]
    assert [number for chunk in chunks for number in chunk.rows] == lines[1:], "the first line of each row"


def starts_of_rows(path: Path) -> list[int]:
    """Where each row of a well-formed CSV starts."""
    text, is_quoted, starts = path.read_text(), False, [0]
    for at, letter in enumerate(text[:-1]):
        is_quoted ^= letter == '"'
        if letter == "\n" and not is_quoted:
            starts.append(at + 1)
    return starts


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.text(st.sampled_from('a,"'), min_size=1, max_size=8), min_size=1, max_size=8))
def test_stray_quotes_shift_no_row(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("stray") / "raw.csv"
    path.write_text("label,a,b\n" + "".join(f"{line}\n1,x,y\n" for line in lines))
    roles = ColumnRoles(sparse=(SparseRole("a"), SparseRole("b")))

    def outcome(block_bytes):
        chunks = list(DelimitedReader(roles, block_bytes=block_bytes).chunks(str(path)))
        texts = "".join(str(row) for chunk in chunks for row in chunk.table.to_pylist())
        return [row for chunk in chunks for row in chunk.rows], [bad for chunk in chunks for bad in chunk.bad], texts

    assert outcome(1) == outcome(1 << 20)
    rows, bad, texts = outcome(1)
    texts += "".join(repr(bad_row.text) for bad_row in bad)
    lost = {3 + 2 * i for i in range(len(lines))} - set(rows)
    assert len(lost) == texts.count("\\n1,x,y"), "a row is only lost inside the quotes of another one with 3 values"


class TextReader(DelimitedReader):
    """Reads all columns as text first."""

    number_types = MappingProxyType({})


ODD_NUMBERS = [
    "0x1F",
    "0X1f",
    "1_0",
    "+5",
    " 5 ",
    "5\u00a0",
    "1e5",
    "1e400",
    "NaN",
    "nan(1)",
    "NAN(2)",
    "-inf",
    "007",
    "-0",
    "1.",
    ".5",
]


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.tuples(*[st.sampled_from(["", "1", "0", "-7.25", "NA", *ODD_NUMBERS])] * 2), min_size=1, max_size=5
    )
)
@example([("1", "nan(1)")])
def test_numbers_are_those_of_their_text(tmp_path_factory, rows):
    """Values, bad rows, and how these are quoted."""
    path = tmp_path_factory.mktemp("numbers") / "raw.csv"
    path.write_text("".join(f"{label}|{number}|x\n" for label, number in rows), encoding="utf-8")
    roles = ColumnRoles(
        LabelRole("y", greater_than=2), (DenseRole("n"),), (SparseRole("k"),), delimiter="|", header=False,
        columns=("y", "n", "k"), null_values=("NA",),
    )  # fmt: skip
    (quick, *_), (slow, *_) = (reader(roles).chunks(str(path)) for reader in (DelimitedReader, TextReader))
    assert repr(quick.table.to_pydict()) == repr(slow.table.to_pydict()), "repr, because NaN equals nothing"
    assert quick.bad == slow.bad
    assert quick.rows.tolist() == slow.rows.tolist()


def test_a_label_that_is_compared_as_text_is_read_as_text(tmp_path):
    """Though a task compares the same column as a number."""
    (tmp_path / "raw.csv").write_text("y,n\n007,1\n7,1\n")
    tasks = {"more": {"column": "y", "greater_than": 3}}
    roles = ColumnRoles(LabelRole("y", positive="7"), (DenseRole("n"),), tasks=tasks)
    (chunk, *_) = DelimitedReader(roles).chunks(str(tmp_path / "raw.csv"))
    assert (chunk.table["label"].to_pylist(), chunk.table["more:label"].to_pylist()) == ([0, 1], [1, 1])


def test_an_empty_text_is_one_blank_id_if_null_values_lack_it(tmp_path):
    """As it is in a Parquet file."""
    (tmp_path / "raw.csv").write_text("label,n,k\n1,,\n1,NA,NA\n")
    roles = ColumnRoles(dense=(DenseRole("n"),), sparse=(SparseRole("k", separator="|"),), null_values=("NA",))
    (chunk, *_) = DelimitedReader(roles).chunks(str(tmp_path / "raw.csv"))
    assert (chunk.table["n"].to_pylist(), chunk.table["k"].to_pylist()) == ([None, None], [[None], []])


@pytest.mark.parametrize("ragged", [False, True])
def test_a_row_longer_than_what_is_parsed_at_a_time(tmp_path, ragged):
    """Within one block. A bad row far behind the first part is named by its own number."""
    long, rows = "x" * (3 << 20), [f"0,{i},b{i}" for i in range(200_000)]
    rows[100] = f"1,{long},b"
    if ragged:
        rows[199_000] = "1,2"
    (tmp_path / "raw.csv").write_text("\n".join(["label,a,b", *rows]))
    roles = ColumnRoles(sparse=(SparseRole("a"), SparseRole("b")))
    (chunk, *others) = DelimitedReader(roles, block_bytes=64 << 20).chunks(str(tmp_path / "raw.csv"))
    assert not any(other.table.num_rows for other in others)
    assert [bad.row for bad in chunk.bad] == ([199_002] if ragged else [])
    assert chunk.table.num_rows == 200_000 - ragged
    assert chunk.table["a"][100].as_py() == long
    assert chunk.table["b"][-1].as_py() == "b199999"


def test_without_header_and_with_its_own_words_for_blank(tmp_path):
    schema = """
header: false
columns: [y, n, k]
delimiter: ";"
null_values: ["", "NA"]
label: y
dense: [n]
sparse: [{name: k, encoding: vocabulary, min_count: 2}]
"""
    made, rows = prepared(tmp_path, "1;NA;a\n0;1;a\n0;2;NA\n1;3;b\n", schema)
    assert [row["k"] for row in rows] == [1, 1, 0, 0]
    assert [row["n"] for row in rows] == pytest.approx([0, log1p("1"), log1p("2"), log1p("3")])
    assert made.sparse == (SparseColumn("k", 2, "vocabulary", 2),)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("click,price,age,usr,genres,tags,tag_weights,time,comment", "no column 'user'.*Did you mean 'usr'"),
        (HEADER + ",more", "the column 'more' has no role"),
        (HEADER.replace("comment", "user"), "two columns are named 'user'"),
        (HEADER.replace("click", "y"), "no column 'click'"),
    ],
)
def test_a_header_that_does_not_fit_the_schema_is_refused(tmp_path, header, message):
    with pytest.raises(ValueError, match=rf"raw\.csv: .*{message}"):
        prepared(tmp_path, "\n".join([header, *ROWS]))


def test_labels_may_be_absent_where_they_are_not_required(tmp_path):
    text = "\n".join(line.split(",", 1)[1] for line in [HEADER, *ROWS])
    schema, rows = prepared(tmp_path, text, is_label_required=False)
    assert schema.splits["train"].unlabelled == 3
    assert all(row["label"] != row["label"] for row in rows)


def test_a_header_alone_is_no_data(tmp_path):
    with pytest.raises(DataError, match="the split train has no rows"):
        prepared(tmp_path, HEADER + "\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lable: y\nsparse: [a]", "unknown key 'lable'.* Did you mean 'label'"),
        ("label: y", "there are no features"),
        ("sparse: [a, a]", "the feature 'a' appears twice"),
        ("sparse: [a/b]", "'a/b' is not allowed as a feature name"),
        ("sparse: [label]", "'label' is not allowed as a feature name"),
        ("sparse: [{name: a, pool: sum}]", r"sparse\.0\.pool"),
        ("sparse: [{name: a, pooling: max}]", r"sparse\.0\.pooling"),
        ("sparse: [{name: a, hash_size: 1}]", r"sparse\.0\.hash_size: 1 is not allowed. Use a whole number from 2"),
        ("sparse: [{name: a, hash_size: 0}]", r"sparse\.0\.hash_size: 0 is not allowed. Use a whole number from 2"),
        ("sparse: [{name: a, min_count: 0}]", r"sparse\.0\.min_count is 0. Use 1 or more"),
        ("sparse: [{name: a, min_count: -2}]", r"sparse\.0\.min_count is -2. Use 1 or more"),
        ("sparse: [{name: a, characters: [2, 1]}]", r"the characters of 'a' are \[2, 1\]"),
        ("sparse: [{name: a, characters: [-1, 1]}]", r"the characters of 'a' are \[-1, 1\]"),
        (
            "sparse: [{name: a, encoding: vocabulary, hash_size: 9}]",
            "'a' has a hash_size, but the encoding vocabulary does not use it",
        ),
        ("sparse: [u.v]", r"'u\.v' is not allowed as a feature name.*{name: new, column: u\.v}"),
        ("sparse: [type]", "'type' is not allowed as a feature name.*{name: new, column: type}"),
        ("label: click\nsparse: [a, click]", "'click' uses the column 'click', which is a label"),
        (
            "label: click\nsparse: [a]\ndense: [{name: b, column: click}]",
            "'b' uses the column 'click', which is a label",
        ),
        ("sparse: a", "sparse is 'a'. Use a list"),
        ("sparse: [a]\ndelimiter: '||'", "Use a single ASCII character"),
        ("- a", "expected a mapping from keys to values, got a list"),
        ("sparse: [a", "not valid YAML"),
    ],
)
def test_a_wrong_schema_names_file_and_key(tmp_path, text, message):
    path = tmp_path / "schema.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"schema\.yaml: .*{message}"):
        load_roles(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_roles(tmp_path / "none.yaml")


def test_chunks_are_bounded_whatever_the_file(tmp_path):
    line = ROWS[0] + "\n"
    where = folder_with(tmp_path, HEADER + "\n" + line * 20_000)
    chunks = list(
        DelimitedReader(load_roles(where["dataset_schema"]), block_bytes=10_000).chunks(where["dataset_name"])
    )
    assert sum(len(chunk.rows) for chunk in chunks) == 20_000
    assert max(len(chunk.rows) for chunk in chunks) <= 10_000 // len(line) + 1
