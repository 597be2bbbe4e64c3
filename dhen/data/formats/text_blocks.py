"""Reads text files, plain or gzip, as blocks of whole lines with line numbers.

A block is read by size, cut at its last line break and cleaned. CRLF becomes LF. A byte-order mark and blank lines are
dropped. Line breaks inside quotes become BREAK, so that a row is one line. Lines that a parser would misread become bad
rows: invalid UTF-8, a carriage return inside the line, or a misplaced quote. The rest is valid UTF-8 with one row per
line, so row i of the parser is line `rows[i]` of the file.
"""

import contextlib
import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from dhen.data.formats.first_bytes import START_BYTES, complaint, first_bytes
from dhen.data.formats.raw_rows import LONGEST_QUOTE, BadRow, CountCallback, DataError, ignore_counts

BLOCK_BYTES = 8 << 20
LONGEST_LINE_BYTES = 64 << 20
BREAK = "\U0010fffd"
"""Stands for a line break inside quotes, until the columns are split: a character that no text uses."""
_MOST_LINES = 10_000
"""Lines of a row with line breaks inside quotes. Beyond that, its quote is taken for one that was not closed."""
_FIRST_BYTES = 1 << 16
_GZIP_MAGIC = b"\x1f\x8b"
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Quoting:
    """Quoted values may contain the delimiter and line breaks. Both are single ASCII characters."""

    quote: bytes
    delimiter: bytes


@dataclass(frozen=True)
class TextBlock:
    """Whole rows of a file. rows: int64, the number of each row's first line, from 1. bad: the lines left out."""

    file: str
    text: bytes
    rows: np.ndarray
    bad: tuple[BadRow, ...]
    end_row: int
    bytes_read: int


def text_blocks(
    file: str, *, block_bytes: int = BLOCK_BYTES, header_rows: int = 0, quoting: Quoting | None = None
) -> Iterator[TextBlock]:
    """Yield `file` in blocks of about `block_bytes`, without its first `header_rows` lines.

    Raises FileNotFoundError, or DataError for an empty file, a damaged or truncated .gz, or a binary file.
    """
    line_number = 0
    open_row = b""
    for text, bytes_read in _whole_lines(file, block_bytes):
        if line_number == 0:
            text = text.removeprefix(_MARK)
        num_lines = text.count(b"\n")
        rows = np.arange(line_number + 1 - open_row.count(b"\n"), line_number + num_lines + 1)
        text = open_row + text
        skipped = min(max(header_rows - line_number, 0), num_lines)
        line_number += num_lines
        for _ in range(skipped):
            text = text[text.index(b"\n") + 1 :]
        is_too_long = len(open_row) > block_bytes + _FIRST_BYTES
        text, rows, open_row = _joined(text, rows[skipped:], quoting, is_last=is_too_long)
        text, rows, bad = _clean(file, text, rows, quoting)
        yield TextBlock(file, text, rows, bad, line_number - open_row.count(b"\n"), bytes_read)
    if open_row:  # a quote that is never closed
        rows = np.arange(line_number + 1 - open_row.count(b"\n"), line_number + 1)
        text, rows, _ = _joined(open_row, rows, quoting, is_last=True)
        text, rows, bad = _clean(file, text, rows, quoting)
        yield TextBlock(file, text, rows, bad, line_number, bytes_read)


def first_lines(file: str) -> list[tuple[int, str]]:
    """Return (number, text) of the good lines in the first block, from which callers detect the format.

    Bad lines are skipped here; reading the rows reports them. Raises DataError if no line is left.
    """
    for block in text_blocks(file, block_bytes=_FIRST_BYTES):
        if block.text:
            return list(zip(block.rows.tolist(), block.text[:-1].decode("utf-8").split("\n"), strict=True))
        if block.bad:
            raise DataError(str(block.bad[0]))
    raise DataError(f"{file}: the file has only blank lines. Use a file with rows.")


def first_line(file: str) -> tuple[int, str]:
    """Return (number, text) of the first line that is not blank. Raises DataError if that line is bad."""
    for block in text_blocks(file, block_bytes=_FIRST_BYTES):
        if block.bad and (not block.text or block.bad[0].row < block.rows[0]):
            raise DataError(str(block.bad[0]))
        if block.text:
            return int(block.rows[0]), block.text[: block.text.index(b"\n")].decode("utf-8")
    raise DataError(f"{file}: the file has only blank lines. Use a file with rows.")


