"""Reads text files, plain or compressed, as blocks of whole rows with line numbers.

A block is read by size, cut at its last line break and cleaned. CRLF becomes LF. A byte-order mark and blank lines are
dropped. Rows that a parser would misread become bad rows: invalid UTF-8, a carriage return inside the row, or a
misplaced quote. The rest is valid UTF-8, and row i of the parser starts at line `rows[i]` of the file.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv

from dhen.data.formats.first_bytes import DAMAGED, START_BYTES, Compression, complaint, compression_of, first_bytes
from dhen.data.formats.raw_files import can_seek, open_file, size_of
from dhen.data.formats.raw_rows import LONGEST_QUOTE, WHOLE, BadRow, DataError, Stretch

BLOCK_BYTES = 8 << 20
LONGEST_LINE_BYTES = 64 << 20
_PARSED_BYTES = 1 << 20
_MOST_LINES = 10_000
"""Lines of a row with line breaks inside quotes. Beyond that, its quote is taken for one that was not closed."""
_FIRST_BYTES = 1 << 16
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Quoting:
    """Quoted values may contain the delimiter and line breaks. Both are single ASCII characters."""

    quote: str
    delimiter: str

    @cached_property
    def row(self) -> re.Pattern[bytes]:
        """Matches a row, or as the group "open" the rest of a text that ends within quotes.

        Parsers treat other quotes differently. One that reads past a line break would shift all row numbers after it.
        """
        quote, delimiter = re.escape(self.quote), re.escape(self.delimiter)
        opened = f"{quote}[^{quote}]*+(?:{quote}{quote}[^{quote}]*+)*+"
        value = f"(?:{opened}{quote}|[^{quote}{delimiter}\n]*+)"
        return re.compile(rf"(?:{value}{delimiter})*+(?:{value}\n|(?P<open>{opened}\Z))".encode())


@dataclass(frozen=True)
class TextBlock:
    """Whole rows of a file. rows: int64, the number of each row's first line, from 1. bad: the lines left out."""

    file: str
    text: bytes
    rows: np.ndarray
    bad: tuple[BadRow, ...]
    end_row: int
    bytes_read: int


def stretches(file: str, num_bytes: float, quoting: Quoting | None = None) -> list[Stretch]:
    """Cut a file into ranges of bytes (`Reader.stretches`).

    Neither a compressed file nor a text with quotes is cut: a byte in the middle does not say whether it is within
    quotes. Nor is what a server sends only as a whole.
    """
    size, is_plain = size_of(file), compression_of(first_bytes(file)) is None
    count = int(size // num_bytes) if is_plain and can_seek(file) else 1
    if count < 2 or (quoting is not None and _has(file, quoting.quote.encode())):
        # What is appended meanwhile is not read. The size of a file on a server may be unknown.
        return [Stretch(end=size if is_plain and size else None, num_bytes=size)]
    cuts = [size * i // count for i in range(count + 1)]
    return [Stretch(start, end, end - start) for start, end in itertools.pairwise(cuts)]


def _has(file: str, character: bytes) -> bool:
    with open_file(file) as content:
        return any(character in block for block in iter(lambda: content.read(BLOCK_BYTES), b""))


def text_blocks(
    file: str,
    *,
    block_bytes: int = BLOCK_BYTES,
    header_rows: int = 0,
    quoting: Quoting | None = None,
    stretch: Stretch = WHOLE,
) -> Iterator[TextBlock]:
    """Yield `file` in blocks of about `block_bytes`, without its first `header_rows` lines.

    Raises FileNotFoundError, or DataError for an empty file, a damaged or truncated compressed one, or a binary file.
    """
    line, waiting = (header_rows + stretch.rows_before + 1 if stretch.start else 1), b""
    for text, bytes_read in _whole_lines(file, block_bytes, stretch):
        is_last = not text or len(waiting) > block_bytes + _FIRST_BYTES
        if line == 1:
            text = text.removeprefix(_MARK)
        text = waiting + (text.replace(b"\r\n", b"\n") if b"\r" in text else text)
        while text and line <= header_rows:
            text, line = text[text.index(b"\n") + 1 :], line + 1
        first = line
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))  # bytes.find takes three times as long
        if _is_plain(text, quoting) and not (np.diff(ends, prepend=-1) == 1).any():
            line += len(ends)
            yield TextBlock(file, text, np.arange(first, line), (), line - 1, bytes_read)
            continue
        good: list[bytes] = []
        rows: list[int] = []
        bad: list[BadRow] = []
        end = 0
        for row, reason in _rows(text, quoting, is_last):
            if reason is not None:
                bad.append(BadRow(file, line, reason, row[:-1][:LONGEST_QUOTE].decode("utf-8", "backslashreplace")))
            elif row != b"\n":
                good.append(row)
                rows.append(line)
            line += row.count(b"\n")
            end += len(row)
        waiting = text[end:]
        yield TextBlock(file, b"".join(good), np.array(rows, np.int64), tuple(bad), line - 1, bytes_read)


