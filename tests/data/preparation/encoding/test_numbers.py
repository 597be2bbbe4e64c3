"""Bins, scales and missing indicators of numbers, against NumPy's formulas; they are fitted to the train split only."""

import math

import numpy as np
import polars as pl
import pyarrow.parquet
import pytest

from dhen.data.formats.raw_rows import DataError
from dhen.data.formats.roles import parse_roles
from dhen.data.preparation.encoding import numbers
from dhen.data.preparation.encoding.vocabulary import load_vocabulary
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import DenseColumn, Schema, SparseColumn

ROLES = """
dense:
  - {name: age, transform: identity, scale: standard, missing_indicator: true}
  - {name: income, scale: standard}
  - {name: same, scale: standard}
  - plain
sparse:
  - {name: age_bin, column: age, bins: 7}
  - {name: age_id, column: age}
  - {name: income_bin, column: income, bins: 20}
  - {name: same_bin, column: same, bins: 5}
"""
LARGEST = float(np.finfo(np.float32).max)


def write_rows(path, seed, rows=500, shift=0.0, same=7.0):
    """age: whole numbers with blanks. income: skewed, 60% zeros. In a text, whole numbers are `7` or `7.0`."""
    rng = np.random.default_rng(seed)
    age = np.where(rng.random(rows) < 0.1, np.nan, rng.integers(18, 60, rows) + shift)
    income = np.where(rng.random(rows) < 0.6, 0, rng.lognormal(8, 1, rows).round(3)) + shift
    columns = {"age": age, "income": income, "same": np.full(rows, same), "plain": rng.normal(size=rows)}
    columns = {"label": rng.integers(0, 2, rows)} | columns
    if path.suffix == ".parquet":
        pl.DataFrame(columns).with_columns(pl.col("age").fill_nan(None)).write_parquet(path)
    else:
        texts = [
            [_text(value, odd=row % 2) for value in column]
            for row, column in enumerate(zip(*columns.values(), strict=True))
        ]
        path.write_text("\n".join(",".join(row) for row in [list(columns), *texts]) + "\n")
    return columns


def _text(value, *, odd):
    return "" if math.isnan(value) else str(int(value)) if value == int(value) and odd else repr(float(value))


def prepared(folder, columns_yaml=ROLES, suffix=".csv", shift=0.0, name="out", **more):
    """Prepare train and test rows; the test's ones go beyond the range of train. Returns (schema, tables, raw rows)."""
    (folder / "schema.yaml").write_text(columns_yaml)
    raw = {"train": write_rows(folder / f"train{suffix}", 1, shift=shift)}
    raw["test"] = write_rows(folder / f"test{suffix}", 2, 200, shift=shift + 30.0, same=8.0)
    files = {f"{split}_file": str(folder / f"{split}{suffix}") for split in raw}
    schema = prepare(PreparationSettings(**files, dataset_schema=folder / "schema.yaml", **more), folder / name)
    return schema, {split: pl.read_parquet(folder / name / split / "*.parquet") for split in raw}, raw


