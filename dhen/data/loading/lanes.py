"""The order of an epoch: lanes of row groups, side by side, of which each rank reads its own.

The row groups, permuted if the data is shuffled, are laid end to end and cut into lanes of equal length. Each lane has
windows of its own, whose rows are permuted. A step takes equally many rows of each lane, in the order of the lanes, and
every rank takes a contiguous share of the step. So a rank reads only some lanes, and the number of ranks changes
neither which rows a step has, nor their order.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dhen.data.loading.prepared_rows import RowGroup

MOST_LANES = 256
GROUPS_PER_LANE = 8
"""At least so many. Two lanes may read the row group in which the cut between them lies."""
ROWS_AT_ONCE = 1 << 23
"""A rank that reads all lanes holds a row group of each: at most so many rows."""


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a row group, from `first` to before `end`; both count from the row group's first row."""

    group: RowGroup
    first: int
    end: int

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.end - self.first


def choose_lanes(groups: Sequence[RowGroup], global_batch: int) -> int:
    """The number of lanes of shuffled data: a power of two that divides the global batch, or 1 for small data."""
    largest = max(group.num_rows for group in groups)
    most, lanes = min(MOST_LANES, len(groups) // GROUPS_PER_LANE, ROWS_AT_ONCE // largest), 1
    while 2 * lanes <= most and global_batch % (2 * lanes) == 0:
        lanes *= 2
    return lanes


def share(count: int, index: int, parts: int) -> range:
    """Which of `count` things share `index` has, if they are cut into `parts` shares that differ by at most one thing.

    >>> [share(7, index, 3) for index in range(3)]
    [range(0, 2), range(2, 4), range(4, 7)]
    """
    return range(count * index // parts, count * (index + 1) // parts)


def overlap(one: range, other: range) -> range:
    """What two ranges have in common, counted from the first one's start.

    >>> overlap(range(10, 20), range(15, 30)), len(overlap(range(10, 20), range(30, 40)))
    (range(5, 10), 0)
    """
    first = max(one.start, other.start)
    return range(first - one.start, max(first, min(one.stop, other.stop)) - one.start)


def cut_into_lanes(groups: Sequence[RowGroup], lanes: int) -> list[list[Part]]:
    """The rows of each lane, in order. A lane without rows has one part without rows."""
    ends = list(itertools.accumulate(group.num_rows for group in groups))

    def parts(rows: range) -> Iterator[Part]:
        first = min(bisect.bisect_right(ends, rows.start), len(groups) - 1)
        for index in range(first, max(first, bisect.bisect_left(ends, rows.stop)) + 1):
            own = overlap(range(ends[index] - groups[index].num_rows, ends[index]), rows)
            yield Part(groups[index], own.start, own.stop)

    return [list(parts(share(ends[-1], lane, lanes))) for lane in range(lanes)]


def windows_of(parts: Sequence[Part], least_rows: int) -> Iterator[list[Part]]:
    """Join consecutive parts to windows of at least so many rows; the last one may be smaller."""
    window: list[Part] = []
    for part in parts:
        window.append(part)
        if sum(each.num_rows for each in window) >= least_rows:
            yield window
            window = []
    if window:
        yield window