def count_lines(file: str, on_count: CountCallback = ignore_counts) -> int:
    """Return the number of lines, including blank ones. The last line may lack a line break."""
    lines = 0
    for text, bytes_read in _whole_lines(file, BLOCK_BYTES):
        lines += text.count(b"\n")
        on_count(lines, bytes_read)
    return lines


def split_columns(
    block: TextBlock, names: list[str], *, delimiter: str, quote: str | None, null_values: tuple[str, ...]
) -> tuple[pa.Table, np.ndarray, tuple[BadRow, ...]]:
    """Split each line into string columns, null if blank. Returns (table, line number of each row, bad rows)."""
    bad: list[BadRow] = []
    ragged: list[int] = []

    def refuse(row: pyarrow.csv.InvalidRow) -> str:
        ragged.append(row.number - 1)
        reason = (
            f"the row has {row.actual_columns} columns, not {row.expected_columns} (the delimiter is {delimiter!r})"
        )
        bad.append(
            BadRow(block.file, int(block.rows[row.number - 1]), reason, row.text.replace(BREAK, "\n")[:LONGEST_QUOTE])
        )
        return "skip"

    kind = pa.string()
    if not block.text:
        return pa.table({name: pa.array([], kind) for name in names}), block.rows, block.bad
    table = pyarrow.csv.read_csv(
        pa.BufferReader(block.text),
        # Row numbers are only reported with a single thread and a single block.
        pyarrow.csv.ReadOptions(use_threads=False, column_names=names, block_size=len(block.text) + 1),
        pyarrow.csv.ParseOptions(
            delimiter=delimiter, quote_char=quote or False, ignore_empty_lines=False, invalid_row_handler=refuse
        ),
        pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, kind), strings_can_be_null=True, null_values=list(null_values)
        ),
    )
    if BREAK.encode() in block.text:
        restored = {name: pc.replace_substring(table[name], BREAK, "\n") for name in table.column_names}
        table = pa.table(restored)
    rows = np.delete(block.rows, ragged) if ragged else block.rows
    assert table.num_rows == len(rows), f"{block.file}: rows and lines up to {block.end_row} do not match"
    return table, rows, (*block.bad, *bad)


def line_quoter(raw: dict[str, pa.Array], delimiter: str) -> Callable[[int], str]:
    """Return a function that returns row i of the columns as text."""
    return lambda i: delimiter.join(str(column[i].as_py() or "") for column in raw.values())


def _open(file: str) -> tuple[BinaryIO, BinaryIO]:
    """Return (file on disk, decompressed content). Raises FileNotFoundError, or DataError for a binary file."""
    start = first_bytes(file)
    is_gzip = start.startswith(_GZIP_MAGIC)
    if is_gzip:
        start = b""
        with gzip.open(file) as content, contextlib.suppress(*_DAMAGED):  # reading the rows reports the damage
            start = content.read(START_BYTES)
    wrong = complaint(start)
    if wrong is not None and is_gzip:
        what = wrong.partition(". ")[0]
        raise DataError(f"{file}: within the gzip, {what}. Unpack it, and give it as Parquet or as plain text.")
    if wrong is not None:
        raise DataError(f"{file}: {wrong}")
    raw = open(file, "rb")  # noqa: SIM115 (the caller closes it)
    return raw, gzip.GzipFile(fileobj=raw) if is_gzip else raw


