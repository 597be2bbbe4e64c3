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
    lengths = np.diff(offsets)
    longest, is_present = int(lengths.max(initial=0)), lengths > 0
    num_present = int(np.count_nonzero(is_present))
    if longest * num_present == offsets[-1] - offsets[0]:  # all that are present have one length, as hex ids do
        of_blank, of_present = mix(np.uint64(salt) + np.array([0, longest], dtype=np.uint64) * _GOLDEN)
        hashes = np.full(len(lengths), of_blank)
        hashes[is_present] = _hash_words(data[offsets[0] : offsets[-1]].reshape(num_present, longest), of_present)
        return hashes
    starts = offsets[:-1].astype(np.int64)
    padded = np.concatenate((data, np.zeros(_WORD_BYTES, dtype=np.uint8)))
    # words[i] is the word that starts at byte i.
    words = np.ndarray((len(padded) - _WORD_BYTES + 1,), dtype="<u8", buffer=padded.data, strides=(1,))
    hashes = mix(np.uint64(salt) + lengths.astype(np.uint64) * _GOLDEN)
    for first_byte in range(0, longest, _WORD_BYTES):
        left = lengths - first_byte
        if (left > 0).all():
            hashes = mix(hashes ^ (words[starts + first_byte] & _MASKS[np.minimum(left, _WORD_BYTES)]))
        else:
            longer = np.flatnonzero(left > 0)
            word = words[starts[longer] + first_byte] & _MASKS[np.minimum(left[longer], _WORD_BYTES)]
            hashes[longer] = mix(hashes[longer] ^ word)
    return hashes


def _hash_words(texts: np.ndarray, hashes: np.uint64) -> np.ndarray:
    """Return the hashes of texts of one length. texts: uint8 (texts, bytes). hashes: as of that length."""
    if texts.shape[1] % _WORD_BYTES:
        texts = np.pad(texts, ((0, 0), (0, -texts.shape[1] % _WORD_BYTES)))
    for word in texts.view("<u8").T:
        hashes = mix(hashes ^ word)
    return hashes


def hash_positions(positions: np.ndarray, seed: int) -> np.ndarray:
    """Return one float64 in [0, 1) per int64 position. It is uniform and depends only on position and seed."""
    hashes = mix(np.uint64(salt_of("split", seed)) + positions.astype(np.uint64) * _GOLDEN)
    return (hashes >> np.uint64(11)) * 2.0**-53


def hashed_ids(keys: pa.Array, feature: str, num_embeddings: int) -> np.ndarray:
    """Return int64 ids from 1 to num_embeddings - 1, or 0 if the key is blank."""
    ids = (hash_texts(keys, salt_of(feature)) % np.uint64(num_embeddings - 1) + np.uint64(1)).view(np.int64)
    if keys.null_count:
        ids[~keys.is_valid().to_numpy(zero_copy_only=False)] = MISSING_ID
    return ids


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, a bijection on uint64."""
    mixed = values ^ (values >> np.uint64(30))
    with np.errstate(over="ignore"):
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
