"""Converts raw columns to the typed columns of a `RawChunk`, all rows at once.

Columns have text, or any type of a Parquet file that `plain` has simplified. Each function returns the values and
reports the rows that it cannot read to the chunk's `RowChecks`.
"""

import re
from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from dhen.data.formats.canonical import canonical_keys, string_buffers
from dhen.data.formats.column_role import LabelRole, SparseRole
from dhen.data.formats.raw_rows import RowChecks
from dhen.data.formats.roles import TimedRoles

_YES, _NO = ("1", "yes", "y", "on", "t"), ("0", "no", "n", "off", "f")
"""Words for true and false, whose canonical texts are 1 and 0."""
_OTHER_LABELS = ". For other values, write {{column: {}, positive: …}} or {{…, greater_than: …}} as the schema's label"
_SECONDS = (1e8, 1e10)
"""Seconds since 1970 that are taken for a time: from 1973 to 2286. Milliseconds, or a date like 20240131, are not."""
_ADJACENT = re.compile(r"%\w%\w")
A_NUMBER = "a finite number up to 3.4e38"
_HEX = "0123456789abcdefABCDEF"
_ISO_8601 = r"^(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(:\d\d(?:\.\d{1,9})?)?(Z|[+-]\d\d:\d\d)?)?$"
"""As groups: date, hours and minutes, seconds, zone."""


def plain(values: pa.Array) -> pa.Array:
    """Return the values as one of few types: without a dictionary, lists as one type of list, and NaN as null.

    Bytes become text; those that are not UTF-8 become U+FFFD.
    """
    kind = values.type
    if pa.types.is_dictionary(kind):
        return plain(values.dictionary_decode())
    if is_list(kind):
        return lists_of(list_lengths(values), plain(pc.list_flatten(values)))
    if pa.types.is_boolean(kind):
        return values.cast(pa.int8())
    if pa.types.is_floating(kind):
        values = values.cast(pa.float64())
        return pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        try:
            return values.cast(pa.binary()).cast(pa.string())
        except pa.ArrowInvalid:
            texts = (None if value is None else value.decode("utf-8", "replace") for value in values.to_pylist())
            return pa.array(texts, pa.string())
    is_text = pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return values.cast(pa.string()) if is_text else values


def without_blanks(values: pa.Array, null_values: Sequence[str]) -> pa.Array:
    """The values with null for the texts that count as blank."""
    if not pa.types.is_string(values.type):
        return values
    is_blank = pc.is_in(values, pa.array(null_values, pa.string()))
    return pc.if_else(is_blank, pa.scalar(None, pa.string()), values) if pc.any(is_blank).as_py() else values


def label_column(
    values: pa.Array | None,
    role: LabelRole,
    checks: RowChecks,
    *,
    is_required: bool,
    minus_one: bool = False,
    has_schema: bool = False,
) -> pa.Array:
    """Return labels as float32: 0, 1, or NaN if blank and labels are optional.

    values: None if the file has no labels. minus_one: -1 means 0 (libsvm). has_schema: the message may say what the
    schema can do about another label.
    """
    if values is None:
        return pa.array(np.full(len(checks.rows), np.nan, dtype=np.float32), from_pandas=False)
    if role.positive is not None:
        keys = pl.Series(pl.from_arrow(canonical_keys(_keys(values)[0])))
        is_blank = keys.is_null().to_numpy()
        if isinstance(role.positive, bool):  # YAML reads the words for yes and no as booleans
            known = dict.fromkeys(_YES, float(role.positive)) | dict.fromkeys(_NO, float(not role.positive))
            labels = keys.str.to_lowercase().replace_strict(known, default=None, return_dtype=pl.Float64).to_numpy()
            must_be = f"one of {', '.join(known)}"
        else:
            positive = canonical_keys(pa.array([str(role.positive)]))[0].as_py()
            labels, must_be = (keys == positive).cast(pl.Float64).to_numpy(), "a text or a number"
    else:
        labels, unread = parse_numbers(values, pl.Float64)
        is_blank = np.isnan(labels) & ~unread
        must_be = "0 or 1"
        if role.greater_than is not None:
            labels = np.where(np.isnan(labels), np.nan, labels > role.greater_than)
            must_be = "a number"
    allowed = (labels == 0) | (labels == 1) | ((labels == -1) & minus_one)
    is_bad = ~allowed & ~(is_blank & (not is_required))
    way_out = _OTHER_LABELS.format(role.column) if has_schema and must_be == "0 or 1" else ""
    checks.refuse(
        is_bad,
        lambda i: f"column {role.column!r}: the label is {_shown(values, i)}; it must be {must_be}{way_out}",
    )
    return pa.array(np.maximum(labels, 0).astype(np.float32), from_pandas=False)


