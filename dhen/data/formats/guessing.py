"""Guesses the roles of columns from the first rows of a file, for a schema that a person then checks."""

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from dhen.data.formats.column_role import LabelRole, Part, SparseRole
from dhen.data.formats.columns import is_list, label_column, parse_numbers, plain, sparse_columns
from dhen.data.formats.raw_rows import DataError, RowChecks

BLANKS = ("NA", "N/A", "NaN", "nan", "NULL", "null", "None", "\\N", "?", "-")
"""Words that stand for blank among numbers and dates."""
_NO = {"no", "n", "false", "f", "off", "0", "-1", "none", "negative", "neg", "no_click", "not_clicked", "view"}
_CODES = re.compile(
    "app|article|brand|c|campaign|category|channel|city|class|code|country|customer|day|device|flight|group|hour|ids?|ip|"
    "item|minute|month|product|query|region|session|shop|site|song|store|type|user|week|weekday|zip|zipcode"
)
"""Last words in the names of columns whose numbers are codes."""
_QUANTITIES = re.compile(
    "age|amount|balance|clicks|count|days|delay|distance|duration|gain|height|hours|impressions|income|length|loss|num|"
    "price|rate|ratio|score|seconds|size|sum|total|views|weight|width"
)
"""First or last words in the names of columns whose numbers are quantities."""
_TIMES = {"at", "created", "date", "datetime", "seen", "time", "timestamp", "ts", "updated"}
_SECONDS = (9e8, 4.2e9)
"""Seconds since 1970, from 1998 to 2103."""
_FEW, _FEW_OF_A_QUANTITY = 64, 10
"""Whole numbers with up to so many distinct values, each in three rows on average, are codes."""
_LARGEST_QUANTITY = 1e12
_FEWEST_ROWS = 30
"""With fewer rows, values that all differ do not show that a column is a row's identifier."""
_ROW = "another value in every row, so it says nothing about new rows"
_SHARE_OF_LISTS = 0.1
_UNREADABLE = (pa.types.is_nested, pa.types.is_duration, pa.types.is_interval)
_NUMBER = r"^[+-]?\d{1,3}(,\d{3})*([.,]\d+)?$"


@dataclass(frozen=True)
class Guess:
    """The role of a column, the options of its entry in the schema, and a remark for the reader of the schema."""

    column: str
    kind: Literal["dense", "sparse", "ignored"]
    remark: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def guess_label(values: pa.Array, given: LabelRole, file: str) -> tuple[LabelRole, float]:
    """Return (the label's role, the share of clicks). `given`: the column, and what the user says about its values.

    Raises DataError if the values do not tell which rows are clicks, or contradict what the user says.
    """
    where = f"{file}: column {given.column!r}: the label"
    if pa.types.is_nested(values.type) or pa.types.is_temporal(values.type):
        raise DataError(f"{where} has the type {values.type}. Make a column of 0 and 1.")
    values = plain(values)
    words = pc.value_counts(values.cast(pa.string()).drop_null()).field("values").to_pylist()
    if not words:
        raise DataError(f"{where} is blank in the first {len(values):,} rows. Use another column, or raise --rows.")
    is_told = given.positive is not None or given.greater_than is not None
    role = given if is_told else replace(given, positive=_positive(values, words, where))
    labels = label_column(values, role, RowChecks(file, np.arange(len(values)), str), is_required=False).to_numpy()
    known = labels[~np.isnan(labels)]  # without blanks, and without texts beside --greater_than
    clicks = known.sum() / max(len(known), 1)
    if is_told and clicks in (0, 1):
        raise DataError(
            f"{where} makes {'every' if clicks else 'no'} row a click. Its values in the first {len(values):,} rows "
            f"are {_some(words)}. Correct --positive or --greater_than, or raise --rows."
        )
    return role, clicks


def _positive(values: pa.Array, words: list[str], where: str) -> str | None:
    """Return the value of a click, or None if the values are 0 and 1."""
    numbers, unread = parse_numbers(values, pl.Float64)
    if not unread.any() and set(numbers[~np.isnan(numbers)]) <= {0, 1}:
        return None
    likely = [word.strip() for word in words if word.strip().lower() not in _NO]
    if len(words) == 2 and len(likely) == 1:
        return likely[0]
    raise DataError(
        f"{where} is {_some(words)}. Pass --positive VALUE with the value that is a click, or --greater_than X if "
        "larger numbers are clicks."
    )


