"""One text per value: keys that mean the same get the same id, whatever wrote the file.

| value | as files have it | canonical text |
| --- | --- | --- |
| whole number | `7`, `7.0`, `7.`, `+7.0` | `7` |
| decimal | `1.50`, `1.5` | `1.5` |
| boolean | `True`, `true`, `TRUE`, `1` | `1`; the other one is `0` |
| date | `2024-01-31`, `2024-01-31 00:00:00` | `2024-01-31` |
| time stamp, in any unit | `2024-01-31T12:30:00.000000`, `2024-01-31 12:30` | `2024-01-31 12:30:00` |
| time stamp with a time zone | `2024-01-31 12:30:00+01:00` | `2024-01-31 11:30:00Z` |
| time of day | `12:30:00.000` | `12:30:00` |
| any other text | ` user 7 ` | `user 7`: without blanks around it |

Everything else stays as it is: `007`, `1e5` and `7.5` keep their letters. Readers have already made text of the columns
of a Parquet file, by Arrow's rules.
"""

import numpy as np
import polars as pl
import pyarrow as pa

_TELLING = [bytes([byte]) for byte in b" .:\t\n\v\f\rUuSs\xc2\xe1\xe2\xe3"]
"""Bytes of which every text that is not canonical has at least one: blanks (the last four begin other ones), the point
of a number, the colon of a time, the u of true and the s of false. Most keys have none, and cost nothing."""
_CLOCK = r"([01]\d|2[0-3]):[0-5]\d"
_NUMBER = r"^[+-]?(0|[1-9]\d*)\.\d*$"
_BOOLEAN = r"^(?i:true|false)$"
_STAMP = rf"^\d{{4}}-\d\d-\d\d[ T]{_CLOCK}(:[0-5]\d(\.\d{{1,9}})?)?(Z|[+-](0\d|1[0-4]):?[0-5]\d)?$"
_TIME = rf"^{_CLOCK}:[0-5]\d\.\d+$"
_SPECIAL = "|".join((_NUMBER, _BOOLEAN, _STAMP, _TIME))


def canonical_keys(keys: pa.Array) -> pa.Array:
    """Return the canonical text of each key. A key of blanks becomes null. The rules are in the module's docstring."""
    offsets, data = string_buffers(keys)
    text = data[offsets[0] : offsets[-1]].tobytes()
    if not any(byte in text for byte in _TELLING):
        return keys
    texts = pl.Series("key", pl.from_arrow(keys)).str.strip_chars()
    texts = texts.set(texts == "", None)
    special = texts.str.contains(_SPECIAL).fill_null(False)
    if special.any():
        frame = pl.DataFrame({"key": texts.filter(special).unique()})
        canonical = frame.select("key", pl.coalesce(_boolean(), _stamp(), _number_or_time(), "key").alias("canonical"))
        replaced = texts.replace(canonical["key"], canonical["canonical"])
        texts = pl.select(pl.when(special).then(replaced).otherwise(texts)).to_series()
    return texts.to_arrow().cast(pa.string())


def string_buffers(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return (offsets, data) of a string array without copying. Value i is data[offsets[i] : offsets[i + 1]]."""
    assert pa.types.is_string(values.type), values.type
    _, offsets, data = values.buffers()
    if len(values) == 0:
        return np.zeros(1, dtype=np.int32), np.zeros(0, dtype=np.uint8)
    first = values.offset
    cut = np.frombuffer(offsets, dtype=np.int32)[first : first + len(values) + 1]
    return cut, np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, dtype=np.uint8)


def _boolean() -> pl.Expr:
    key = pl.col("key").str.to_lowercase()
    return pl.when(key == "true").then(pl.lit("1")).when(key == "false").then(pl.lit("0"))


def _number_or_time() -> pl.Expr:
    """Numbers and times without the zeros at the end of their fraction. Minus zero is zero."""
    key = pl.col("key")
    text = key.str.strip_prefix("+").str.strip_chars_end("0").str.strip_suffix(".")
    text = pl.when(text == "-0").then(pl.lit("0")).otherwise(text)
    return pl.when(key.str.contains(f"{_NUMBER}|{_TIME}")).then(text)


def _stamp() -> pl.Expr:
    """Dates with a time, in UTC if they have a zone; null for other keys."""
    key = pl.col("key").str.replace("T", " ", literal=True)
    seconds = key.str.slice(0, 16) + pl.coalesce(key.str.extract(r"^.{16}(:\d\d)"), pl.lit(":00"))
    zone = key.str.extract(r"(Z|[+-]\d\d:?\d\d)$")
    minutes = zone.str.slice(1, 2).cast(pl.Int64, strict=False) * 60 + zone.str.slice(-2).cast(pl.Int64, strict=False)
    shift = pl.when(zone.str.starts_with("-")).then(minutes).otherwise(-minutes).fill_null(0)
    moment = seconds.str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us", strict=False) + pl.duration(minutes=shift)
    fraction = key.str.extract(r"(\.\d+)").fill_null("").str.strip_chars_end("0").str.strip_suffix(".")
    suffix = fraction + pl.when(zone.is_null()).then(pl.lit("")).otherwise(pl.lit("Z"))
    is_stamp = pl.col("key").str.contains(_STAMP)
    return pl.when(is_stamp).then((moment.dt.strftime("%Y-%m-%d %H:%M:%S") + suffix).str.strip_suffix(" 00:00:00"))