def number_column(values: pa.Array, name: str, checks: RowChecks, *, is_integer: bool = False) -> pa.Array:
    """Return finite numbers, or integers, as float64; null if blank or NaN."""
    numbers, unread = parse_numbers(values, pl.Int64 if is_integer else pl.Float64)
    if is_integer and pa.types.is_floating(values.type):  # which loses the digits after the point
        unread = unread | (values.fill_null(0).to_numpy(zero_copy_only=False) % 1 != 0)
    is_bad = unread | ~(fit_float32(numbers) | np.isnan(numbers))
    wanted = "an integer" if is_integer else A_NUMBER
    checks.refuse(is_bad, lambda i: f"column {name!r}: {_shown(values, i)} is not {wanted}; fix it or leave it blank")
    return pa.array(numbers, from_pandas=True)


def weight_column(values: pa.Array | None, name: str, checks: RowChecks, *, is_required: bool) -> pa.Array:
    """Return weights of rows as float32. If they are not required, NaN for a missing column (None) or a wrong value."""
    if values is None:
        return pa.array(np.full(len(checks.rows), np.nan, dtype=np.float32), from_pandas=False)
    numbers, _ = parse_numbers(values, pl.Float64)
    is_good = fit_float32(numbers) & (numbers >= 0)
    checks.refuse(
        ~is_good & is_required,
        lambda i: f"column {name!r}: the row's weight is {_shown(values, i)}; it must be a number from 0 on",
    )
    return pa.array(np.where(is_good, numbers, np.nan).astype(np.float32), from_pandas=False)


def time_column(values: pa.Array, roles: TimedRoles, checks: RowChecks) -> pa.Array:
    """Return times as float64: numbers as they are; dates as seconds since 1970, in UTC unless they name a zone."""
    is_temporal = pa.types.is_temporal(values.type)
    if not roles.has_dates:
        times = np.full(len(values), np.nan) if is_temporal else parse_numbers(values, pl.Float64)[0]
    elif is_temporal:
        kind = pa.timestamp("us", getattr(values.type, "tz", None))
        times = values.cast(kind, safe=False).cast(pa.int64()).to_numpy(zero_copy_only=False) / 1e6
    else:
        parts = pl.Series(pl.from_arrow(_keys(values)[0])).str.strip_chars().str.extract_groups(_ISO_8601)
        date, minutes, seconds, zone = parts.struct.unnest().get_columns()
        texts = date + " " + minutes.fill_null("00:00") + seconds.fill_null(":00") + zone.fill_null("Z")
        moments = texts.str.replace("Z", "+00:00").str.to_datetime("%F %T%.f%:z", time_unit="us", strict=False)
        times = (moments.dt.epoch("us") / 1e6).fill_null(float("nan")).to_numpy()
    wanted = "an ISO 8601 date or date and time" if roles.has_dates else "a finite number"
    checks.refuse(
        ~np.isfinite(times),
        lambda i: f"column {roles.time_column!r}: the time is {_shown(values, i)}; it must be {wanted}, as most are",
    )
    return pa.array(times + 0.0, from_pandas=False)  # + 0.0 turns -0 into 0


def fit_float32(numbers: np.ndarray) -> np.ndarray:
    """Return a mask of the numbers that are finite in float32."""
    return np.abs(numbers) <= np.finfo(np.float32).max


def hex_column(values: pa.Array, name: str, checks: RowChecks) -> pa.Array:
    """Return ids of one to eight hex digits in lower case, null if blank."""
    offsets, data = string_buffers(values)
    text = data[offsets[0] : offsets[-1]].tobytes()
    if np.diff(offsets).max(initial=0) <= 8 and not text.translate(None, _HEX.lower().encode()):
        return values
    is_hex = pc.equal(pc.ascii_rtrim(values, _HEX), "")
    is_good = pc.and_(is_hex, pc.less_equal(pc.binary_length(values), 8)).fill_null(True)
    checks.refuse(
        ~is_good.to_numpy(zero_copy_only=False),
        lambda i: f"column {name!r}: the id {_shown(values, i)} is not hex; use 1 to 8 of 0-9 a-f, or leave it blank",
    )
    return pc.ascii_lower(values)