def first_lines(file: str, *, is_first_good: bool = False) -> list[tuple[int, str]]:
    """Return (number, text) of the good lines in the first block that is not blank.

    Bad lines are skipped here; reading the rows reports them. Raises DataError if no line is left, or if the first line
    is bad, but has to be good.
    """
    block = next((each for each in text_blocks(file, block_bytes=_FIRST_BYTES) if each.text or each.bad), None)
    if block is None:
        raise DataError(f"{file}: the file has only blank lines. Use a file with rows.")
    if block.bad and (not block.text or (is_first_good and block.bad[0].row < block.rows[0])):
        raise DataError(str(block.bad[0]))
    return list(zip(block.rows.tolist(), block.text[:-1].decode("utf-8").split("\n"), strict=True))


def line_counts(file: str, stretch: Stretch = WHOLE, header_rows: int = 0) -> Iterator[tuple[int, int]]:
    """Yield the number of lines so far after the header, including blank ones, and where in the file they end."""
    lines = 0 if stretch.start else -header_rows
    for text, bytes_read in _whole_lines(file, BLOCK_BYTES, stretch):
        lines += text.count(b"\n")
        yield lines, bytes_read


def split_columns(
    block: TextBlock,
    names: list[str],
    *,
    delimiter: str,
    quote: str | None,
    null_values: tuple[str, ...],
    numbers: Mapping[str, pa.DataType] = MappingProxyType({}),
) -> tuple[pa.Table, np.ndarray, tuple[BadRow, ...]]:
    """Split each line into string columns, null if blank. Returns (table, line number of each row, bad rows).

    numbers: columns to read as numbers of this type, which saves time. If Arrow cannot read a value as such, or a row,
    they are strings like the others.
    """
    bad: list[BadRow] = []
    ragged: list[int] = []

    def refuse(row: pyarrow.csv.InvalidRow) -> str:
        ragged.append(row.number - 1)
        reason = f"the row has {row.actual_columns} columns, not {row.expected_columns} (delimiter {delimiter!r})"
        bad.append(BadRow(block.file, int(block.rows[row.number - 1]), reason, row.text[:LONGEST_QUOTE]))
        return "skip"

    strings = dict.fromkeys(names, pa.string())
    if not block.text:
        return pa.table({name: pa.array([], kind) for name, kind in strings.items()}), block.rows, block.bad
    has_quotes, table = quote is not None and quote.encode() in block.text, None
    has_longer_rows = has_quotes and block.text.count(b"\n") > len(block.rows)

    def parse(
        num_bytes: int, handler: Callable[[pyarrow.csv.InvalidRow], str], kinds: Mapping[str, pa.DataType]
    ) -> pa.Table:
        return pyarrow.csv.read_csv(
            pa.BufferReader(block.text),
            pyarrow.csv.ReadOptions(use_threads=False, column_names=names, block_size=num_bytes),
            pyarrow.csv.ParseOptions(
                delimiter=delimiter,
                quote_char=quote or False,
                newlines_in_values=has_longer_rows,
                ignore_empty_lines=False,
                invalid_row_handler=handler,
            ),
            pyarrow.csv.ConvertOptions(column_types=kinds, strings_can_be_null=True, null_values=list(null_values)),
        )

    if _has_odd_numbers(block.text, numbers.values()):
        numbers = {}
    found: list[pyarrow.csv.InvalidRow] = []
    # Parts that fit the processor's cache are parsed in two thirds of the time, but do not say which rows are bad.
    for kinds in (strings | numbers, strings) if not has_longer_rows else ():
        with contextlib.suppress(pa.ArrowInvalid):  # a value may be no number, or a row may be longer than a part
            table = parse(_PARSED_BYTES, lambda row: found.append(row) or "skip", kinds)
            break
    if table is None or found:
        table = parse(len(block.text) + 1, refuse, strings)
    rows = np.delete(block.rows, ragged) if ragged else block.rows
    assert table.num_rows == len(rows), f"{block.file}: rows and lines up to {block.end_row} do not match"
    return table, rows, (*block.bad, *bad)


def line_quoter(raw: dict[str, pa.Array], delimiter: str) -> Callable[[int], str]:
    """Return a function that returns row i of the columns as text."""
    return lambda i: delimiter.join(str(column[i].as_py() or "") for column in raw.values())


