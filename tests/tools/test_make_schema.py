"""tools/make_schema.py: the schema that it writes prepares the data."""

import functools
import gzip
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import Schema
from tests import SHARED_DATA
from tests.tools import forked_python

call = functools.partial(forked_python.call, "tools/make_schema.py")
RNG = np.random.default_rng(0)
ROWS = 400
FRAME = pl.DataFrame({
    "request": [f"r{i}" for i in range(ROWS)],
    "clicked": ["yes", "no", "no", "no"] * (ROWS // 4),
    "price": RNG.lognormal(3, 1, ROWS).round(2),
    "user_id": RNG.integers(0, 90, ROWS),
    "stock": RNG.integers(0, 300, ROWS),
    "seen": pl.datetime_range(pl.datetime(2024, 1, 1), pl.datetime(2024, 1, 17, 15), "1h", eager=True),
    "topics": RNG.choice(["news", "news|sports", "sports|travel|music"], ROWS),
    "version": ["v1"] * ROWS,
})  # fmt: skip
SCHEMA = """\
# Guessed from the first 400 rows of 'log.csv'. Check it before you train.
label: {column: clicked, positive: 'yes'}  # 25.0% clicks
dense: [  # numbers
  price,
  stock,  # doubtful: whole numbers; codes belong under sparse
]
sparse: [  # categories
  user_id, {name: seen, parts: [hour, weekday]},
  {name: topics, separator: '|'},  # lists, by their separator
]
ignored: [  # not used
  request,  # another value in every row, so it says nothing about new rows
  version,  # always the same value
]
"""


def schema_of(file: Path, *arguments: object) -> str:
    result = call(file, *arguments)
    assert result.status == 0, result.stderr
    return result.stdout


def prepared(file: Path | str, schema: str, folder: Path) -> Schema:
    (folder / "schema.yaml").write_text(schema)
    settings = PreparationSettings(str(file), dataset_schema=folder / "schema.yaml", split_fractions=(1, 0, 0))
    return prepare(settings, folder / "out")


def names(schema: Schema) -> tuple[list[str], list[str]]:
    return [column.name for column in schema.dense], [column.name for column in schema.sparse]


def test_the_schema_is_short_has_comments_and_prepares_the_data(tmp_path):
    FRAME.write_csv(tmp_path / "log.csv", datetime_format="%Y-%m-%d %H:%M:%S")
    text = schema_of(tmp_path / "log.csv", "--label", "clicked")
    assert text == SCHEMA
    schema = prepared(tmp_path / "log.csv", text, tmp_path)
    assert schema.splits["train"].clicks == (FRAME["clicked"] == "yes").sum()
    assert names(schema) == (["price", "stock"], ["user_id", "seen_hour", "seen_weekday", "topics"])
    assert schema.sparse[-1].is_multi_valued


def test_parquet_has_the_same_schema(tmp_path):
    frame = FRAME.with_columns(pl.col("topics").str.split("|"))
    frame.write_parquet(tmp_path / "log.csv", row_group_size=70)
    text = schema_of(tmp_path / "log.csv", "--label", "clicked")
    in_lists = "user_id, {name: seen, parts: [hour, weekday]}, {name: topics, multi_valued: true}]  # categories"
    before, _, after = SCHEMA.partition("sparse: [")
    assert text == f"{before}sparse: [{in_lists}\n{after[after.index('ignored') :]}"
    assert prepared(tmp_path / "log.csv", text, tmp_path).splits["train"].rows == ROWS


def test_columns_with_a_common_prefix_become_a_pattern(tmp_path):
    columns = {f"aff_{i}": RNG.random(60) for i in range(20)} | {f"cat_{i}": RNG.integers(0, 9, 60) for i in range(9)}
    frame = pl.DataFrame({"cat": RNG.integers(0, 2, 60)} | columns | {"b_1": [0.5, 1] * 30, "b_2": [1, 2] * 30}
                         | {f"mix_{i}": [i + 0.5, 1] * 30 for i in range(5)} | {"mix_5": ["u", "v"] * 30})  # fmt: skip
    frame.write_csv(tmp_path / "log.csv")
    text = schema_of(tmp_path / "log.csv", "--label", "cat")
    mixed = [f"mix_{i}" for i in range(5)]
    assert text.splitlines()[2:] == [
        f"dense: [aff_*, b_1, {', '.join(mixed)}]  # numbers", "sparse: [cat_*, b_2, mix_5]  # categories"
    ]  # fmt: skip
    schema = prepared(tmp_path / "log.csv", text, tmp_path)
    assert names(schema) == ([*list(columns)[:20], "b_1", *mixed], [*list(columns)[20:], "b_2", "mix_5"])


@pytest.mark.parametrize("delimiter", ["\t", ";", "|"])
def test_the_delimiter_and_words_for_blank_are_found(tmp_path, delimiter):
    rows = [(str(i % 2), f"{i / 8}" if i % 3 else "NA", "a, b" if i % 5 else "c") for i in range(60)]
    text = "".join(delimiter.join(row) + "\n" for row in [("y", "n", "k"), *rows])
    (tmp_path / "log.tsv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    text = schema_of(tmp_path / "log.tsv.gz", "--label", "y")
    schema = prepared(tmp_path / "log.tsv.gz", text, tmp_path)
    assert names(schema) == (["n"], ["k"])
    assert (pl.read_parquet(tmp_path / "out/train/*.parquet")["n"] == 0).sum() == 20, "blanks"


def test_columns_whose_names_cannot_name_features_are_renamed(tmp_path):
    odd = ["", "type", "label", "a.b", "a*", "x/y", "größe", " z", "-", "yes", "1"]
    pl.DataFrame({"y": [0, 1] * 30} | {name: ["u", "v", "w"] * 20 for name in odd}).write_csv(tmp_path / "log.csv")
    text = schema_of(tmp_path / "log.csv", "--label", "y")
    _, sparse = names(prepared(tmp_path / "log.csv", text, tmp_path))
    renamed = ["feature_type", "feature_label", "a_b", "a_", "x_y", "gr_e", "feature_z", "feature_-"]
    assert sparse == [*renamed, "yes", "1"]


def test_the_label_is_what_the_user_says(tmp_path):
    pl.DataFrame({"y": [1, 2, 3, 4, 5] * 12, "k": ["a", "b", "c"] * 20}).write_csv(tmp_path / "log.csv")
    for i, (given, clicks) in enumerate([(("--greater_than", 3), 24), (("--positive", 2), 12)]):
        text = schema_of(tmp_path / "log.csv", "--label", "y", *given)
        (tmp_path / str(i)).mkdir()
        assert prepared(tmp_path / "log.csv", text, tmp_path / str(i)).splits["train"].clicks == clicks


def test_the_output_is_a_file_that_is_not_overwritten(tmp_path):
    FRAME.write_csv(tmp_path / "log.csv")
    arguments = (tmp_path / "log.csv", "--label", "clicked", "--rows", 50, "--output", tmp_path / "schema.yaml")
    assert call(*arguments).status == 0
    written = (tmp_path / "schema.yaml").read_text()
    assert written.startswith("# Guessed from the first 50 rows of 'log.csv'.")
    again = call(*arguments)
    assert again.status == 1
    assert "schema.yaml: the file exists. Remove it or choose another name." in again.stderr


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"y,click,user\n1,0,a\n", ("--label", "clik"), "unknown column 'clik'. Did you mean 'click'? Allowed: click,"),
        (
            b"1,0.5,a\n0,0.25,b\n",
            ("--label", "y"),
            "no column 'y', and the first line looks like a row: 1, 0.5, a. Put",
        ),
        (b"y,a,a\n1,0,0\n", ("--label", "y"), "two columns are named 'a'"),
        (b"y,a\n", ("--label", "y"), "there are no rows below the header"),
        (b"", ("--label", "y"), "the file is empty"),
        (b"y,a\n1,2,3\n0\n1\n", ("--label", "y"), "row 2: the row has 3 columns, not 2"),
        (b"y,a\n1,x\n0,x\n", ("--label", "y"), "there are no features"),
        (b"y,a\n3,x\n4,z\n", ("--label", "y"), "column 'y': the label is '3', '4'. Pass --positive VALUE"),
        (b"y,a\n1,x\n0,z\n", ("--label", "y", "--positive", "2"), "the label makes no row a click"),
        (b"y,a.b,a_b\n1,x,z\n0,z,x\n", ("--label", "y"), "the feature 'a_b' appears twice. Use a different name"),
        (b"PK\x03\x04\x00", ("--label", "y"), "this is a zip archive"),
        (b"PAR1\x15\x00", ("--label", "y"), "not a complete Parquet file"),
        (None, ("--label", "y"), "no such file"),
    ],
)
def test_a_mistake_is_one_line_with_the_file(tmp_path, content, arguments, message):
    if content is not None:
        (tmp_path / "log.csv").write_bytes(content)
    result = call(tmp_path / "log.csv", *arguments)
    assert result.status == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("make_schema: ")
    assert "log.csv" in line
    assert message in line


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no real data at {SHARED_DATA}: it may not be redistributed")
@pytest.mark.parametrize(
    ("name", "label", "num_dense", "num_sparse"),
    [("flights/test", "label", 5, 10), ("adult/test", "label", 6, 8), ("frappe/test", "label", 0, 10),
     ("avazu/sample_2994", "click", 0, 22)],
)  # fmt: skip
def test_real_data_sets_have_the_roles_that_people_give_them(tmp_path, name, label, num_dense, num_sparse):
    file = SHARED_DATA / f"{name}.csv.gz"
    text = schema_of(file, "--label", label)
    dense, sparse = names(prepared(file, text, tmp_path))
    assert (len(dense), len(sparse)) == (num_dense, num_sparse), text
    assert len(text.splitlines()) <= 10
