"""Guesses the roles of columns from the first rows of a file, for a schema that a person then checks."""

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from dhen.data.formats.columns import label_column, parse_numbers, plain, sparse_columns
from dhen.data.formats.raw_rows import DataError, RowChecks
from dhen.data.formats.roles import LabelRole, Part, SparseRole
from dhen.data.schema import LABEL

BLANKS = ("NA", "N/A", "NaN", "nan", "NULL", "null", "None", "\\N", "?", "-")
"""Words that stand for blank among numbers and dates."""
_YES = {"yes", "y", "true", "t", "on", "click", "clicked", "positive", "pos", "buy", "bought", "purchase", "converted"}
_NO = {"no", "n", "false", "f", "off", "0", "-1", "none", "negative", "neg", "no_click", "nonclick", "not_clicked"}
_CODES = set(
    """
    ad advertiser app article artist brand c campaign cat category channel city class code country customer day device
    dow flight group guid hash hour id ids ip item key member minute month movie page postcode product publisher query
    region seller session shop site song store type uid user uuid video week weekday zip zipcode
    """.split()  # noqa: SIM905
)
"""Last words in the names of columns whose numbers are codes."""
_QUANTITIES = set(
    """
    age amount avg balance clicks cnt cost count days delay distance duration gain height hours impressions income
    length loss mean minutes num per price rate ratio revenue salary score seconds size sum total views weight width
    """.split()  # noqa: SIM905
)
_TIMES = {"at", "created", "date", "datetime", "epoch", "seen", "time", "timestamp", "ts", "updated"}
_ROW_NAMES = {"id", "guid", "index", "row", "row_id", "rowid", "uuid"}
_FEW, _FEW_OF_A_QUANTITY = 64, 10
"""Whole numbers with up to so many distinct values, each in three rows on average, are codes."""
_FEWEST_ROWS = 30
"""With fewer rows, values that all differ do not show that a column is a row's identifier."""
_ROW = "another value in every row, so it says nothing about new rows"
_SHARE_OF_LISTS = 0.1
_UNREADABLE = (pa.types.is_nested, pa.types.is_duration, pa.types.is_interval)
_SECONDS = (9e8, 4.2e9)
"""Seconds since 1970, from 1998 to 2103."""
_DAY = r"^(19|20)\d\d(0[1-9]|1[0-2])([0-2]\d|3[01])(\.0)?$"
_NUMBER = r"^[+-]?\d{1,3}(,\d{3})*([.,]\d+)?$"


@dataclass(frozen=True)
class Guess:
    """The role of a column, the options of its entry in the schema, and a remark for the reader of the schema."""

    column: str
    kind: Literal["dense", "sparse", "ignored"]
    remark: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def guess_label(values: pa.Array, given: LabelRole, file: str) -> tuple[LabelRole, str]:
    """Return (the label's role, a remark). `given`: the column, and what the user says about its values.

    Raises DataError if the values do not tell which rows are clicks, or contradict what the user says.
    """
    where = f"{file}: column {given.column!r}: the label"
    if pa.types.is_nested(values.type) or pa.types.is_temporal(values.type):
        raise DataError(f"{where} has the type {values.type}. Make a column of 0 and 1.")
    words = pc.value_counts(plain(values).cast(pa.string()).drop_null()).field("values").to_pylist()
    if not words:
        raise DataError(f"{where} is blank in the first {len(values):,} rows. Use another column, or raise --rows.")
    is_told = given.positive is not None or given.greater_than is not None
    role = given if is_told else replace(given, positive=_positive(values, words, where))
    checks = RowChecks(file, np.arange(len(values)), str)
    labels = label_column(values, role, checks, is_required=False)
    bad = checks.finish(pa.table({LABEL: labels}), end_row=0).bad
    if bad:
        raise DataError(f"{file}: {bad[0].reason}. Correct --positive or --greater_than.")
    known = labels.filter(pc.invert(pc.is_nan(labels))).to_numpy()
    if is_told and known.min() == known.max():
        raise DataError(
            f"{where} makes {'every' if known[0] else 'no'} row a click. Its values in the first {len(values):,} rows "
            f"are {_some(words)}. Correct --positive or --greater_than, or raise --rows."
        )
    blank = len(labels) - len(known)
    return role, f"{known.mean():.1%} clicks" + (f"; blank labels: {blank:,}; use --bad_rows skip" if blank else "")


def _positive(values: pa.Array, words: list[str], where: str) -> str | None:
    """Return the value of a click, or None if the values are 0 and 1."""
    numbers, unread = parse_numbers(values, pl.Float64)
    if not unread.any() and set(numbers[~np.isnan(numbers)]) <= {0, 1}:
        return None
    yes = [word for word in words if word.strip().lower() in _YES]
    not_no = [word for word in words if word.strip().lower() not in _NO]
    for likely in (yes, not_no):
        if len(words) == 2 and len(likely) == 1:
            return likely[0].strip()
    if not unread.any() and len(words) > 2:
        raise DataError(
            f"{where} has {len(words):,} different numbers, up to {np.nanmax(numbers):g}. Pass "
            f"--greater_than X if numbers above X are clicks, or --positive VALUE if one value is a click."
        )
    raise DataError(f"{where} is {_some(words)}. Pass --positive VALUE with the value that is a click.")


