"""Labels other than 0 and 1, and parts of dates, as a schema asks for them."""

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from dhen.data.formats.raw_rows import DataError
from dhen.data.formats.roles import load_roles
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings


def prepared(folder: Path, schema: str, rows: str | pa.Table, **settings) -> pa.Table:
    """The train split of a CSV's lines or a table."""
    (folder / "schema.yaml").write_text(schema)
    file = folder / ("log.csv" if isinstance(rows, str) else "log.parquet")
    file.write_text(rows) if isinstance(rows, str) else pyarrow.parquet.write_table(rows, file)
    given = PreparationSettings(train_file=str(file), dataset_schema=str(folder / "schema.yaml"), **settings)
    prepare(given, folder / "prepared")
    return pyarrow.parquet.read_table(folder / "prepared/train")


@pytest.mark.parametrize(
    ("label", "values", "clicks"),
    [
        ("{column: y, positive: yes}", ["yes", "No", "TRUE", "0"], [1, 0, 1, 0]),  # YAML reads yes as a boolean
        ("{column: y, positive: false}", ["False", "true", "f", "y"], [1, 0, 1, 0]),
        ("{column: y, positive: 2}", ["1", "2", "2.0", "1"], [0, 1, 1, 0]),
        ("{column: y, positive: -1}", ["-1", "1", "-1.0", "1"], [1, 0, 1, 0]),
        ("{column: y, positive: bought}", ["bought", "seen", " bought", "left"], [1, 0, 1, 0]),
        ("{column: y, greater_than: 3}", ["3", "3.5", "5", "-1e3"], [0, 1, 1, 0]),
        ("y", ["0", "1", "1.0", "0"], [0, 1, 1, 0]),
    ],
)
def test_labels_are_what_the_schema_says(tmp_path, label, values, clicks):
    rows = "\n".join(["y,user", *(f"{value},u" for value in values)]) + "\n"
    assert prepared(tmp_path, f"label: {label}\nsparse: [user]\n", rows)["label"].to_pylist() == clicks


@pytest.mark.parametrize(
    ("label", "value", "words"),
    [
        ("y", "2", r"the label is '2'; it must be 0 or 1. For other values, write \{column: y, positive: …\} or"),
        ("y", "yes", "it must be 0 or 1"),
        ("{column: y, positive: yes}", "maybe", "the label is 'maybe'; it must be one of 1, yes, y, on, t, 0, no"),
        ("{column: y, greater_than: 3}", "good", "the label is 'good'; it must be a number"),
        ("{column: y, greater_than: 3}", "", "the label is blank; it must be a number"),
        ("{column: y, positive: 2}", "", "the label is blank"),
    ],
)
def test_another_label_is_refused(tmp_path, label, value, words):
    with pytest.raises(DataError, match=words):
        prepared(tmp_path, f"label: {label}\nsparse: [user]\n", f"y,user\n{value},u\n")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("label: {column: y, positive: 1, greater_than: 2}\nsparse: [user]", "both positive and greater_than"),
        ("label: {column: y, positive: ' '}\nsparse: [user]", "positive is blank"),
        ("label: {column: y, above: 2}\nsparse: [user]", "label.above"),
        ("label: {column: y, greater_than: high}\nsparse: [user]", "label.greater_than"),
        ("sparse: [{name: t, parts: [hour, second]}]", "part is 'second'"),
        ("sparse: [{name: t, parts: hour}]", "parts is 'hour'. Use a list of minute, hour"),
        ("sparse: [{name: t, parts: [hour], separator: '|'}]", "has `parts`, which need one date per row"),
        ("sparse: [{name: t, transform: log_squared, separator: '|'}]", "has a `transform`, which needs one number"),
        ("sparse: [{name: t, transform: log}]", "transform is 'log'"),
        ("sparse: [{name: t, date_format: '%Y'}]", "the date_format of 't' is '%Y'"),
        ("sparse: [{name: t, parts: [hour], date_format: '%d.%m.%y %M'}]", "Use %Y or %y"),
        ("sparse: [{name: t, parts: [weekday], date_format: '%d.%m.'}]", "Use %Y or %y"),
    ],
)
def test_a_wrong_schema_is_refused_by_key(tmp_path, schema, words):
    (tmp_path / "schema.yaml").write_text(schema)
    with pytest.raises(ValueError, match=words):
        load_roles(tmp_path / "schema.yaml")


MOMENTS = [
    datetime.datetime(2024, 1, 31, 23, 5),
    datetime.datetime(2023, 6, 4, 0, 0, 9),
    datetime.datetime(2001, 12, 31),
]
PARTS = {"minute": [5, 0, 0], "hour": [23, 0, 0], "weekday": [3, 7, 1], "weekend": [0, 1, 0], "day": [31, 4, 31],
         "month": [1, 6, 12], "week": [5, 22, 1], "year": [2024, 2023, 2001]}  # fmt: skip
