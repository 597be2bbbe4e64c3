"""Assigns rows to splits by their position in the input. The first row of the first file has position 0.

Header lines have no position. Bad rows and blank lines do, so skipping them does not move other rows.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from dhen.data.preparation.hashing import hash_positions
from dhen.data.schema import SPLITS


class SplitRule(Protocol):
    """Assigns each row to a split."""

    splits: tuple[str, ...]

    def assign(self, positions: np.ndarray) -> np.ndarray:
        """Return an index into `splits` for each position, int64."""


@dataclass(frozen=True)
class WholeSplit:
    """Puts all rows into one split, because the user gave files for each split."""

    splits: tuple[str, ...]

    def assign(self, positions: np.ndarray) -> np.ndarray:
        """Return zeros."""
        return np.zeros(len(positions), dtype=np.int64)


@dataclass(frozen=True)
class RandomSplit:
    """Assigns each row independently by a hash of its position and the seed. The shares hold on average."""

    splits: tuple[str, ...]
    upper: tuple[float, ...]
    seed: int

    def assign(self, positions: np.ndarray) -> np.ndarray:
        """Assign by where the hash falls in [0, 1)."""
        return np.searchsorted(self.upper[:-1], hash_positions(positions, self.seed), side="right")


@dataclass(frozen=True)
class SequentialSplit:
    """Puts the first rows into train and the last into test. `ends`: the position after each split's last row."""

    splits: tuple[str, ...]
    ends: tuple[int, ...]

    def assign(self, positions: np.ndarray) -> np.ndarray:
        """Assign by the position itself."""
        return np.searchsorted(self.ends[:-1], positions, side="right")


def splits_with_rows(fractions: tuple[float, float, float]) -> tuple[str, ...]:
    """Return the splits whose share is not 0."""
    return tuple(split for split, share in zip(SPLITS, fractions, strict=True) if share > 0)


def split_rule(
    fractions: tuple[float, float, float], order: Literal["random", "sequential"], seed: int, num_rows: int | None
) -> SplitRule:
    """Return the rule for the shares of train, validation and test. `sequential` needs num_rows."""
    splits = splits_with_rows(fractions)
    upper = np.cumsum([share for share in fractions if share > 0])
    if order == "random":
        return RandomSplit(splits, tuple(upper.tolist()), seed)
    assert num_rows is not None, "a sequential split needs the number of rows"
    return SequentialSplit(splits, tuple(int(end) for end in np.rint(upper * num_rows)))