def guess_column(name: str, values: pa.Array) -> Guess:
    """Return the role of a column of text, where a blank is null, or of any type in a Parquet file."""
    kind = values.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    inner = kind.value_type if is_list else kind
    if not name.strip():
        return Guess(name, "ignored", "it has no name")
    is_readable = not isinstance(inner, pa.BaseExtensionType) and not any(is_it(inner) for is_it in _UNREADABLE)
    if not is_readable or (is_list and pa.types.is_floating(inner)):
        return Guess(name, "ignored", f"the type {kind} cannot be read")
    if is_list:
        return Guess(name, "sparse", options={"multi_valued": True})
    present = plain(values.drop_null())
    if pa.types.is_string(present.type):
        present = present.filter(pc.not_equal(present, ""))
    if not len(present):
        return Guess(name, "ignored", "always blank")
    distinct = pc.count_distinct(present).as_py()
    if distinct == 1 and len(present) == len(values):
        return Guess(name, "ignored", "always the same value")
    if pa.types.is_boolean(kind) or pa.types.is_time(kind):
        return Guess(name, "sparse")
    if pa.types.is_temporal(present.type) or (pa.types.is_string(present.type) and are_dates(present)):
        return Guess(name, "sparse", options={"parts": _parts(present)})
    numbers, unread = parse_numbers(present, pl.Float64)
    is_unique = distinct == len(values) >= _FEWEST_ROWS
    if unread.any():
        guess = _guess_text(name, pl.Series(pl.from_arrow(present)), is_unique)
    else:
        guess = _guess_numbers(name, present, numbers, distinct, is_unique)
    if guess == Guess(name, "sparse") and name.lower() in _ROW_NAMES:
        return replace(guess, remark="doubtful: if it identifies a row, list it under ignored")
    return guess


def _guess_text(name: str, texts: pl.Series, is_unique: bool) -> Guess:
    for separator in ("|", ";", ","):
        mark = re.escape(separator)
        is_no_list = texts.str.contains(rf"^\s*[\[{{]|\s{mark}|{mark}\s")  # JSON or prose
        is_list = texts.str.contains(separator, literal=True) & ~is_no_list
        if is_list.mean() >= _SHARE_OF_LISTS and is_no_list.mean() <= 0.05 and not texts.str.contains(_NUMBER).all():
            return Guess(name, "sparse", "lists, by their separator", {"separator": separator})
    if not parse_numbers(texts.str.strip_chars().to_arrow(), pl.Float64)[1].any():
        return Guess(name, "sparse", "doubtful: numbers with spaces around them; remove these and list it under dense")
    return Guess(name, "ignored", _ROW) if is_unique else Guess(name, "sparse")


def _guess_numbers(name: str, values: pa.Array, numbers: np.ndarray, distinct: int, is_unique: bool) -> Guess:
    if (numbers != np.floor(numbers))[~np.isnan(numbers)].any():
        return Guess(name, "dense")
    texts = pl.Series(pl.from_arrow(values.cast(pa.string())))
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)] or [""]
    least, most = np.nanmin(numbers), np.nanmax(numbers)
    if _TIMES & {*words} and _SECONDS[0] <= least <= most <= _SECONDS[1]:
        return Guess(name, "sparse", "seconds since 1970", {"parts": _parts(values)})
    if _TIMES & {*words} and (
        1e3 * _SECONDS[0] <= least <= most <= 1e3 * _SECONDS[1] or texts.str.contains(_DAY).all()
    ):
        return Guess(name, "ignored", "times that `parts` cannot read: use ISO text or seconds since 1970")
    is_quantity = "per" in words or not _QUANTITIES.isdisjoint((words[0], words[-1]))
    is_code = (words[-1] in _CODES and "per" not in words) or most >= 1e12 or texts.str.contains(r"^0\d").any()
    if is_unique and (is_code or (np.diff(numbers) > 0).all()):
        return Guess(name, "ignored", _ROW)
    if is_code or (distinct <= (_FEW_OF_A_QUANTITY if is_quantity else _FEW) and 3 * distinct <= len(values)):
        return Guess(name, "sparse")
    return Guess(name, "dense", "" if is_quantity else "doubtful: whole numbers; codes belong under sparse")


def are_dates(texts: pa.Array) -> bool:
    """Whether each text is a date with which `parts` works, and not just a number."""
    first = texts.slice(0, 100)
    return parse_numbers(first, pl.Float64)[1].all() and all(_part(some, "year")[1] for some in (first, texts))


def _parts(dates: pa.Array) -> list[Part]:
    has_time = set(_part(dates, "hour")[0].to_pylist()) != {"0"}
    return ["hour", "weekday"] if has_time else ["weekday", "month"]


def _part(dates: pa.Array, part: Part) -> tuple[pa.Array, bool]:
    """Return (part of each date, whether all are dates)."""
    checks = RowChecks("", np.arange(len(dates)), str)
    parts, _ = sparse_columns({"date": dates}, SparseRole("date", part=part), checks)
    return parts, bool(checks.is_good.all())


def _some(words: list[str]) -> str:
    return ", ".join(f"{word!r:.40}" for word in words[:8]) + (", …" if len(words) > 8 else "")