def expected_ids(values, edges):
    return [0 if math.isnan(value) else 1 + sum(edge < value for edge in edges) for value in values]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_numbers_are_binned_scaled_and_marked_by_the_train_split(tmp_path, suffix, caplog):
    caplog.set_level("INFO", "dhen")
    schema, tables, raw = prepared(tmp_path, suffix=suffix)
    assert [column.name for column in schema.dense] == ["age", "age_is_missing", "income", "same", "plain"]
    train = raw["train"]
    for name, bins in (("age", 7), ("income", 20)):
        values = train[name][~np.isnan(train[name])]
        edges = np.unique([np.quantile(values, k / bins) for k in range(1, bins)])
        for split, table in tables.items():
            assert table[f"{name}_bin"].to_list() == expected_ids(raw[split][name], edges)
        (column,) = [column for column in schema.sparse if column.name == f"{name}_bin"]
        assert column == SparseColumn(f"{name}_bin", len(edges) + 2, "bins", bins=bins, edges=tuple(edges))
        assert column.num_embeddings == (bins + 1 if name == "age" else tables["train"]["income_bin"].max() + 1)
    assert tables["test"]["age_bin"].max() == 7, "beyond the range of train is in the outer bin"
    for name, change in (("age", lambda x: x), ("income", np.log1p)):
        fitted = change(train[name][~np.isnan(train[name])])
        for split, table in tables.items():
            scaled = (change(raw[split][name]) - fitted.mean()) / fitted.std()
            np.testing.assert_allclose(table[name], np.nan_to_num(scaled, nan=0.0), rtol=1e-5, atol=1e-6)
    for split, table in tables.items():
        assert table["age_is_missing"].to_list() == np.isnan(raw[split]["age"]).astype(float).tolist()
        assert table["same"].to_list() == [0.0] * len(table)
        assert table["same_bin"].to_list() == [1] * len(table)
        plain = raw[split]["plain"]
        np.testing.assert_allclose(table["plain"], np.sign(plain) * np.log1p(np.abs(plain)), rtol=1e-6)
    said = [record.message for record in caplog.records if "same" in record.message]
    assert said == [
        "same: blank or the same number in every training row, so its scaled value is always 0",
        "same_bin: blank or the same number in every training row, so its numbers make one bin",
    ]


def test_a_column_is_a_number_and_an_id_however_it_is_spelt(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "parquet").mkdir()
    _, text, raw = prepared(tmp_path / "text")
    _, parquet, _ = prepared(tmp_path / "parquet", suffix=".parquet")
    written = (tmp_path / "text/train.csv").read_text()
    assert ",7.0," in written
    assert ",7," in written
    keys = {key: 1 + at for at, key in enumerate(load_vocabulary(tmp_path / "text/out", "age_id").keys.to_pylist())}
    assert sorted(map(int, keys)) == sorted({int(age) for age in raw["train"]["age"] if not math.isnan(age)})
    for split in text:
        wanted = [0 if math.isnan(age) else keys.get(str(int(age)), 0) for age in raw[split]["age"]]
        assert text[split]["age_id"].to_list() == wanted
        assert text[split].equals(parquet[split])


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_only_the_train_rows_of_a_split_file_are_fitted(tmp_path, order):
    (tmp_path / "all.csv").write_text("label,x\n" + "".join(f"{row % 2},{row}\n" for row in range(400)))
    (tmp_path / "schema.yaml").write_text("""
dense: [{name: x, transform: identity}, {name: scaled, column: x, transform: identity, scale: standard}]
sparse: [{name: x_bin, column: x, bins: 4}]
""")
    settings = {"dataset_schema": tmp_path / "schema.yaml", "split_order": order, "split_fractions": (0.5, 0.2, 0.3)}
    schema = prepare(PreparationSettings(str(tmp_path / "all.csv"), **settings), tmp_path / "out")
    train = pl.read_parquet(tmp_path / "out/train/*.parquet")["x"].to_numpy().astype(float)
    assert 150 < len(train) < 250
    assert schema.sparse[0].edges == pytest.approx(tuple(np.quantile(train, (0.25, 0.5, 0.75))))
    assert (schema.dense[1].mean, schema.dense[1].std) == pytest.approx((train.mean(), train.std()))


def test_the_size_of_the_blocks_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(numbers, "_BLOCK_VALUES", 64)
    monkeypatch.setattr(numbers, "MOST_VALUES", 100)
    whole, tables, _ = prepared(tmp_path)
    blocks, others, _ = prepared(tmp_path, name="blocks", block_bytes=700)
    assert (whole.dense, whole.sparse) == (blocks.dense, blocks.sparse)
    assert all(tables[split].equals(others[split]) for split in tables)


