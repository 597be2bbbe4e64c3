"""How many distinct keys a feature has, estimated from the smallest hashes of its keys (Bar-Yossef et al., 2002)."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from dhen.data.preparation.hashing import hash_texts, salt_of

MOST_HASHES = 16_384
_SALT = salt_of("key sketch")


class KeySketch:
    """Keeps the MOST_HASHES smallest hashes, so repetitions, the order of the keys and their pieces do not matter."""

    def __init__(self, path: Path) -> None:
        self._path, self._smallest = path, np.empty(0, np.uint64)

    def add(self, keys: pa.Array) -> None:
        """Take the keys in a chunk, except nulls."""
        self._smallest = _smallest([self._smallest, hash_texts(keys.drop_null(), _SALT)])

    def save(self) -> None:
        """Write the hashes."""
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("wb") as file:
            np.save(file, self._smallest)


def estimated_keys(sketches: Iterable[Path]) -> int:
    """The number of distinct keys in all sketches together: exact below MOST_HASHES, else with an error of about 0.8 %.

    If the hashes are uniform in [0, 1) and the k-th smallest is h, then (k - 1) / h is an unbiased estimate.
    """
    smallest = _smallest([np.load(path) for path in sketches])
    if len(smallest) < MOST_HASHES:
        return len(smallest)
    return round((MOST_HASHES - 1) / (int(smallest[-1]) / 2**64))


def _smallest(hashes: list[np.ndarray]) -> np.ndarray:
    """The smallest different ones, ascending."""
    known = hashes[0]
    if len(known) == MOST_HASHES:
        hashes = [known, *(more[more < known[-1]] for more in hashes[1:])]
    return np.unique(np.concatenate(hashes))[:MOST_HASHES]