def guess_column(name: str, values: pa.Array) -> Guess:
    """Return the role of a column of text, where a blank is null, or of any type in a Parquet file."""
    kind = values.type
    inner = kind.value_type if is_list(kind) else kind
    if not name.strip():
        return Guess(name, "ignored", "it has no name")
    is_readable = not isinstance(inner, pa.BaseExtensionType) and not any(is_it(inner) for is_it in _UNREADABLE)
    if not is_readable or (is_list(kind) and pa.types.is_floating(inner)):
        return Guess(name, "ignored", f"the type {kind} cannot be read")
    if is_list(kind):
        return Guess(name, "sparse", options={"multi_valued": True})
    present = plain(values.drop_null())
    if pa.types.is_string(present.type):
        present = pc.utf8_trim_whitespace(present)
        present = present.filter(pc.not_equal(present, ""))
    distinct = len(present.unique())
    if distinct + (len(present) < len(values)) < 2:  # a blank is a value too
        return Guess(name, "ignored", "always the same value")
    if pa.types.is_boolean(kind) or pa.types.is_time(kind):
        return Guess(name, "sparse")
    numbers, unread = parse_numbers(present, pl.Float64)
    if (unread.any() or pa.types.is_temporal(kind)) and (parts := date_parts(present)):
        return Guess(name, "sparse", options={"parts": parts})
    is_unique = distinct == len(values) >= _FEWEST_ROWS
    if unread.any():
        return _guess_text(name, pl.Series(pl.from_arrow(present)), is_unique)
    return _guess_numbers(name, present, numbers, distinct, is_unique)


def _guess_text(name: str, texts: pl.Series, is_unique: bool) -> Guess:
    for separator in ("|", ";", ","):
        mark = re.escape(separator)
        is_no_list = texts.str.contains(rf"^\s*[\[{{]|\s{mark}|{mark}\s")  # JSON or prose
        is_list = texts.str.contains(separator, literal=True) & ~is_no_list
        if is_list.mean() >= _SHARE_OF_LISTS and is_no_list.mean() <= 0.05 and not texts.str.contains(_NUMBER).all():
            return Guess(name, "sparse", "lists, by their separator", {"separator": separator})
    return Guess(name, "ignored", _ROW) if is_unique else Guess(name, "sparse", _doubt_about(name))


def _guess_numbers(name: str, values: pa.Array, numbers: np.ndarray, distinct: int, is_unique: bool) -> Guess:
    if (numbers != np.floor(numbers))[~np.isnan(numbers)].any():
        return Guess(name, "dense")
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)] or [""]
    least, most = np.nanmin(numbers), np.nanmax(numbers)
    if _TIMES & {*words} and _SECONDS[0] <= least <= most <= _SECONDS[1]:
        return Guess(name, "sparse", "seconds since 1970", {"parts": date_parts(values)})
    is_quantity = "per" in words or any(map(_QUANTITIES.fullmatch, (words[0], words[-1])))
    has_zeros = pl.Series(pl.from_arrow(values.cast(pa.string()))).str.contains(r"^0\d").any()
    is_code = (_CODES.fullmatch(words[-1]) and "per" not in words) or most >= _LARGEST_QUANTITY or has_zeros
    if is_unique and (is_code or (np.diff(numbers) > 0).all()):
        return Guess(name, "ignored", _ROW)
    if is_code or (distinct <= (_FEW_OF_A_QUANTITY if is_quantity else _FEW) and 3 * distinct <= len(values)):
        return Guess(name, "sparse", _doubt_about(name))
    return Guess(name, "dense", "" if is_quantity else "doubtful: whole numbers; codes belong under sparse")


def _doubt_about(name: str) -> str:
    return "doubtful: if it identifies a row, list it under ignored" if name.lower() in ("id", "row_id") else ""


def date_parts(values: pa.Array) -> list[Part] | None:
    """Return the parts of dates that differ, or None unless `parts` in a schema can read all values."""
    for some in (values.slice(0, 100), values):  # most columns are no dates, and cost little
        checks = RowChecks("", np.arange(len(some)), str)
        hours, _ = sparse_columns({"date": some}, SparseRole("date", part="hour"), checks)
        if not checks.is_good.all():
            return None
    return ["weekday", "month"] if hours.unique().to_pylist() == ["0"] else ["hour", "weekday"]


def _some(words: list[str]) -> str:
    return ", ".join(f"{word!r:.40}" for word in words[:8]) + (", …" if len(words) > 8 else "")