def sparse_columns(raw: dict[str, pa.Array], role: SparseRole, checks: RowChecks) -> tuple[pa.Array, pa.Array | None]:
    """Return (keys, weights or None) of a sparse feature. A key is the id as text, so 7 and "7" are the same key."""
    values = raw[role.source]
    if role.part is not None:
        return _part_of_dates(values, role, checks), None
    if role.transform is not None:
        return _log_squared(values, role.source, checks), None
    if not role.is_multi_valued:
        keys, is_bad = _keys(values)
        checks.refuse(
            is_bad, lambda i: f"column {role.source!r}: the id {_shown(values, i)} is neither text nor an integer"
        )
        if role.characters is not None:
            keys = pc.utf8_slice_codeunits(keys, *role.characters)
            keys = pc.if_else(pc.equal(keys, ""), pa.scalar(None, pa.string()), keys)
        return keys, None
    lists = _split(values, role.separator)
    lengths = list_lengths(lists)
    if role.weights is None:
        return lists_of(lengths, _keys_of_list(lists, lengths, role.source, checks)), None
    weight_lists = _split(raw[role.weights], role.separator)
    weight_lengths = list_lengths(weight_lists)
    checks.refuse(
        lengths != weight_lengths,
        lambda i: (
            f"column {role.source!r} has {lengths[i]} ids, but {role.weights!r} has {weight_lengths[i]} weights; "
            f"give one weight per id"
        ),
    )
    agree = checks.is_good & (lengths == weight_lengths)
    # Rows that do not agree are already marked as bad. Empty them, so that ids and weights stay aligned.
    lists, weight_lists = (pc.if_else(pa.array(agree), one, pa.scalar([], one.type)) for one in (lists, weight_lists))
    lengths = np.where(agree, lengths, 0)
    keys = _keys_of_list(lists, lengths, role.source, checks)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    numbers, _ = parse_numbers(pc.list_flatten(weight_lists), pl.Float64)
    is_bad = np.bincount(rows, weights=~fit_float32(numbers) & _is_present(keys), minlength=len(lengths)) > 0
    checks.refuse(is_bad, lambda i: f"column {role.weights!r}: a weight is not {A_NUMBER}")
    with np.errstate(over="ignore"):  # only in bad rows
        weights = pa.array(numbers.astype(np.float32), from_pandas=False)
    return lists_of(lengths, keys), lists_of(lengths, weights)


def parse_numbers(values: pa.Array, kind: type[pl.DataType]) -> tuple[np.ndarray, np.ndarray]:
    """Return (numbers, unread): float64, NaN for blank or unreadable values, and a mask of the unreadable ones.

    Spaces around a number do not count.
    """
    if pa.types.is_decimal(values.type):
        values = values.cast(pa.float64())
    if values.type in (pa.int64(), pa.float64()) and (kind == pl.Float64 or pa.types.is_integer(values.type)):
        numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return numbers, np.zeros(len(numbers), dtype=bool)
    series = pl.Series(pl.from_arrow(values))
    numbers = series.cast(kind, strict=False)
    unread = numbers.is_null() & series.is_not_null()
    if series.dtype == pl.String and unread.any():
        texts = series.str.strip_chars()
        numbers = texts.cast(kind, strict=False)
        unread = numbers.is_null() & (texts != "").fill_null(False)
    return numbers.cast(pl.Float64).fill_null(float("nan")).to_numpy(), unread.to_numpy()


