"""A plain-Python reference for data preparation, row by row, written from the documentation alone."""

import bz2
import gzip
import hashlib
import math
import random
from collections import Counter
from functools import partial

import pyarrow as pa

INTEGERS = [f"I{i}" for i in range(1, 14)]
CATEGORIES = [f"C{i}" for i in range(1, 27)]
PACK = {".gz": gzip.compress, ".zst": partial(pa.compress, codec="zstd", asbytes=True), ".bz2": bz2.compress}
"""How files with these suffixes are compressed."""
_WORD = (1 << 64) - 1


def mix(value):
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def salt(name, version=0):
    return int.from_bytes(hashlib.blake2b(f"{version}:{name}".encode(), digest_size=8).digest(), "little")


def hash_text(text, salt_value):
    data = text.encode()
    value = mix((salt_value + len(data) * 0x9E3779B97F4A7C15) & _WORD)
    for start in range(0, len(data), 8):
        value = mix(value ^ int.from_bytes(data[start : start + 8], "little"))
    return value


def hashed_id(text, feature, num_embeddings):
    return 0 if text in ("", None) else 1 + hash_text(text, salt(feature)) % (num_embeddings - 1)


def uniform(position, seed):
    return (mix((salt("split", seed) + position * 0x9E3779B97F4A7C15) & _WORD) >> 11) * 2.0**-53


def random_split(position, seed, fractions):
    value, upper = uniform(position, seed), 0.0
    for split, share in zip(("train", "validation", "test"), fractions, strict=True):
        upper += share
        if value < upper:
            return split
    return "test"


def log1p(text):
    return 0.0 if text == "" else math.copysign(math.log1p(abs(float(text))), float(text))


def vocabulary(keys, min_count):
    counts = Counter(key for key in keys if key)
    kept = sorted((key for key in counts if counts[key] >= min_count), key=lambda key: (-counts[key], key))
    return {key: i + 1 for i, key in enumerate(kept)}


def criteo_lines(num_rows, seed=0):
    """Random lines in Criteo's format, with blanks, negative numbers and skewed categories."""
    chance = random.Random(seed)

    def integer():
        return "" if chance.random() < 0.2 else str(int(chance.lognormvariate(2, 2)) - 2)

    def category():
        return "" if chance.random() < 0.1 else f"{int(chance.paretovariate(0.5)) * 2654435761 % 2**32:08x}"

    return [
        "\t".join([str(int(chance.random() < 0.3)), *(integer() for _ in INTEGERS), *(category() for _ in CATEGORIES)])
        for _ in range(num_rows)
    ]


def prepared_criteo(lines, hash_size):
    """One dict per line, with hashed ids."""
    rows = []
    for line in lines:
        label, *values = line.split("\t")
        row = {"label": float(label)}
        row |= {name: log1p(value) for name, value in zip(INTEGERS, values, strict=False)}
        row |= {name: hashed_id(value, name, hash_size) for name, value in zip(CATEGORIES, values[13:], strict=True)}
        rows.append(row)
    return rows


def assert_same_rows(actual, expected):
    """Check that all rows are equal, with dense values to float32 precision."""
    assert len(actual) == len(expected)
    for got, wanted in zip(actual, expected, strict=True):
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            if isinstance(value, float):
                assert math.isclose(got[name], value, rel_tol=1e-6, abs_tol=1e-7), (name, got[name], value)
            else:
                assert got[name] == value, (name, got[name], value)