def test_the_fit_of_a_trained_model_is_kept(tmp_path):
    schema, *_ = prepared(tmp_path)
    (tmp_path / "later").mkdir()
    files = tmp_path / "later"
    of_schema, later, raw = prepared(files, shift=100.0, schema_from=tmp_path / "out", is_label_required=False)
    like, tuned, _ = prepared(files, shift=100.0, name="like", like=tmp_path / "out")
    anew, _, _ = prepared(files, shift=100.0, name="anew")
    age_bin = next(column for column in schema.sparse if column.name == "age_bin")
    for found, rows in ((of_schema, later), (like, tuned)):
        assert found.dense == schema.dense != anew.dense
        assert [c for c in found.sparse if c.bins] == [c for c in schema.sparse if c.bins]
        assert rows["train"]["age_bin"].to_list() == expected_ids(raw["train"]["age"], age_bin.edges)
        assert sorted(rows["train"]["age_bin"].unique()) == [0, 7], "all beyond, or blank"
    changed = ROLES.replace("bins: 7", "bins: 8").replace("{name: income, s", "{name: income, transform: identity, s")
    other, _, _ = prepared(files, changed, shift=100.0, name="other", like=tmp_path / "out")
    old, new = ({c.name: c for c in (*s.dense, *s.sparse)} for s in (schema, other))
    assert {name for name in old if old[name] != new[name] and name != "age_id"} == {"age_bin", "income"}
    assert new["age_bin"].edges[0] > 100
    assert new["income"].mean > 100
    with pytest.raises(DataError, match="'age_bin' is sparse with bins, but the raw data has it as sparse"):
        prepared(files, ROLES.replace(", bins: 7", ""), name="x", schema_from=tmp_path / "out")
    # A schema without the indicator and the scale still gives the model what it was trained with.
    plain = ROLES.replace(", scale: standard", "").replace(", missing_indicator: true", "")
    assert prepared(files, plain, shift=100.0, name="plain", schema_from=tmp_path / "out")[0].dense == schema.dense


def test_quantiles_of_a_sample_are_near_the_exact_ones(monkeypatch):
    monkeypatch.setattr(numbers, "MOST_VALUES", 20_000)
    values = np.random.default_rng(0).lognormal(size=150_000)
    fit = numbers.BinFit(10)
    for some in np.array_split(values, 17):
        fit.add(some)
        assert len(fit._values) <= 20_000
    assert len(fit._values) > 10_000
    shares = np.diff([0, *(np.mean(values <= edge) for edge in fit.result("x")), 1])
    assert len(shares) == 10
    # Four standard errors of a tenth in 10,000 draws.
    np.testing.assert_allclose(shares, 0.1, atol=4 * np.sqrt(0.09 / 10_000))
    assert not np.allclose(shares, 0.1, atol=1e-5), "this was not a sample"


@pytest.mark.parametrize(
    ("counts", "edges"),
    [({0: 1, 1: 99}, (0,)), ({0: 99, 1: 1}, (0,)), ({1: 30, 2: 20, 9: 50}, (1, 2)), ({3: 9}, ()), ({}, ())],
)
def test_a_frequent_largest_value_has_a_bin_of_its_own(counts, edges):
    fit = numbers.BinFit(4)
    fit.add(np.repeat(np.array(list(counts), dtype=float), list(counts.values())))
    assert fit.result("x") == edges


