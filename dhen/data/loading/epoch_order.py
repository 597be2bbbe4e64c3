"""The order of an epoch's rows, and reading them in it, window by window.

Shuffled, the row groups are permuted, consecutive ones make a window, and the rows are permuted within it: so a few row
groups are read as a whole, and memory holds two windows, whatever the split's size.
"""

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np

from dhen.data.loading.prepared_rows import RowGroup, Rows, concatenate, decode, empty_rows
from dhen.data.schema import Schema


@dataclass(frozen=True)
class EpochOrder:
    """The row groups of an epoch in windows of at least `window_rows` rows; is_shuffled False: as in the files."""

    groups: Sequence[RowGroup]
    epoch: int
    seed: int
    is_shuffled: bool
    window_rows: int

    def windows(self) -> list[list[RowGroup]]:
        """The row groups in order, put together to windows."""
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
        """The order of the rows of a window: positions in it."""
        return self._generator(window).permutation(num_rows) if self.is_shuffled else np.arange(num_rows)

    def _generator(self, *purpose: int) -> np.random.Generator:
        """By seed and epoch alone, each `purpose` its own stream."""
        return np.random.Generator(
            np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(self.epoch, *purpose)))
        )


class EpochReader:
    """An epoch's rows in their global order, asked for in ascending spans.

    Holds the window that it reads from, while `decoder`, of one thread, decodes the next; never a third.
    """

    def __init__(self, order: EpochOrder, schema: Schema, decoder: Executor) -> None:
        self._order, self._schema, self._decoder = order, schema, decoder
        self._windows = order.windows()
        self._ends = np.cumsum([sum(group.num_rows for group in window) for window in self._windows])
        self._window = -1
        self._rows: Rows | None = None
        self._order_of_rows = np.empty(0, np.int64)
        self._next: Future[Rows] | None = None

    def read(self, first: int, last: int) -> Rows:
        """Rows `first` to `last` - 1 of the epoch's order, copied. No call may go back behind the last one."""
        parts = []
        while first < last:
            window = int(np.searchsorted(self._ends, first, side="right"))
            self._go_to(window)
            end = int(self._ends[window])
            begin, upto = end - len(self._order_of_rows), min(last, end)
            parts.append(self._rows.take(self._order_of_rows[first - begin : upto - begin]))
            first = upto
        return concatenate(parts) if parts else empty_rows(self._schema)

    def _go_to(self, window: int) -> None:
        """Have a window at hand: that of the last call or a later one. Nothing but self._rows ever holds it."""
        assert window >= self._window, "an epoch is read forward"
        if window == self._window:
            return
        decoding = self._next if window == self._window + 1 else None
        self._rows = self._next = None
        self._rows = (decoding or self._decode(window)).result()
        self._window = window
        self._order_of_rows = self._order.within(window, len(self._rows.rows_R))
        self._next = self._decode(window + 1) if window + 1 < len(self._windows) else None

    def _decode(self, window: int) -> Future[Rows]:
        return self._decoder.submit(decode, self._windows[window], self._schema)
