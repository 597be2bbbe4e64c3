"""The roles that columns are guessed to have."""

import datetime

import numpy as np
import pyarrow as pa
import pytest

from dhen.data.formats.column_role import LabelRole
from dhen.data.formats.guessing import guess_column, guess_label
from dhen.data.formats.raw_rows import DataError
from tests.data.formats.test_canonical import arrow_types

RNG = np.random.default_rng(0)
ROWS = 2_000
MANY = RNG.integers(0, 500, ROWS)
FEW = RNG.integers(0, 5, ROWS)
DAY = datetime.date(2024, 1, 1)
DATES = [DAY + datetime.timedelta(days=int(day)) for day in MANY]
MOMENTS = [datetime.datetime(2024, 1, 1) + datetime.timedelta(hours=int(hour)) for hour in MANY]
LISTS = [["a", "b", "c"][: i % 4] for i in range(ROWS)]
HOURS, DAYS = {"parts": ["hour", "weekday"]}, {"parts": ["weekday", "month"]}


@pytest.mark.parametrize("as_text", [True, False], ids=["CSV", "Parquet"])
@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("price", RNG.normal(size=ROWS).round(2), "dense"),
        ("score", FEW / 2, "dense"),
        ("age", RNG.integers(18, 78, ROWS), "dense"),
        ("dep_delay", MANY - 50.0, "dense"),
        ("num_clicks", MANY, "dense"),
        ("hours_per_week", MANY, "dense"),
        ("x", MANY, "dense"),
        ("x", FEW, "sparse"),
        ("num_children", FEW, "sparse"),
        ("hour", RNG.integers(0, 24, ROWS), "sparse"),
        ("user_id", MANY, "sparse"),
        ("userId", MANY, "sparse"),
        ("user_id", MANY.astype(float), "sparse"),
        ("C14", MANY, "sparse"),
        ("x", MANY * 10**12, "sparse"),
        ("flag", FEW > 2, "sparse"),
        ("row", np.arange(ROWS), "ignored"),
        ("x", RNG.permutation(ROWS), "dense"),
        ("id", RNG.permutation(ROWS), "ignored"),
        ("x", np.full(ROWS, 7), "ignored"),
    ],
)
def test_numbers(name, values, kind, as_text):
    values = pa.array(values)
    assert guess_column(name, values.cast(pa.string()) if as_text else values).kind == kind


@pytest.mark.parametrize(
    ("name", "values", "kind", "options"),
    [
        ("city", [f"c{i}" for i in MANY], "sparse", {}),
        ("zip", [f"{i:05}" for i in MANY], "sparse", {}),
        ("x", [f"0{i}" for i in MANY], "sparse", {}),
        ("request", [f"r{i}" for i in range(ROWS)], "ignored", {}),
        ("user", [f"r{i}" for i in range(20)], "sparse", {}),
        ("seen", [f"{day}" for day in DATES], "sparse", DAYS),
        ("seen", [f"{moment}" for moment in MOMENTS], "sparse", HOURS),
        ("seen", [f"{moment.isoformat()}Z" for moment in MOMENTS], "sparse", HOURS),
        ("time", [f"{1_700_000_000 + 3600 * i}" for i in MANY], "sparse", HOURS),
        ("price", [f"{1_700_000_000 + 3600 * i}" for i in MANY], "dense", {}),
        ("genres", ["|".join(some) for some in LISTS], "sparse", {"separator": "|"}),
        ("genres", [";".join(some) for some in LISTS], "sparse", {"separator": ";"}),
        ("genres", [",".join(some) for some in LISTS], "sparse", {"separator": ","}),
        ("history", [f"{i}|{i + 1}" for i in range(ROWS)], "sparse", {"separator": "|"}),
        ("title", ["Paris, France", "a, b; c"] * 50, "sparse", {}),
        ("payload", ["[1,2]", '{"a":1,"b":2}'] * 50, "sparse", {}),
        ("amount", ["1,234", "12,345.5"] * 50, "sparse", {}),
        ("", ["a", "b"] * 50, "ignored", {}),
        ("x", [None] * 50, "ignored", {}),
        ("x", ["a"] * 50, "ignored", {}),
        ("x", ["a", None] * 50, "sparse", {}),
    ],
)
def test_text(name, values, kind, options):
    values = [value or None for value in values]
    guess = guess_column(name, pa.array(values, pa.string()))
    assert (guess.kind, guess.options) == (kind, options)


