"""Assigns rows to splits by their position in the input. The first row of the first file has position 0.

Header lines have no position. Bad rows and blank lines do, so skipping them does not move other rows.
"""

from collections.abc import Callable

import numpy as np

from dhen.data.preparation.hashing import hash_positions
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import SPLITS

SplitRule = Callable[[np.ndarray], np.ndarray]
"""Returns the index of the split for each position, int64."""


def splits_with_rows(fractions: tuple[float, float, float]) -> tuple[str, ...]:
    """Return the splits whose share is not 0."""
    return tuple(split for split, share in zip(SPLITS, fractions, strict=True) if share > 0)


def split_rule(splits: tuple[str, ...], settings: PreparationSettings, num_rows: int) -> SplitRule:
    """Return the rule for `splits`. num_rows: of all files together; only a sequential split needs it.

    A random split assigns each row independently, by where a hash of its position and the seed falls in [0, 1), so the
    shares hold on average. A sequential split puts the first rows into train.
    """
    if len(splits) == 1:  # the user gave files for each split
        return lambda positions: np.zeros(len(positions), np.int64)
    starts = np.cumsum([share for share in settings.split_fractions if share > 0])[:-1]
    if settings.split_order == "random":
        seed = settings.split_seed
        return lambda positions: np.searchsorted(starts, hash_positions(positions, seed), side="right")
    first_rows = np.rint(starts * num_rows)
    return lambda positions: np.searchsorted(first_rows, positions, side="right")
