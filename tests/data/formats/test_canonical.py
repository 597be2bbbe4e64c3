"""One value is one id: whatever type it has, whoever wrote the file, and in which format."""

import datetime
import decimal
import string
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from dhen.data.formats.canonical import canonical_keys
from dhen.data.formats.raw_rows import DataError
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings

NUM_ROWS = 300


@pytest.mark.parametrize(
    ("texts", "canonical"),
    [
        (["7", "7.0", "7.", "+7.0", " 7 "], "7"),
        (["0.0", "-0.0", "0"], "0"),
        (["1.5", "1.50"], "1.5"),
        (["true", "True", "TRUE", "1"], "1"),
        (["false", "FALSE", "0"], "0"),
        (["2024-01-31", "2024-01-31 00:00:00", "2024-01-31T00:00:00.000000", "2024-01-31 00:00"], "2024-01-31"),
        (["2024-01-31T12:30:00.000000000", "2024-01-31 12:30", "2024-01-31 12:30:00"], "2024-01-31 12:30:00"),
        (["2024-01-31 12:30:00.120", "2024-01-31T12:30:00.12"], "2024-01-31 12:30:00.12"),
        (["2024-01-31 12:30:00+01:00", "2024-01-31T11:30:00Z", "2024-01-31 06:00:00-0530"], "2024-01-31 11:30:00Z"),
        (["12:30:00.000", "12:30:00"], "12:30:00"),
        (["user 7", " user 7\t", "\u00a0user 7"], "user 7"),
    ],
)
def test_equal_values_have_one_text(texts, canonical):
    assert canonical_keys(pa.array(texts, pa.string())).to_pylist() == [canonical] * len(texts)