@pytest.mark.parametrize(
    ("name", "values", "remark"),
    [
        ("x", [f"{i}" for i in MANY], "doubtful: whole numbers; codes belong under sparse"),
        ("age", [f"{i}" for i in MANY], ""),
        ("x", [f" {i / 8}" for i in MANY], ""),
        ("id", [f"k{i}" for i in MANY], "doubtful: if it identifies a row"),
        ("x", [f"k{i}" for i in MANY], ""),
    ],
)
def test_what_is_doubtful_is_said(name, values, remark):
    said = guess_column(name, pa.array(values)).remark
    assert said.startswith(remark)
    assert bool(said) == bool(remark)


@pytest.mark.parametrize(
    ("values", "kind", "options"),
    [
        (pa.array(DATES), "sparse", DAYS),
        (pa.array(MOMENTS), "sparse", HOURS),
        (pa.array(LISTS), "sparse", {"multi_valued": True}),
        (pa.array([["a"], ["b"]], pa.large_list(pa.string())), "sparse", {"multi_valued": True}),
        (pa.array([[0.5], [1.0]]), "ignored", {}),
        (pa.array([(1, 2, 3), (1, 2, 4)], pa.month_day_nano_interval()), "ignored", {}),
        (pa.array([b"a" * 16, b"b" * 16], pa.uuid()), "ignored", {}),
        (pa.array(["", ""]), "ignored", {}),
    ],
)
def test_types_of_parquet(values, kind, options):
    guess = guess_column("x", values)
    assert (guess.kind, guess.options) == (kind, options)


@pytest.mark.parametrize("kind", arrow_types())
def test_every_arrow_type_has_a_guess(kind):
    is_unread = kind.startswith(("duration", "struct", "null"))
    assert (guess_column("x", arrow_types()[kind]).kind == "ignored") == is_unread


@pytest.mark.parametrize(
    ("values", "positive"),
    [
        (["0", "1", "1.0"], None),
        (["0", None], None),
        ([False, True], None),
        ([0.0, 1.0], None),
        (["-1", "1"], "1"),
        (["no", "yes"], "yes"),
        (["Click", "view"], "Click"),
        (["False", "True"], "True"),
        (["none", "sale"], "sale"),
        ([2, 0], "2"),
    ],
)
def test_a_label_of_two_values_has_a_click(values, positive):
    role, clicks = guess_label(pa.array(values), LabelRole("y"), "log.csv")
    assert role == LabelRole("y", positive)
    assert 0 <= clicks < 1


def test_what_the_user_says_of_the_label_is_taken():
    values = pa.array(["1", "2", "5", "5"])
    assert guess_label(values, LabelRole("y", greater_than=2), "log.csv")[1] == 0.5
    assert guess_label(values, LabelRole("y", positive="2"), "log.csv")[1] == 0.25


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        (["a", "b"], {}, "the label is 'a', 'b'. Pass --positive VALUE"),
        (["yes", "y"], {}, "the label is 'yes', 'y'. Pass --positive VALUE"),
        (["1", "2"], {}, "the label is '1', '2'. Pass --positive VALUE"),
        (["a", "b", "c"], {}, "the label is 'a', 'b', 'c'. Pass --positive VALUE"),
        (list(range(9)), {}, "the label is '0', .*, '7', …. Pass --positive VALUE .* or --greater_than X if"),
        ([None, None], {}, "the label is blank in the first 2 rows"),
        (["a", "b"], {"positive": "c"}, "makes no row a click. Its values in the first 2 rows are 'a', 'b'"),
        ([1, 2], {"greater_than": 0}, "makes every row a click"),
        ([1, 2], {"greater_than": 2}, "makes no row a click"),
        (["a", "b"], {"greater_than": 2}, "makes no row a click. Its values .* are 'a', 'b'. Correct"),
        ([[1], [2]], {}, r"the label has the type list<.*>. Make a column of 0 and 1"),
        (DATES[:2], {}, r"the label has the type date32"),
    ],
)
def test_a_label_that_does_not_tell_is_refused(values, given, message):
    array = pa.nulls(2, pa.string()) if values == [None, None] else pa.array(values)
    with pytest.raises(DataError, match=rf"^log\.csv: column 'y': the label.*{message.removeprefix('the label')}"):
        guess_label(array, LabelRole("y", **given), "log.csv")