def _whole_lines(file: str, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Yield blocks of whole lines, and the position in the file on disk where each block ends."""
    raw, content = _open(file)
    with raw, content:
        rest: list[bytes] = []
        held = 0
        is_empty = True
        while data := _read(file, content, block_bytes):
            is_empty = False
            end = data.rfind(b"\n") + 1
            if end:
                yield b"".join((*rest, data[:end])), raw.tell()
                rest, held = [], 0
            rest.append(data[end:])
            held += len(data) - end
            if held > LONGEST_LINE_BYTES:
                raise DataError(
                    f"{file}: a line is longer than {LONGEST_LINE_BYTES >> 20} MiB. Check that this is a text file."
                )
        if is_empty:
            raise DataError(f"{file}: the file is empty. Use a file with rows, or remove it from the list.")
        if held:
            yield b"".join((*rest, b"\n")), raw.tell()


def _read(file: str, content: BinaryIO, size: int) -> bytes:
    try:
        return content.read(size)
    except _DAMAGED as error:
        raise DataError(
            f"{file}: the .gz is truncated or damaged after row {_readable_rows(file)} ({error}). Download or copy the "
            "file again, and check it with `gzip -t`."
        ) from error


def _readable_rows(file: str) -> int:
    """Return the number of whole lines before the damage in a .gz."""
    rows = 0
    with gzip.open(file) as content, contextlib.suppress(*_DAMAGED):
        while data := content.read1(1 << 16):
            rows += data.count(b"\n")
    return rows


def _joined(
    text: bytes, rows: np.ndarray, quoting: Quoting | None, *, is_last: bool = False
) -> tuple[bytes, np.ndarray, bytes]:
    """Join the lines of each row that has line breaks inside quotes.

    Returns (text, number of each row's first line, a last row whose quote is still open, unless `is_last`). A quote
    that no later line closes stays as it is, for `_clean` to refuse.
    """
    if quoting is None or quoting.quote not in text or not _has_misplaced_quote(text.replace(b"\r", b""), quoting):
        return text, rows, b""
    lines = text[:-1].split(b"\n")
    joined: list[bytes] = []
    firsts: list[int] = []
    at = 0
    while at < len(lines):
        last = _end_of_row(lines, at, quoting)
        if last is None and not is_last:
            break
        last = at if last is None else last
        parts = (line.removesuffix(b"\r") for line in lines[at:last])
        joined.append(BREAK.encode().join((*parts, lines[last])))
        firsts.append(int(rows[at]))
        at = last + 1
    rest = b"".join(line + b"\n" for line in lines[at:])
    return b"".join(line + b"\n" for line in joined), np.asarray(firsts, np.int64), rest


def _end_of_row(lines: list[bytes], first: int, quoting: Quoting) -> int | None:
    """The last line of the row that starts at `first`; None if the row goes on after these lines."""
    if lines[first].count(quoting.quote) % 2 == 0:
        return first
    most = first + _MOST_LINES
    for last in range(first + 1, min(len(lines), most)):
        if lines[last].count(quoting.quote) % 2:
            row = BREAK.encode().join(lines[first : last + 1]).replace(b"\r", b"")
            return first if _has_misplaced_quote(row + b"\n", quoting) else last
    return None if len(lines) < most else first


def _clean(
    file: str, text: bytes, rows: np.ndarray, quoting: Quoting | None
) -> tuple[bytes, np.ndarray, tuple[BadRow, ...]]:
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n")
    has_blank_lines = b"\n\n" in text or text.startswith(b"\n")
    if not (has_blank_lines or b"\r" in text or not _is_utf8(text) or _has_misplaced_quote(text, quoting)):
        return text, rows, ()
    bad: list[BadRow] = []
    kept: list[bytes] = []
    kept_rows: list[int] = []
    for row, line in zip(rows.tolist(), text.split(b"\n"), strict=False):
        reason = _complaint(line, quoting)
        if reason is not None:
            shown = line.replace(BREAK.encode(), b"\n")[:LONGEST_QUOTE].decode("utf-8", "backslashreplace")
            bad.append(BadRow(file, row, reason, shown))
        elif line:
            kept.append(line)
            kept_rows.append(row)
    kept.append(b"")
    return b"\n".join(kept), np.asarray(kept_rows, dtype=np.int64), tuple(bad)


def _complaint(line: bytes, quoting: Quoting | None) -> str | None:
    if b"\r" in line:
        return "there is a carriage return within the line. Lines must end in LF or CRLF"
    if not _is_utf8(line):
        return "the line is not valid UTF-8. Convert the file, for example with iconv"
    if _has_misplaced_quote(line + b"\n", quoting):
        return (
            f"a quote ({quoting.quote.decode()}) is misplaced or not closed. A quoted value must start and end at a "
            f"delimiter, and double its inner quotes. To turn quoting off, set `quote: null` in "
            f"the schema"
        )
    return None


def _is_utf8(text: bytes) -> bool:
    if text.isascii():
        return True
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _has_misplaced_quote(text: bytes, quoting: Quoting | None) -> bool:
    """Whether a line has an unclosed quote, or a quote that is next to neither a delimiter nor another quote.

    Parsers treat these differently. One that reads past a line break would shift all row numbers after it.
    """
    if quoting is None or quoting.quote not in text:
        return False
    letters = np.frombuffer(text, dtype=np.uint8)
    line_end, quote = ord("\n"), quoting.quote[0]
    places = np.flatnonzero(letters == quote)
    quotes_by_line = np.diff(np.searchsorted(places, np.flatnonzero(letters == line_end)), prepend=0)
    if (quotes_by_line % 2).any():
        return True
    beside = np.zeros(256, dtype=bool)
    beside[[line_end, quote, quoting.delimiter[0]]] = True
    opening, closing = places[::2], places[1::2]
    return not (beside[letters[opening - 1]] | (opening == 0)).all() or not beside[letters[closing + 1]].all()