@pytest.mark.parametrize(
    "text",
    [
        "007",
        "007.0",
        "1e5",
        "7.5",
        "10.0.0.1",
        "v1.10",
        "2024-13-01 10:00:00",
        "2024-01-31 23:59:60",
        "25:00:00.0",
        "tea",
        "Trueman",
        "a: b",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert canonical_keys(pa.array([text, None])).to_pylist() == [text, None]


def test_blanks_are_missing_and_slices_are_respected():
    assert canonical_keys(pa.array(["  ", "", "x "])).to_pylist() == [None, None, "x"]
    assert canonical_keys(pa.array(["0.0", "1.0", None, "b"]).slice(1)).to_pylist() == ["1", None, "b"]


def test_a_blank_in_a_list_is_no_id_and_has_no_weight(tmp_path):
    (tmp_path / "schema.yaml").write_text("label: y\nsparse: [{name: tags, separator: '|', weights: w}]\n")
    (tmp_path / "log.csv").write_text("y,tags,w\n1,a| |7.0,1|2|3\n0, ,5\n1,7,4\n")
    settings = PreparationSettings(
        train_file=str(tmp_path / "log.csv"), dataset_schema=str(tmp_path / "schema.yaml"), id_encoding="vocabulary"
    )
    prepare(settings, tmp_path / "prepared")
    table = pyarrow.parquet.read_table(tmp_path / "prepared/train")
    assert table["tags"].to_pylist() == [[2, 1], [], [1]]
    assert table["tags:weights"].to_pylist() == [[1, 3], [], [4]]


def frame_of_everything(seed: int) -> dict[str, list[Any]]:
    """A column of each kind of value, with blanks; labels and nothing else are complete."""
    chance = np.random.default_rng(seed)
    start = datetime.datetime(2024, 1, 1)

    def some(make):
        return [None if chance.random() < 0.2 else make() for _ in range(NUM_ROWS)]

    def moment():
        seconds = int(chance.integers(0, 10)) * 43_200 + (int(chance.integers(0, 2)) * 1.25)
        return start + datetime.timedelta(seconds=seconds)

    return {
        "label": chance.integers(0, 2, NUM_ROWS).tolist(),
        "integer": some(lambda: int(chance.integers(-20, 20))),
        "boolean": some(lambda: bool(chance.integers(0, 2))),
        "decimal": some(lambda: decimal.Decimal(int(chance.integers(-300, 300))) / 100),
        "day": some(lambda: (start + datetime.timedelta(days=int(chance.integers(0, 20)))).date()),
        "moment": some(moment),
        "in_zone": some(lambda: moment().replace(tzinfo=datetime.UTC)),
        "clock": some(lambda: moment().time()),
        "text": some(lambda: string.ascii_lowercase[int(chance.integers(0, 9))] * 3),
    }


TYPES = {
    "label": pa.int64(), "integer": pa.int64(), "boolean": pa.bool_(), "decimal": pa.decimal128(9, 2),
    "day": pa.date32(), "moment": pa.timestamp("us"), "in_zone": pa.timestamp("us", "UTC"), "clock": pa.time64("us"),
    "text": pa.string(),
}  # fmt: skip
OTHER_TYPES = {
    "integer": pa.float64(), "moment": pa.timestamp("ns"), "in_zone": pa.timestamp("ms", "Europe/Berlin"),
    "decimal": pa.decimal256(20, 4), "text": pa.dictionary(pa.int32(), pa.string()), "day": pa.date64(),
    "clock": pa.time64("ns"),
}  # fmt: skip


def write_all(values: dict[str, list[Any]], folder: Path) -> dict[str, Path]:
    """The same frame, by writer: CSV and Parquet, by Arrow, pandas and polars, and with other types of Parquet."""
    table = pa.table({name: pa.array(column, TYPES[name]) for name, column in values.items()})
    others = pa.table({n: table[n].cast(OTHER_TYPES.get(n, TYPES[n])) for n in values})
    files = {name: folder / name for name in (
        "arrow.csv", "arrow.parquet", "pandas.csv", "pandas.parquet", "polars.csv", "polars.parquet", "others.parquet",
    )}  # fmt: skip
    pyarrow.csv.write_csv(
        table.set_column(3, "decimal", table["decimal"].cast(pa.string())), files["arrow.csv"],
        pyarrow.csv.WriteOptions(quoting_style="needed"),
    )  # fmt: skip
    pyarrow.parquet.write_table(table, files["arrow.parquet"])
    pyarrow.parquet.write_table(others, files["others.parquet"])
    of_pandas: pd.DataFrame = table.to_pandas()  # integers with blanks become floats, booleans become objects
    of_pandas.to_csv(files["pandas.csv"], index=False)
    of_pandas.to_parquet(files["pandas.parquet"])
    pl.from_arrow(table).write_csv(files["polars.csv"])
    pl.from_arrow(table).write_parquet(files["polars.parquet"])
    return files


@pytest.mark.parametrize("encoding", ["hash", "vocabulary"])
@pytest.mark.parametrize("seed", range(3))
def test_one_frame_has_one_set_of_ids_whoever_writes_it(tmp_path, seed, encoding):
    values = frame_of_everything(seed)
    names = [name for name in TYPES if name != "label"]
    (tmp_path / "schema.yaml").write_text(f"label: label\nsparse: [{', '.join(names)}]\n")
    prepared = {}
    for writer, file in write_all(values, tmp_path).items():
        settings = PreparationSettings(
            train_file=str(file), dataset_schema=str(tmp_path / "schema.yaml"), id_encoding=encoding, hash_size=10**6
        )
        prepare(settings, tmp_path / f"prepared {writer}")
        (part,) = (tmp_path / f"prepared {writer}" / "train").glob("*.parquet")
        prepared[writer] = pyarrow.parquet.read_table(part)
    expected = prepared.pop("arrow.parquet")
    for writer, table in prepared.items():
        for name in names:
            assert table[name].to_pylist() == expected[name].to_pylist(), f"{writer}: {name}"
    for name in names:
        distinct = {value for value in values[name] if value is not None}
        assert len(set(expected[name].to_pylist())) == len(distinct) + 1, f"{name}: different values, different ids"


GRID = {
    "int8": [0, 1], "uint64": [0, 1], "float16": np.array([0, 1], np.float16), "float": [0.0, 1.0],
    "bool": [False, True],
    "decimal128(5, 2)": [decimal.Decimal("0.00"), decimal.Decimal("1.00")], "string": ["0", "1"],
    "large_string": ["0", "1"], "string_view": ["0", "1"], "binary": [b"0", b"1"], "large_binary": [b"0", b"1"],
    "fixed_size_binary[1]": [b"0", b"1"], "date32": [0, 1], "date64": [0, 86_400_000], "timestamp[ns]": [0, 1],
    "timestamp[s, tz=UTC]": [0, 1], "time32[s]": [0, 1], "time64[us]": [0, 1], "duration[s]": [0, 1],
    "null": [None, None], "struct<a: int64>": [{"a": 0}, {"a": 1}],
}  # fmt: skip


def arrow_types() -> dict[str, pa.Array]:
    """Two values of each Arrow type: 0 and 1 where it has numbers; and each dictionary-encoded."""
    types = {
        "float16": pa.float16(), "float": pa.float32(), "decimal128(5, 2)": pa.decimal128(5, 2), "bool": pa.bool_(),
        "string_view": pa.string_view(), "fixed_size_binary[1]": pa.binary(1), "timestamp[ns]": pa.timestamp("ns"),
        "timestamp[s, tz=UTC]": pa.timestamp("s", "UTC"), "time32[s]": pa.time32("s"), "time64[us]": pa.time64("us"),
        "duration[s]": pa.duration("s"), "struct<a: int64>": pa.struct([("a", pa.int64())]),
    }  # fmt: skip
    arrays = {name: pa.array(values, types.get(name) or getattr(pa, name)()) for name, values in GRID.items()}
    encodable = ("int8", "string", "binary", "date32")
    return arrays | {f"dictionary of {name}": arrays[name].dictionary_encode() for name in encodable}


IS_TIME = ("date", "timestamp", "time", "duration")
REFUSED = {
    "label": (*IS_TIME, "struct", "null"), "dense": (*IS_TIME, "struct"), "weights": (*IS_TIME, "struct", "null"),
    "sparse": ("duration", "struct"), "bag": ("duration", "struct"),
}  # fmt: skip
ROLES = {
    "label": "label: x\nsparse: [other]\n", "dense": "label: y\ndense: [x]\nsparse: [other]\n",
    "sparse": "label: y\nsparse: [x, other]\n", "bag": "label: y\nsparse: [{name: x, multi_valued: true}, other]\n",
    "weights": "label: y\nsparse: [{name: ids, weights: x}, other]\n",
}  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", arrow_types())
def test_every_arrow_type_is_read_or_refused_in_a_line_in_every_role(tmp_path, role, kind):
    values = arrow_types()[kind]
    if role in ("bag", "weights"):
        values = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), values)
    columns = {"x": values, "other": ["a", "b"]} | ({} if role == "label" else {"y": [0, 1]})
    if role == "weights":
        columns["ids"] = [["a"], ["b"]]
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "log.parquet")
    ignored = "" if role != "label" else 'ignored: "*"\n'
    (tmp_path / "schema.yaml").write_text(ROLES[role] + ignored)
    settings = PreparationSettings(
        train_file=str(tmp_path / "log.parquet"), dataset_schema=str(tmp_path / "schema.yaml")
    )
    plain_kind = kind.removeprefix("dictionary of ")
    if plain_kind.startswith(REFUSED[role]):
        with pytest.raises(DataError, match=r"column 'x'") as refusal:
            prepare(settings, tmp_path / "prepared")
        assert "\n" not in str(refusal.value)
        return
    prepare(settings, tmp_path / "prepared")
    table = pyarrow.parquet.read_table(tmp_path / "prepared/train")
    if role == "label":
        assert table["label"].to_pylist() == [0, 1]
    elif plain_kind != "null":
        column = table["ids:weights" if role == "weights" else "x"].to_pylist()
        assert column[0] != column[1]
        assert role not in ("sparse", "bag") or 0 not in column
