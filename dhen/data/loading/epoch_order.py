"""The order of rows in an epoch, and a reader that follows it window by window.

Shuffling permutes the row groups, joins consecutive ones into windows, and permutes the rows within each window. Row
groups are therefore read as a whole, and memory holds two windows regardless of the size of the split.
"""

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np

from dhen.data.loading.prepared_rows import RowGroup, Rows, concatenate, decode, empty_rows
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
    """Reads the rows of an epoch in their global order.

    Holds the current window while `decoder`, which has one thread, decodes the next one. There is never a third.
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
        """Return a copy of rows `first` to `last` - 1 in the epoch's order.

        Successive calls must move forward: `first` may not be smaller than the `last` of the previous call.
        """
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
        """Load a window: the current one or a later one. Only self._rows may refer to it, so that it can be freed."""
        assert window >= self._window, "an epoch can only be read forward"
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