def _open(file: str) -> tuple[BinaryIO, BinaryIO, Compression | None]:
    """Return (the file as it is, its decompressed content, how it is compressed).

    Raises FileNotFoundError, or DataError for a binary file.
    """
    start = first_bytes(file)
    packed = compression_of(start)
    if packed is not None:
        start = b""
        with open_file(file) as raw, packed.contents(raw) as content, contextlib.suppress(*DAMAGED):
            start = content.read(START_BYTES)  # reading the rows reports damage
    wrong = complaint(start)
    if wrong is not None and packed is not None:
        what = wrong.partition(". ")[0]
        raise DataError(f"{file}: within the {packed.tool}, {what}. Unpack it, and give it as Parquet or plain text.")
    if wrong is not None:
        raise DataError(f"{file}: {wrong}")
    raw = open_file(file)
    return raw, packed.contents(raw) if packed else raw, packed


def _whole_lines(file: str, block_bytes: int, stretch: Stretch) -> Iterator[tuple[bytes, int]]:
    """Yield blocks of whole lines, then an empty one, and the position in the file as it is where each block ends.

    A line belongs to the stretch that its first byte is in.
    """
    raw, content, packed = _open(file)
    with raw, content:
        is_empty = stretch.start == 0
        if stretch.start:
            raw.seek(stretch.start - 1)
            raw.readline(LONGEST_LINE_BYTES)

        def most_bytes() -> int:
            return block_bytes if stretch.end is None else max(0, min(block_bytes, stretch.end - raw.tell()))

        while text := _read_lines(file, content, most_bytes(), packed):
            is_empty = False
            yield text, raw.tell()
        if is_empty:
            raise DataError(f"{file}: the file is empty. Use a file with rows, or remove it from the list.")
        yield b"", raw.tell()


def _read_lines(file: str, content: BinaryIO, num_bytes: int, packed: Compression | None) -> bytes:
    """Read so many bytes and the rest of the last line, which ends with a line break even if the file does not."""
    try:
        text = content.read(num_bytes)
        rest = b"" if not text or text.endswith(b"\n") else content.readline(LONGEST_LINE_BYTES)
    except DAMAGED as error:
        if packed is None:
            raise
        raise DataError(
            f"{file}: the {packed.suffix} is truncated or damaged after row {_readable_rows(file, packed)} ({error}). "
            f"Download or copy the file again, and check it with `{packed.tool} -t`."
        ) from error
    if len(rest) == LONGEST_LINE_BYTES:
        raise DataError(f"{file}: a line is longer than {LONGEST_LINE_BYTES >> 20} MiB. Check that it is a text file.")
    text += rest
    return text + b"\n" if text and not text.endswith(b"\n") else text


def _readable_rows(file: str, packed: Compression) -> int:
    """Return the number of whole lines before the damage in a compressed file."""
    rows = 0
    with open_file(file) as raw, packed.contents(raw) as content, contextlib.suppress(*DAMAGED):
        while data := content.read1(START_BYTES):
            rows += data.count(b"\n")
    return rows


def _is_plain(text: bytes, quoting: Quoting | None) -> bool:
    """Whether each line is a row, and no row is bad. It may be blank."""
    return b"\r" not in text and (quoting is None or quoting.quote.encode() not in text) and _is_utf8(text)


def _rows(text: bytes, quoting: Quoting | None, is_last: bool) -> Iterator[tuple[bytes, str | None]]:
    """Yield each row, and the reason if it is bad. Stops at a last row whose quote is open, unless `is_last`.

    Of a row whose quotes are wrong, only the first line is taken.
    """
    at = 0
    while at < len(text):
        match = quoting.row.match(text, at) if quoting else None
        if match and match["open"] and not is_last:
            return
        row = match[0] if match else b""
        reason = None
        if not row or match["open"] or row.count(b"\n") > _MOST_LINES:
            row = text[at : text.index(b"\n", at) + 1]
            if quoting:
                reason = (
                    f"a quote ({quoting.quote}) is misplaced or not closed. A quoted value must start and end at a "
                    "delimiter, and double its inner quotes. To turn quoting off, set `quote: null` in the schema"
                )
        if b"\r" in row:
            reason = "there is a carriage return within the line. Lines must end in LF or CRLF"
        elif not _is_utf8(row):
            reason = "the line is not valid UTF-8. Convert the file, for example with iconv"
        yield row, reason
        at += len(row)


def _has_odd_numbers(text: bytes, kinds: Iterable[pa.DataType]) -> bool:
    """Whether there may be a hexadecimal integer, or a NaN like nan(1), which Arrow reads, but polars does not."""
    odd = (b"n(", b"N(", b"0x", b"0X") if pa.int64() in kinds else (b"n(", b"N(")
    return any(each[1:] in text and each in text for each in odd)  # a single byte is found at once


def _is_utf8(text: bytes) -> bool:
    if text.isascii():
        return True
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
