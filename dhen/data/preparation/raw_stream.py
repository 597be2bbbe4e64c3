"""Streams the rows of all sources with their splits, chunk by chunk, once per pass."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dhen.data.formats.raw_rows import DataError, RawChunk, Reader
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.preparation.sources import Source
from dhen.data.preparation.splitting import split_rule

_COUNTING = "counting rows"
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


@dataclass(frozen=True)
class SplitChunk:
    """A chunk, with an index into `splits` for each good row and each bad row."""

    chunk: RawChunk
    splits: tuple[str, ...]
    split_of_row: np.ndarray
    split_of_bad: np.ndarray


class RawStream:
    """All rows to prepare. The constructor counts the rows if they are split sequentially.

    share_read: by split, the share of the bytes that the last pass read; below 1 only for a head.
    """

    def __init__(
        self, reader: Reader, sources: tuple[Source, ...], settings: PreparationSettings, progress: ProgressCallback
    ) -> None:
        self.roles = reader.roles
        self.splits = tuple(split for source in sources for split in source.splits)
        self._reader = reader
        self._stops_at_bad_rows = settings.bad_rows == "error"
        self._progress = progress
        self._most_rows = settings.head.rows if settings.head else math.inf
        self.share_read = dict.fromkeys(self.splits, 1.0)
        self._rules = {source: split_rule(source.splits, settings, partial(self._count, source)) for source in sources}

    def _count(self, source: Source) -> int:
        bytes_total = sum(map(_size, source.files))
        rows = bytes_before = 0
        for file in source.files:
            in_file = 0
            for in_file, bytes_read in self._reader.row_counts(file):
                state = PreparationProgress(_COUNTING, rows + in_file, bytes_before + bytes_read, bytes_total)
                self._progress(state)
            rows += in_file
            bytes_before += _size(file)
        self._progress(PreparationProgress(_COUNTING, rows, bytes_total, bytes_total, is_done=True))
        return rows

    def chunks(self, stage: str, only: str | None = None) -> Iterator[SplitChunk]:
        """Make one pass over all rows. `only`: read just the sources that have rows in this split."""
        rules = {s: rule for s, rule in self._rules.items() if only is None or only in s.splits}
        bytes_total = sum(_size(file) for source in rules for file in source.files)
        rows = bytes_before = 0
        for source, rule in rules.items():
            for chunk, first, bytes_read in self._chunks_of(source):
                if chunk.bad and self._stops_at_bad_rows:
                    way_out = "Correct it, or use --bad_rows skip to skip and list bad rows."
                    raise DataError(f"{chunk.bad[0]} {way_out}")
                bad = np.array([bad_row.row for bad_row in chunk.bad], dtype=np.int64)
                yield SplitChunk(chunk, source.splits, rule(first + chunk.rows), rule(first + bad))
                rows += len(chunk.rows)
                self._progress(PreparationProgress(stage, rows, bytes_before + bytes_read, bytes_total))
            bytes_before += sum(map(_size, source.files))
        self._progress(PreparationProgress(stage, rows, bytes_total, bytes_total, is_done=True))

    def _chunks_of(self, source: Source) -> Iterator[tuple[RawChunk, int, int]]:
        """Yield each chunk, the position that row 0 of its file would have, and the bytes read. A head ends early."""
        position = bytes_before = 0
        for file in source.files:
            num_rows = 0
            for chunk in self._reader.chunks(file):
                bytes_read = bytes_before + chunk.bytes_read
                yield chunk, position - 1 - chunk.header_rows, bytes_read
                num_rows = max(chunk.end_row - chunk.header_rows, 0)
                if position + num_rows >= self._most_rows:
                    share = bytes_read / (sum(map(_size, source.files)) or math.inf)
                    self.share_read |= dict.fromkeys(source.splits, share or 1.0)
                    return
            position += num_rows
            bytes_before += _size(file)


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


def _size(file: str) -> int:
    path = Path(file)
    return path.stat().st_size if path.is_file() else 0