def test_a_scale_is_exact_for_a_constant_and_far_from_zero():
    for constant in (0.1, 1e30, -7.7):
        fit = numbers.ScaleFit("identity")
        for _ in range(7):
            fit.add(np.full(33_333, constant))
        assert fit.result("x") == (pytest.approx(constant, rel=1e-15), 0.0)
    values = 1e9 + np.random.default_rng(0).normal(size=200_001)
    fit = numbers.ScaleFit("identity")
    fit.add(values)
    assert fit.result("x") == pytest.approx((values.mean(), values.std()), rel=1e-9)
    column = DenseColumn("x", "identity", 0.0, 1e-3)
    assert numbers.dense_values(np.array([LARGEST, -LARGEST, np.nan]), column).tolist() == [LARGEST, -LARGEST, 0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sparse: [{name: a, bins: 1}]", "sparse.0.bins is 1. Use 2 or more."),
        ("sparse: [{name: a, bins: 10001}]", "sparse.0.bins is 10001. Use 10,000 or less."),
        ("sparse: [{name: a, bins: many}]", "sparse.0.bins is 'many'. Use a valid integer."),
        ("dense: [{name: a, scale: minmax}]", "dense.0.scale is 'minmax'. Use 'none' or 'standard'."),
        ("dense: [{name: a, missing_indicator: x}]", "dense.0.missing_indicator is 'x'. Use a valid boolean."),
        ("dense: [{name: a, bins: 9}]", "dense: a has bins, which is for sparse columns. List {name: a_bin, column: a"),
        ("sparse: [{name: a, scale: none}]", "sparse: a has scale, which is for dense columns. List the column under "),
        ("sparse: [{name: a, missing_indicator: true}]", "Remove it: a blank of a sparse column already has its own"),
        ("sparse: [{name: a, bins: 9, separator: '|'}]", "'a' has bins, which make ids of numbers, and separator. R"),
        ("sparse: [{name: a, bins: 9, encoding: hash}]", "'a' has bins, which make ids of numbers, and encoding. Remo"),
        ("sparse: [{name: a, bins: 9, parts: [hour]}]", "has bins, which make ids of numbers, and parts. Remove one"),
        ("dense: [a]\nsparse: [a]", "'a' appears twice. Use a different name for each feature. To use a column twice,"),
        ("dense: [a]\nsparse: [a]", "such as under dense and sparse, write {name: a_2, column: a}."),
        ("dense: [{name: a, missing_indicator: true}, a_is_missing]", "the feature 'a_is_missing' appears twice."),
        ("dense: [{name: label, column: x, missing_indicator: true}]", "'label' is not allowed as a feature name"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_refused_on_one_line(text, says):
    with pytest.raises(ValueError, match=r"^s\.yaml: ") as error:
        parse_roles(f"label: y\n{text}", "s.yaml")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_what_cannot_be_read_as_numbers_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"train\.csv: row 2: column 'age': 'old' is not a finite number"):
        prepared_of(tmp_path, "label,age\n1,old\n", "sparse: [{name: age, bins: 3}]")
    with pytest.raises(DataError, match="the bins or the scale of 'age' needs a train split"):
        prepared_of(tmp_path, "label,age\n1,7\n", "sparse: [{name: age, bins: 3}]", split="test")
    with pytest.raises(ValueError, match="'a': libsvm files do not support separator, characters, parts, transform"):
        prepared_of(tmp_path, "1 5:1\n", "sparse: [{name: a, column: '1', bins: 3}]", dataset_format="libsvm")
    times = pyarrow.table({"label": [0], "age": pyarrow.array([0], pyarrow.timestamp("us"))})
    pyarrow.parquet.write_table(times, tmp_path / "t.parquet")
    (tmp_path / "s.yaml").write_text("sparse: [{name: age, bins: 3}]")
    with pytest.raises(DataError, match="column 'age' is a number, but has the type timestamp"):
        prepare(PreparationSettings(str(tmp_path / "t.parquet"), dataset_schema=tmp_path / "s.yaml"), tmp_path / "o")


def prepared_of(folder, text, columns_yaml, split="train", **more):
    (folder / f"{split}.csv").write_text(text)
    (folder / "s.yaml").write_text(columns_yaml)
    files = {f"{split}_file": str(folder / f"{split}.csv")}
    return prepare(PreparationSettings(**files, dataset_schema=folder / "s.yaml", **more), folder / "never")


def test_patterns_take_bins_and_scales(tmp_path):
    columns_yaml = """
dense: [{name: "[ai]*", scale: standard, missing_indicator: true}]
sparse: [{name: "p*_bin", column: "p*", bins: 4}]
ignored: "*"
"""
    schema, tables, _ = prepared(tmp_path, columns_yaml)
    assert [column.name for column in schema.dense] == ["age", "age_is_missing", "income", "income_is_missing"]
    saved = Schema.load(tmp_path / "out")
    assert (saved.dense, saved.sparse) == (schema.dense, schema.sparse)
    assert tables["train"]["plain_bin"].value_counts().sort("plain_bin")["count"].to_list() == [125] * 4
