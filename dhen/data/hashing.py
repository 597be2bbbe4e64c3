"""A 64-bit hash of strings and row positions that is the same on every machine, in every version, in every process.

Trained tables depend on it: changing a constant here makes every trained model useless. test_hashing.py pins the
values. A string is padded with zeros and read as little-endian 64-bit words. mix is the finalizer of SplitMix64
(Steele, Lea, Flood 2014):

    h = mix(salt + length in bytes * 0x9E3779B97F4A7C15);  for each word: h = mix(h xor word)
"""

import hashlib

import numpy as np
import pyarrow as pa

from dhen.data.formats.canonical import string_buffers
from dhen.data.schema import MISSING_ID

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WORD_BYTES = 8
_MASKS = np.array([(1 << (8 * n)) - 1 for n in range(_WORD_BYTES + 1)], dtype=np.uint64)


def salt_of(name: str, version: int = 0) -> int:
    """Return a salt for a name, so that different features map equal values to different ids."""
    return int.from_bytes(hashlib.blake2b(f"{version}:{name}".encode(), digest_size=8).digest(), "little")


def hash_texts(texts: pa.Array, salt: int) -> np.ndarray:
    """Return one uint64 hash per string. A null hashes like the empty string."""
    offsets, data = string_buffers(texts)
    starts = offsets[:-1].astype(np.int64)
    lengths = np.diff(offsets).astype(np.int64)
    padded = np.concatenate((data, np.zeros(_WORD_BYTES, dtype=np.uint8)))
    # words[i] is the word that starts at byte i.
    words = np.ndarray((len(padded) - _WORD_BYTES + 1,), dtype="<u8", buffer=padded.data, strides=(1,))
    hashes = mix(np.uint64(salt) + lengths.astype(np.uint64) * _GOLDEN)
    for first_byte in range(0, int(lengths.max(initial=0)), _WORD_BYTES):
        left = lengths - first_byte
        if (left > 0).all():
            hashes = mix(hashes ^ (words[starts + first_byte] & _MASKS[np.minimum(left, _WORD_BYTES)]))
        else:
            longer = np.flatnonzero(left > 0)
            word = words[starts[longer] + first_byte] & _MASKS[np.minimum(left[longer], _WORD_BYTES)]
            hashes[longer] = mix(hashes[longer] ^ word)
    return hashes


def hash_positions(positions: np.ndarray, seed: int) -> np.ndarray:
    """Return one float64 in [0, 1) per int64 position. It is uniform and depends only on position and seed."""
    hashes = mix(np.uint64(salt_of("split", seed)) + positions.astype(np.uint64) * _GOLDEN)
    return (hashes >> np.uint64(11)) * 2.0**-53


def hashed_ids(keys: pa.Array, feature: str, num_embeddings: int) -> np.ndarray:
    """Return int64 ids from 1 to num_embeddings - 1, or 0 if the key is blank."""
    ids = (hash_texts(keys, salt_of(feature)) % np.uint64(num_embeddings - 1)).astype(np.int64) + 1
    if keys.null_count:
        ids[~keys.is_valid().to_numpy(zero_copy_only=False)] = MISSING_ID
    return ids


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, a bijection on uint64."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
