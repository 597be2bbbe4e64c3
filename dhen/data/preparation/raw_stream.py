"""Streams the rows of a piece with their splits, chunk by chunk."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dhen.data.formats.raw_rows import DataError, RawChunk, Reader
from dhen.data.preparation.pieces import Piece
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.preparation.splitting import split_rule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparationProgress:
    """The progress of a pass. `bytes_total` is 0 if unknown."""

    stage: str
    rows: int
    bytes_read: int
    bytes_total: int
    is_done: bool = False


ProgressCallback = Callable[[PreparationProgress], None]
Report = Callable[[int, int], None]
"""Called with the numbers of rows and bytes that were read since the last call."""


@dataclass(frozen=True)
class SplitChunk:
    """A chunk, with an index into `splits` for each good row and each bad row."""

    chunk: RawChunk
    splits: tuple[str, ...]
    split_of_row: np.ndarray
    split_of_bad: np.ndarray


@dataclass(frozen=True)
class Raw:
    """How the rows of all pieces are read."""

    reader: Reader
    settings: PreparationSettings

    def chunks(self, piece: Piece, report: Report) -> Iterator[SplitChunk]:
        """Make one pass over the rows of a piece. Of a head, about its first rows.

        Raises DataError for a bad row, unless these are skipped.
        """
        rule = split_rule(piece.splits, self.settings, piece.source_rows)
        most_rows = self.settings.head.rows if self.settings.head else math.inf
        position = piece.position
        for file, stretch in piece.parts:
            num_rows, at = stretch.rows_before, stretch.start
            for chunk in self.reader.chunks(file, stretch):
                if chunk.bad and self.settings.bad_rows == "error":
                    way_out = "Correct it, or use --bad_rows skip to skip and list bad rows."
                    raise DataError(f"{chunk.bad[0]} {way_out}")
                first = position - 1 - chunk.header_rows
                bad = np.array([bad_row.row for bad_row in chunk.bad], dtype=np.int64)
                yield SplitChunk(chunk, piece.splits, rule(first + chunk.rows), rule(first + bad))
                report(len(chunk.rows), chunk.bytes_read - at)
                at, num_rows = chunk.bytes_read, max(chunk.end_row - chunk.header_rows, 0)
                if position + num_rows >= most_rows:
                    return
            position += num_rows

    def count(self, piece: Piece, report: Report) -> list[int]:
        """Return the number of rows in each part of a piece, good or bad."""
        counts = []
        for file, stretch in piece.parts:
            rows, at = 0, stretch.start
            for so_far, bytes_read in self.reader.row_counts(file, stretch):
                report(so_far - rows, bytes_read - at)
                rows, at = so_far, bytes_read
            counts.append(rows)
        return counts


class LogProgress:
    """Logs a line every ten seconds and at the end of each pass."""

    _EVERY_SECONDS = 10.0

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def __call__(self, state: PreparationProgress) -> None:
        now = time.monotonic()
        if not state.is_done and now - self._last < self._EVERY_SECONDS:
            return
        share = f"{state.bytes_read / state.bytes_total:.0%} | " if state.bytes_total else ""
        rate = state.rows / max(now - self._start, 1e-9)
        logger.info("%s | %s%s rows | %s rows/s", state.stage, share, f"{state.rows:,}", f"{rate:,.0f}")
        self._last = now
        if state.is_done:
            self._start = now
