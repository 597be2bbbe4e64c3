"""Streams the rows of a piece with their splits, chunk by chunk.

Rows are split by their position in the input. The first row of the first file has position 0. Header lines have no
position. Bad rows and blank lines do, so skipping them does not move other rows. With a time column, a sequential split
is by time instead.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dhen.data.formats.raw_rows import DataError, RawChunk, Reader
from dhen.data.hashing import hash_positions
from dhen.data.preparation.reading.pieces import Piece
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import TIME

SplitRule = Callable[[np.ndarray], np.ndarray]
"""Returns the index of the split for each position, int64."""
Report = Callable[[int, int], None]
"""Called with the numbers of rows and bytes that were read since the last call."""


@dataclass(frozen=True)
class Raw:
    """How the rows of all pieces are read."""

    reader: Reader
    settings: PreparationSettings
    starts: tuple[float, ...] = ()
    """The first time of each split but the first, if rows are split by time. Bad rows then count for the first."""

    def chunks(self, piece: Piece, report: Report) -> Iterator[tuple[RawChunk, np.ndarray, np.ndarray]]:
        """Make one pass over the rows of a piece. Of a head, about its first rows.

        With each chunk comes the index of the split, among those of the piece, of each good row and of each bad row.
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
                if self.starts and len(piece.splits) > 1:
                    split_of_row = np.searchsorted(self.starts, chunk.table[TIME], side="right")
                    split_of_bad = np.zeros(len(bad), np.int64)
                else:
                    split_of_row, split_of_bad = rule(first + chunk.rows), rule(first + bad)
                yield chunk, split_of_row, split_of_bad
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


def split_starts(settings: PreparationSettings) -> np.ndarray:
    """Where each split but the first starts, as shares of all rows."""
    return np.cumsum([share for share in settings.split_fractions if share > 0])[:-1]


def split_rule(splits: tuple[str, ...], settings: PreparationSettings, num_rows: int) -> SplitRule:
    """Return the rule for `splits`. num_rows: of all files together; only a sequential split needs it.

    A random split assigns each row independently, by where a hash of its position and the seed falls in [0, 1), so the
    shares hold on average. A sequential split puts the first rows into train.
    """
    if len(splits) == 1:  # the user gave files for each split
        return lambda positions: np.zeros(len(positions), np.int64)
    starts = split_starts(settings)
    if settings.split_order == "random":
        seed = settings.split_seed
        return lambda positions: np.searchsorted(starts, hash_positions(positions, seed), side="right")
    first_rows = np.rint(starts * num_rows)
    return lambda positions: np.searchsorted(first_rows, positions, side="right")