KINDS = {
    "ns": pa.array(MOMENTS, pa.timestamp("ns")),
    "s": pa.array([moment.replace(microsecond=0) for moment in MOMENTS], pa.timestamp("s")),
    "text": pa.array([moment.isoformat() for moment in MOMENTS]),
    "text with blanks": pa.array([f" {moment} " for moment in MOMENTS]),
    "seconds": pa.array([int((moment - datetime.datetime(1970, 1, 1)).total_seconds()) for moment in MOMENTS]),
    "seconds as text": pa.array([str((m - datetime.datetime(1970, 1, 1)).total_seconds()) for m in MOMENTS]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_dates_are_features(tmp_path, kind):
    schema = f"label: y\nsparse: [{{name: t, parts: [{', '.join(PARTS)}], encoding: vocabulary}}]\n"
    rows = pa.table({"y": [0, 1, 0, 1], "t": pa.concat_arrays([KINDS[kind], pa.nulls(1, KINDS[kind].type)])})
    table = prepared(tmp_path, schema, rows)
    for part, expected in PARTS.items():
        ids = table[f"t_{part}"].to_pylist()
        vocabulary = pyarrow.parquet.read_table(tmp_path / f"prepared/vocabulary/t_{part}.parquet")
        keys = dict(zip(vocabulary["id"].to_pylist(), vocabulary["key"].to_pylist(), strict=True))
        assert [keys[i] for i in ids[:3]] == list(map(str, expected))
        assert ids[3] == 0, "a blank"


@pytest.mark.parametrize("value", ["soon", "1706704200000", "20240131", "14102100"])
def test_what_is_no_date_is_refused(tmp_path, value):
    with pytest.raises(DataError, match=f"column 't': '{value}' is not a date; use 2024-01-31, "):
        prepared(tmp_path, "label: y\nsparse: [{name: t, parts: [hour]}]\n", f"y,t\n1,{value}\n")


@pytest.mark.parametrize("form", ["%y%m%d%H", "%d.%m.%Y", "%m/%d/%Y %H:%M"])
def test_dates_are_read_in_the_format_that_the_schema_names(tmp_path, form):
    schema = f"label: y\nsparse: [{{name: t, parts: [weekend, day], date_format: '{form}', encoding: vocabulary}}]\n"
    rows = "".join(f"{i % 2},{moment.strftime(form)}\n" for i, moment in enumerate(MOMENTS))
    table = prepared(tmp_path, schema, f"y,t\n{rows}1,\n")
    assert [ids != 0 for ids in table["t_day"].to_pylist()] == [True, True, True, False]
    days = pyarrow.parquet.read_table(tmp_path / "prepared/vocabulary/t_day.parquet")["key"].to_pylist()
    assert sorted(days) == ["31", "4"]
    (tmp_path / "bad").mkdir()
    with pytest.raises(DataError, match=f"column 't': 'soon' is not a date; use {form}"):
        prepared(tmp_path / "bad", schema, f"y,t\n1,{MOMENTS[0].strftime(form)}\n0,soon\n")


@pytest.mark.parametrize(
    ("form", "value"),
    [("%d%m%Y", "1012024"), ("%y%m%d%H", "9102100"), ("%Y%m%d", "2024112"), ("%d/%m/%Y", "31/01/24")],
)
def test_a_lost_zero_or_a_short_year_is_not_read_as_another_date(tmp_path, form, value):
    schema = f"label: y\nsparse: [{{name: t, parts: [day], date_format: '{form}'}}]\n"
    with pytest.raises(DataError, match=f"row 3: column 't': '{value}' is not a date; use {form}"):
        prepared(tmp_path, schema, f"y,t\n1,{MOMENTS[0].strftime(form)}\n0,{value}\n")


def test_spaces_around_numbers_do_not_count(tmp_path):
    schema = "label: y\ndense: [{name: x, transform: identity, missing_indicator: true}]\n"
    table = prepared(tmp_path, schema, "y,x\n1, 2.5 \n 0 ,\t3\n1, \n")
    assert table["label"].to_pylist() == [1, 0, 1]
    assert table["x"].to_pylist() == [2.5, 3, 0]
    assert table["x_is_missing"].to_pylist() == [0, 0, 1]


def test_floats_are_compared_as_numbers(tmp_path):
    rows = pa.table({"y": [5.0, 4.5, 3.0], "user": ["a", "b", "c"]})
    label = "label: {column: y, positive: 4.5}\nsparse: [user]\n"
    assert prepared(tmp_path, label, rows)["label"].to_pylist() == [0, 1, 0]
