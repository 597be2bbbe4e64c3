"""Which split a row goes to, as a function of its position in the input: 0 for the first row of the first file.

Header lines have no position; bad rows and blank lines have one, so that skipping some moves no other row.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from dhen.data.preparation.hashing import hash_positions
from dhen.data.schema import SPLITS


class SplitRule(Protocol):
    """Rows to splits."""

    splits: tuple[str, ...]

    def assign(self, positions: np.ndarray) -> np.ndarray:
        """int64, for each position an index into `splits`."""


@dataclass(frozen=True)
class WholeSplit:
    """Every row goes to one split: the user gave a file for each."""

    splits: tuple[str, ...]

    def assign(self, positions: np.ndarray) -> np.ndarray:
        """All zeros."""
        return np.zeros(len(positions), dtype=np.int64)


@dataclass(frozen=True)
class RandomSplit:
    """Each row by itself, by a hash of its position and the seed: the shares are met up to chance."""

    splits: tuple[str, ...]
    upper: tuple[float, ...]
    seed: int

    def assign(self, positions: np.ndarray) -> np.ndarray:
        """By where the hash falls in [0, 1)."""
        return np.searchsorted(self.upper[:-1], hash_positions(positions, self.seed), side="right")


@dataclass(frozen=True)
class SequentialSplit:
    """First rows train, last rows test. `ends`: the position after each split's last row."""

    splits: tuple[str, ...]
    ends: tuple[int, ...]

    def assign(self, positions: np.ndarray) -> np.ndarray:
        """By the position itself."""
        return np.searchsorted(self.ends[:-1], positions, side="right")


def splits_with_rows(fractions: tuple[float, float, float]) -> tuple[str, ...]:
    """The splits whose share isn't 0."""
    return tuple(split for split, share in zip(SPLITS, fractions, strict=True) if share > 0)


def split_rule(
    fractions: tuple[float, float, float], order: Literal["random", "sequential"], seed: int, num_rows: int | None
) -> SplitRule:
    """The rule for shares of train, validation and test. `sequential` needs the number of rows of the input."""
    splits = splits_with_rows(fractions)
    upper = np.cumsum([share for share in fractions if share > 0])
    if order == "random":
        return RandomSplit(splits, tuple(upper.tolist()), seed)
    assert num_rows is not None, "a sequential split needs the number of rows"
    return SequentialSplit(splits, tuple(int(end) for end in np.rint(upper * num_rows)))
