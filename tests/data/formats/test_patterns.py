"""Names of columns as shell patterns, in every format that has names of columns."""

from pathlib import Path

import polars as pl
import pytest

from dhen.data.formats.roles import ColumnRoles, parse_roles
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import DenseColumn, Schema, SparseColumn

SCHEMA = """
label: cat_click
dense: [{name: "aff_*", transform: identity}, "n?"]
sparse: ["cat_*", {name: "tags_*", separator: "|", pooling: mean, encoding: vocabulary}, {name: at, column: n9}]
ignored: ["drop_*", aff_old]
"""
FRAME = pl.DataFrame({
    "aff_2": [1.5, 2.5], "cat_b": ["x", "y"], "aff_old": [0, 0], "aff_1": [3.0, 4.0], "cat_click": [0, 1],
    "tags_t": ["a|b", "b"], "n2": [1, 2], "n1": [3, 4], "cat_a": [7, 8], "drop_it": [1, 1], "n9": [5, 6],
})  # fmt: skip


def expanded(schema: str, *columns: str, **options: bool) -> ColumnRoles:
    return parse_roles(schema, "schema.yaml").expanded(list(columns), "log.csv", **options)


def prepared(folder: Path, kind: str, schema: str, frame: pl.DataFrame) -> Schema:
    (folder / "schema.yaml").write_text(schema)
    (folder / "set").mkdir()
    file = folder / "set" / ("train.csv" if kind == "csv" else "train.parquet")
    frame.write_csv(file) if kind == "csv" else frame.write_parquet(file)
    name, kind = (folder / "set", "hub") if kind == "hub" else (file, "auto")
    where = {"dataset_name": str(name), "dataset_format": kind, "dataset_schema": folder / "schema.yaml"}
    return prepare(PreparationSettings(**where, split_fractions=(1, 0, 0), hash_size=9), folder / "out")


@pytest.mark.parametrize("kind", ["csv", "parquet", "hub"])
def test_a_pattern_stands_for_its_columns_in_the_order_of_the_file(tmp_path, kind):
    schema = prepared(tmp_path, kind, SCHEMA, FRAME)
    numbers = [DenseColumn("aff_2", "identity"), DenseColumn("aff_1", "identity"), DenseColumn("n2"), DenseColumn("n1")]
    assert schema.dense == tuple(numbers)
    tags = SparseColumn("tags_t", 3, "vocabulary", is_multi_valued=True, pooling="mean")
    assert schema.sparse == (SparseColumn("cat_b", 9), SparseColumn("cat_a", 9), tags, SparseColumn("at", 9))
    rows = pl.read_parquet(tmp_path / "out/train/*.parquet").select("aff_2", "aff_1")
    assert rows.equals(FRAME.select(pl.col("aff_2", "aff_1").cast(pl.Float32)))


def test_a_column_whose_name_is_a_pattern_is_that_column(tmp_path):
    frame = pl.DataFrame({"a*": [1, 2], "ab": [3, 4], "what?": [0, 1], "[x]": [1, 2], "c1": [1, 2]})
    roles = 'label: "what?"\ndense: [{name: star, column: "a*"}]\nsparse: ["c*"]\nignored: ["[x]", ab]\n'
    schema = prepared(tmp_path, "csv", roles, frame)
    assert schema.dense == (DenseColumn("star"),)
    assert schema.sparse == (SparseColumn("c1", 9),)


def test_parts_weights_and_ranges_of_letters():
    schema = 'sparse: [{name: "t_*", parts: [hour, day]}, {name: g, separator: "|", weights: t_w}, "C[1-3]"]'
    roles = expanded(schema, "t_a", "t_w", "C3", "C4", "g", "t_b", "label")
    names = [(feature.name, feature.source) for feature in roles.sparse]
    hours, days = ([(f"{name}_{part}", name) for name in ("t_a", "t_b")] for part in ("hour", "day"))
    assert names == [*hours, *days, ("g", "g"), ("C3", "C3")]


def test_two_patterns_of_one_role_may_match_the_same_column():
    roles = expanded('sparse: ["a*", "*z"]\nignored: "*"', "az", "ab", "bz", "label")
    assert [feature.name for feature in roles.sparse] == ["az", "ab", "bz"]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('sparse: [x, "cat_*"]', r"the pattern 'cat_\*' under sparse matches no column .* The columns are x, N1, n1"),
        ('sparse: [x]\ndense: ["label*"]', r"'label\*' under dense matches no column that is not named elsewhere"),
        ('sparse: [x]\ndense: ["X*"]', r"'X\*' under dense matches no column"),
        ('dense: ["n*"]\nsparse: ["?1"]', r"the column 'n1' matches 'n\*' under dense and '\?1' under sparse\. Name"),
        ('dense: ["n*"]\nignored: ["*"]', r"the column 'n1' matches 'n\*' under dense and '\*' under ignored"),
        ('sparse: ["n*", {name: "?1", min_count: 2}]', "the feature 'n1' appears twice"),
        ('sparse: [x]\nignored: ["y*"]', r"the pattern 'y\*' under ignored matches no column"),
        ('sparse: ["a*"]', r"'a\.b' is not allowed as a feature name"),
        ('dense: ["[*]"]', r"'\[\*\]' is not allowed as a feature name, .* \{name: new, column: \[\*\]\}"),
    ],
)
def test_a_pattern_that_does_not_fit_is_one_line_with_the_file(schema, message):
    with pytest.raises(ValueError, match=rf"^log\.csv: .*{message}") as caught:
        expanded(schema, "x", "N1", "n1", "a.b", "[*]", "label")
    assert "\n" not in str(caught.value)


def test_data_to_predict_may_lack_the_ignored_columns():
    roles = expanded('sparse: [x]\nignored: ["later_*"]', "x", is_label_required=False)
    assert roles.ignored == ()


def test_libsvm_has_no_patterns(tmp_path):
    (tmp_path / "schema.yaml").write_text('sparse: ["1*"]\n')
    (tmp_path / "log.libsvm").write_text("1 1:1 2:1\n")
    given = PreparationSettings(str(tmp_path / "log.libsvm"), dataset_schema=tmp_path / "schema.yaml")
    with pytest.raises(ValueError, match="libsvm files do not support patterns"):
        prepare(given, tmp_path / "out")
