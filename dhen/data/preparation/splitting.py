"""Assigns rows to splits by their position in the input. The first row of the first file has position 0.

Header lines have no position. Bad rows and blank lines do, so skipping them does not move other rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dhen.data.preparation.hashing import hash_positions
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import SPLITS


@dataclass(frozen=True)
class SplitRule:
    """Assigns each row to a split.

    starts: where each split but the first begins. seed: then each row is assigned independently, by where a hash of its
    position and the seed falls in [0, 1), so the shares hold on average. None: the positions themselves count.
    """

    splits: tuple[str, ...]
    starts: tuple[float, ...] = ()
    seed: int | None = None

    def assign(self, positions: np.ndarray) -> np.ndarray:
        """Return an index into `splits` for each position, int64."""
        places = positions if self.seed is None else hash_positions(positions, self.seed)
        return np.searchsorted(self.starts, places, side="right")


def splits_with_rows(fractions: tuple[float, float, float]) -> tuple[str, ...]:
    """Return the splits whose share is not 0."""
    return tuple(split for split, share in zip(SPLITS, fractions, strict=True) if share > 0)


def split_rule(splits: tuple[str, ...], settings: PreparationSettings, count_rows: Callable[[], int]) -> SplitRule:
    """Return the rule for `splits`. A sequential split, which puts the first rows into train, must count the rows."""
    if len(splits) == 1:  # the user gave files for each split
        return SplitRule(splits)
    starts = np.cumsum([share for share in settings.split_fractions if share > 0])[:-1]
    if settings.split_order == "random":
        return SplitRule(splits, tuple(starts.tolist()), settings.split_seed)
    return SplitRule(splits, tuple(np.rint(starts * count_rows()).tolist()))
