"""Bins and scales of numbers: what is fitted to the values of the training split, and how it is applied.

Fits depend only on the values, their order and the pieces of the data, not on the chunks that the values came in.
"""

import logging
from pathlib import Path

import numpy as np

from dhen.data.formats.roles import ColumnRoles
from dhen.data.hashing import hash_positions
from dhen.data.schema import MISSING_ID, DenseColumn, Schema, SparseColumn

MOST_VALUES = 1_000_000
_BLOCK_VALUES = 65_536
_SAMPLE_SEED = -1
_LARGEST = float(np.finfo(np.float32).max)
_ONE_VALUE = "%s: blank or the same number in every training row, so its %s"

logger = logging.getLogger(__name__)


class BinFit:
    """Splits numbers at their quantiles k / bins, which NumPy interpolates linearly.

    The quantiles are exact up to MOST_VALUES training values. Of more, a random sample of half to all of MOST_VALUES is
    kept, which is the same in every run: those whose position in their piece has a small hash.
    """

    def __init__(self, bins: int, piece: int = 0) -> None:
        self._bins, self._seed, self._seen, self._share = bins, _SAMPLE_SEED - piece, 0, 1.0
        self._values, self._hashes = np.empty(0), np.empty(0)

    def add(self, values: np.ndarray) -> None:
        """Take the next training values, without blanks."""
        hashes = hash_positions(np.arange(self._seen, self._seen + len(values)), self._seed)
        self._seen += len(values)
        self._append(values, hashes)

    def save(self, path: Path) -> None:
        """Write what was added."""
        _save(path, values=self._values, hashes=self._hashes, share=self._share)

    def merge(self, path: Path) -> None:
        """Take the values that another fit saved."""
        with np.load(path) as other:
            self._share = min(self._share, float(other["share"]))
            self._append(other["values"], other["hashes"])

    def values_at(self, shares: np.ndarray) -> tuple[float, ...]:
        """For each share of the values, in their order, the first value after it."""
        return tuple(np.quantile(self._values, shares, method="higher").tolist()) if len(self._values) else ()

    def _append(self, values: np.ndarray, hashes: np.ndarray) -> None:
        self._values = np.concatenate([self._values, values])
        self._hashes = np.concatenate([self._hashes, hashes])
        while (is_kept := self._hashes < self._share).sum() > MOST_VALUES:
            self._share /= 2
        self._values, self._hashes = self._values[is_kept], self._hashes[is_kept]

    def result(self, name: str) -> tuple[float, ...]:
        """Return the inner edges of the bins, ascending. Equal ones are merged, and the last bin has the largest."""
        lower = self._values[self._values < self._values.max(initial=-np.inf)]
        if len(lower) == 0:
            logger.info(_ONE_VALUE, name, "numbers make one bin")
            return ()
        quantiles = np.quantile(self._values, np.arange(1, self._bins) / self._bins)
        return tuple(np.unique(np.minimum(quantiles, lower.max())).tolist())


class ScaleFit:
    """Mean and standard deviation of transformed numbers in float64, by blocks (Chan, Golub, LeVeque 1979)."""

    def __init__(self, transform: str) -> None:
        self._transform, self._count, self._mean, self._squares = transform, 0, 0.0, 0.0
        self._waiting = np.empty(0)

    def add(self, values: np.ndarray) -> None:
        """Take the next training values, without blanks."""
        self._waiting = np.concatenate([self._waiting, _transformed(values, self._transform)])
        while len(self._waiting) >= _BLOCK_VALUES:
            self._add_block(_BLOCK_VALUES)

    def save(self, path: Path) -> None:
        """Write what was added."""
        self._add_block(len(self._waiting))
        _save(path, count=self._count, mean=self._mean, squares=self._squares)

    def merge(self, path: Path) -> None:
        """Take the values that another fit saved."""
        with np.load(path) as other:
            self._merge(int(other["count"]), float(other["mean"]), float(other["squares"]))

    def result(self, name: str) -> tuple[float, float]:
        """Return the mean and the standard deviation (of the population)."""
        self._add_block(len(self._waiting))
        std = float(np.sqrt(self._squares / max(self._count, 1)))
        if std == 0:
            logger.info(_ONE_VALUE, name, "scaled value is always 0")
        return float(self._mean), std

    def _add_block(self, num_values: int) -> None:
        block, self._waiting = self._waiting[:num_values], self._waiting[num_values:]
        if num_values:
            mean = block[0] + (block - block[0]).mean()  # of equal values, exactly this value
            self._merge(num_values, mean, ((block - mean) ** 2).sum())

    def _merge(self, count: int, mean: float, squares: float) -> None:
        if self._count == 0:
            self._count, self._mean, self._squares = count, mean, squares
        elif count:
            distance, total = mean - self._mean, self._count + count
            self._squares += squares + distance**2 * self._count * count / total
            self._mean += distance * count / total
            self._count = total


def _save(path: Path, **arrays: np.ndarray | float) -> None:
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)


def number_fits(
    roles: ColumnRoles, trained: Schema | None, piece: int = 0
) -> tuple[dict[str, tuple], dict[str, BinFit | ScaleFit]]:
    """Return, by feature: the edges, or (mean, standard deviation), of the trained model; and what is to be fitted.

    piece: number of the piece of data that is read.

    The trained model's are kept if the feature has the same `bins`, or the same transform and a scale.
    """
    known = {column.name: column for column in (*trained.dense, *trained.sparse)} if trained else {}
    kept, new = {}, {}
    for dense in roles.dense:
        old = known.get(dense.name)
        if dense.scale == "none":
            continue
        if isinstance(old, DenseColumn) and old.mean is not None and old.transform == dense.transform:
            kept[dense.name] = (old.mean, old.std)
        else:
            new[dense.name] = ScaleFit(dense.transform)
    for sparse in roles.sparse:
        old = known.get(sparse.name)
        if sparse.bins is None:
            continue
        if isinstance(old, SparseColumn) and old.bins == sparse.bins:
            kept[sparse.name] = old.edges
        else:
            new[sparse.name] = BinFit(sparse.bins, piece)
    return kept, new


def dense_values(values: np.ndarray, column: DenseColumn) -> np.ndarray:
    """Return the float32 inputs of a dense feature. values: float64, NaN if blank."""
    if column.missing_of is not None:
        return np.isnan(values).astype(np.float32)
    values = _transformed(values, column.transform)
    if column.mean is not None:
        values = (values - column.mean) / column.std if column.std else np.zeros_like(values)
        values = np.clip(values, -_LARGEST, _LARGEST)
    return np.nan_to_num(values, nan=0.0).astype(np.float32)


def bin_ids(values: np.ndarray, column: SparseColumn) -> np.ndarray:
    """Return int32 ids: 1 up to the first edge, which belongs to the bin below it, and so on; 0 for NaN."""
    ids = np.searchsorted(np.array(column.edges), values) + 1
    return np.where(np.isnan(values), MISSING_ID, ids).astype(np.int32)


def _transformed(values: np.ndarray, transform: str) -> np.ndarray:
    return np.sign(values) * np.log1p(np.abs(values)) if transform == "log1p" else values