def _keys(values: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Return (text, mask of non-ids). Whole floats are ids, because pandas stores integers with blanks as floats."""
    if pa.types.is_floating(values.type):
        numbers = pc.fill_null(values, 0).to_numpy()
        is_whole = (np.abs(numbers) < 2**53) & (np.floor(numbers) == numbers)
        whole = pc.if_else(pa.array(is_whole), values, pa.scalar(None, pa.float64()))
        return pc.coalesce(whole.cast(pa.int64()).cast(pa.string()), values.cast(pa.string())), ~is_whole
    text = values if pa.types.is_string(values.type) else values.cast(pa.string())
    is_blank = pc.equal(pc.binary_length(text), 0)
    if pc.any(is_blank).as_py():
        text = pc.if_else(is_blank, pa.scalar(None, pa.string()), text)
    return text, np.zeros(len(values), dtype=bool)


def _log_squared(values: pa.Array, name: str, checks: RowChecks) -> pa.Array:
    """Return floor(log(x)^2) of numbers above 2, and the whole part of others, as text; null if blank."""
    numbers = number_column(values, name, checks).to_numpy(zero_copy_only=False)
    is_blank = np.isnan(numbers)
    buckets = np.where(numbers > 2, np.floor(np.log(np.maximum(numbers, 2)) ** 2), np.trunc(numbers))
    return pa.array(np.where(is_blank, 0, buckets).astype(np.int64), mask=is_blank).cast(pa.string())


def _part_of_dates(values: pa.Array, role: SparseRole, checks: RowChecks) -> pa.Array:
    """Return a part of each date as text, null if blank.

    Dates are Arrow's, or text in the role's format, or ISO text, or seconds since 1970.
    """
    if role.date_format is not None and not pa.types.is_temporal(values.type):
        # Polars does not read hours without minutes.
        minutes = ("", "") if "%M" in role.date_format or "%H" not in role.date_format else (" 00", " %M")
        texts = pl.Series(pl.from_arrow(_keys(values)[0])).str.strip_chars() + minutes[0]
        moments = texts.str.to_datetime(role.date_format + minutes[1], time_unit="us", strict=False)
        as_read = moments.dt.to_string(role.date_format + minutes[1])
        # Without separators, a number that lost its first zero is read as another date. Years have four digits.
        is_date = as_read == texts if _ADJACENT.search(role.date_format) else moments.dt.year() >= 1000
        moments = pl.select(pl.when(is_date).then(moments)).to_series()
    elif not pa.types.is_temporal(values.type):
        numbers, unread = parse_numbers(values, pl.Float64)
        is_plausible = ~unread & (numbers >= _SECONDS[0]) & (numbers <= _SECONDS[1])
        seconds = pl.Series(np.where(is_plausible, numbers, np.nan)).fill_nan(None)
        from_numbers = (seconds * 1e6).cast(pl.Int64, strict=False).cast(pl.Datetime("us"))
        texts = pl.Series("key", pl.from_arrow(canonical_keys(_keys(values)[0])))
        days = texts.str.slice(0, 19).str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us", strict=False)
        dates = texts.str.to_datetime("%Y-%m-%d", time_unit="us", strict=False)
        moments = pl.select(pl.coalesce(from_numbers, days, dates)).to_series()
    else:
        moments = pl.Series(pl.from_arrow(values.cast(pa.timestamp("us"), safe=False)))
    parts = moments.dt.weekday() > 5 if role.part == "weekend" else getattr(moments.dt, role.part)()
    parts = parts.cast(pl.Int32).cast(pl.String).to_arrow().cast(pa.string())
    is_bad = _is_present(values) & ~_is_present(parts)
    if pa.types.is_string(values.type):
        is_bad &= pl.Series(pl.from_arrow(values)).str.contains(r"\S").fill_null(False).to_numpy()
    wanted = role.date_format or "2024-01-31, 2024-01-31 12:30:00, or seconds since 1970, from 1973 on"
    checks.refuse(is_bad, lambda i: f"column {role.source!r}: {_shown(values, i)} is not a date; use {wanted}")
    return parts


def _keys_of_list(lists: pa.Array, lengths: np.ndarray, name: str, checks: RowChecks) -> pa.Array:
    keys, is_bad = _keys(pc.list_flatten(lists))
    rows = np.repeat(np.arange(len(lengths)), lengths)
    bad_rows = np.bincount(rows, weights=is_bad, minlength=len(lengths)) > 0
    checks.refuse(bad_rows, lambda i: f"column {name!r}: an id of {_shown(lists, i)} is neither text nor an integer")
    return keys


def _split(values: pa.Array, separator: str | None) -> pa.Array:
    """Return lists: those in the file, a text split at the separator, or one-value lists."""
    if is_list(values.type):
        return values
    if separator is not None:
        return pc.split_pattern(values.cast(pa.string()), separator)
    return lists_of(_is_present(values), values.drop_null())


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is one of Arrow's types of lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def list_lengths(lists: pa.Array) -> np.ndarray:
    """Return the number of values in each list. A null list is empty."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _is_present(keys: pa.Array) -> np.ndarray:
    return keys.is_valid().to_numpy(zero_copy_only=False)


def lists_of(lengths: np.ndarray, values: pa.Array) -> pa.Array:
    """Return lists of the given lengths over flat values."""
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def _shown(values: pa.Array, index: int) -> str:
    value = values[index].as_py()
    return "blank" if value is None else f"{value!r:.60}"
