"""The order of rows in an epoch, and a reader that follows it window by window.

Shuffling permutes the row groups, joins consecutive ones into windows, and permutes the rows within each window. Row
groups are therefore read as a whole, and memory holds two windows regardless of the size of the split.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from dhen.data.loading.prepared_rows import RowGroup, Rows, concatenate, decode, empty_rows
from dhen.data.loading.read_ahead import read_ahead
from dhen.data.schema import Schema


@dataclass(frozen=True)
class EpochOrder:
    """Orders row groups into windows of at least `window_rows` rows. is_shuffled False: in the order of the files."""

    groups: Sequence[RowGroup]
    epoch: int
    seed: int
    is_shuffled: bool
    window_rows: int

    def windows(self) -> list[list[RowGroup]]:
        """Return the row groups in order, grouped into windows."""
        order = range(len(self.groups))
        if self.is_shuffled:
            order = self._generator().permutation(len(self.groups))
        windows: list[list[RowGroup]] = []
        size = self.window_rows
        for index in order:
            if size >= self.window_rows:
                windows.append([])
                size = 0
            windows[-1].append(self.groups[index])
            size += self.groups[index].num_rows
        return windows

    def within(self, window: int, num_rows: int) -> np.ndarray:
        """Return the order of the rows within a window, as positions in the window."""
        return self._generator(window).permutation(num_rows) if self.is_shuffled else np.arange(num_rows)

    def _generator(self, *purpose: int) -> np.random.Generator:
        """Return a generator that depends only on seed, epoch and `purpose`."""
        return np.random.Generator(
            np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(self.epoch, *purpose)))
        )


class EpochReader:
    """Reads the rows of an epoch in their global order, from row `first` on.

    Holds the current window while a thread decodes the next one. There is never a third. Close it after use.
    """

    def __init__(self, order: EpochOrder, schema: Schema, first: int) -> None:
        self._schema = schema
        self._windows = read_ahead(lambda: _decoded(order, schema, first), depth=0)
        self._begin = 0
        self._order_of_rows = np.empty(0, np.int64)
        self._rows: Rows | None = None

    def read(self, first: int, last: int) -> Rows:
        """Return a copy of rows `first` to `last` - 1 in the epoch's order.

        Successive calls must move forward: `first` may not be smaller than the `last` of the previous call.
        """
        parts = []
        while first < last:
            end = self._begin + len(self._order_of_rows)
            if first >= end:
                self._rows = None  # so that the next window can take its memory
                self._begin, self._order_of_rows, self._rows = next(self._windows)
                continue
            upto = min(last, end)
            parts.append(self._rows.take(self._order_of_rows[first - self._begin : upto - self._begin]))
            first = upto
        return concatenate(parts) if parts else empty_rows(self._schema)

    def close(self) -> None:
        """End the thread."""
        self._windows.close()


def _decoded(order: EpochOrder, schema: Schema, first: int) -> Generator[tuple[int, np.ndarray, Rows], None, None]:
    """Of each window that goes beyond row `first`: the number of its first row, the order of its rows, its rows."""
    begin = 0
    for number, window in enumerate(order.windows()):
        size = sum(group.num_rows for group in window)
        if begin + size > first:
            yield begin, order.within(number, size), decode(window, schema)
        begin += size
