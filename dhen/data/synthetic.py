"""Generates click logs with known click probabilities, in Criteo's format, for the quickstart and for tests.

The click probability is sigmoid(z) with

    z = bias + sum_f main_f[c_f] + sum_j slope_j t(x_j)                        first order
      + sum_(f,g) <u_f[c_f], v_g[c_g]> + sum_(f,j) tilt_f[c_f] t(x_j)          second order
      + sum_(f,g,h) sum_k p_f[c_f]_k q_g[c_g]_k r_h[c_h]_k                     third order

where c_f is the f-th category, x_j the j-th integer and t its standardized signed log1p. A blank adds nothing. The best
log loss that a model can reach on the generated labels is therefore known: it is that of the true probabilities.
"""

import gzip
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl

NUM_INTEGERS, NUM_CATEGORIES = 13, 26
TRUTH_FILE = "truth.json"
VERSION = 1
"""Version of the generator. Raise it when the same seed and rows give a different log."""
CHUNK_ROWS = 100_000
CARDINALITIES = (8, 12, 6, 10, 5, 9, 14, 7, 4, 16, 20, 24, 40, 30, 15, 50, 18, 10, 80, 12, 25, 6, 200, 22, 11, 35)
PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
TRIPLES = ((2, 4, 8), (4, 7, 8))
TILTED = ((0, 0), (4, 2), (7, 5))  # (category, integer)
LATENT_DIM = 2
CLICK_RATE = 0.22
# Standard deviations of the parts of z. The interactions dominate, so a linear model falls short.
MAIN, SLOPE, PAIR, TILT, TRIPLE = 0.15, 0.12, 0.6, 0.15, 0.35


@dataclass(frozen=True)
class FileTruth:
    """The known truth about one generated file.

    best_possible_ne: normalized entropy of the labels under the true probabilities (paper 4.1).
    """

    rows: int
    clicks: int
    best_possible_ne: float


@dataclass(frozen=True)
class Rows:
    """Generated rows: probabilities (R,), labels (R,), integers (R, 13) and categories (R, 26).

    A blank is NaN in integers and -1 in categories.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    integers: np.ndarray
    categories: np.ndarray


class ClickModel:
    """The true click probabilities behind a log, drawn from a seed."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        rng = _generator(seed, 0)
        self._popularity = [np.cumsum(_zipf(count)) for count in CARDINALITIES]
        self._main = [rng.normal(0, MAIN, count) for count in CARDINALITIES]
        self._slopes = rng.normal(0, SLOPE, NUM_INTEGERS)
        scale = PAIR / LATENT_DIM**0.5
        self._pairs = [(_factors(rng, f, scale), _factors(rng, g, 1.0)) for f, g in PAIRS]
        self._tilts = [rng.normal(0, TILT, CARDINALITIES[f]) for f, _ in TILTED]
        scale = TRIPLE / LATENT_DIM**0.5
        self._triples = [(_factors(rng, f, scale), _factors(rng, g, 1.0), _factors(rng, h, 1.0)) for f, g, h in TRIPLES]
        self._blank_integer = rng.uniform(0, 0.25, NUM_INTEGERS)
        self._blank_category = np.where(rng.random(NUM_CATEGORIES) < 0.4, rng.uniform(0, 0.2, NUM_CATEGORIES), 0.0)
        self._location = rng.uniform(0.5, 4.0, NUM_INTEGERS)
        self._spread = rng.uniform(0.6, 1.4, NUM_INTEGERS)
        self._bias = self._bias_for(CLICK_RATE)

    def draw(self, rows: int, *stream: int) -> Rows:
        """Draw `rows` rows. The same `stream` gives the same rows."""
        rng = _generator(self.seed, 1, *stream)
        integers, categories = self._draw_features(rng, rows)
        probabilities = 1 / (1 + np.exp(-self._score(integers, categories) - self._bias))
        return Rows(probabilities, (rng.random(rows) < probabilities).astype(np.int8), integers, categories)

    def _draw_features(self, rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        integers = np.floor(np.exp(rng.normal(self._location, self._spread, (rows, NUM_INTEGERS)))) - 1
        integers[:, 1] -= 2  # one feature goes below zero, as Criteo's second does
        integers[rng.random((rows, NUM_INTEGERS)) < self._blank_integer] = np.nan
        uniform = rng.random((rows, NUM_CATEGORIES))
        # Drop the last bound: rounding can leave the cumulative sum slightly below or above 1.
        categories = np.stack([np.searchsorted(p[:-1], uniform[:, f]) for f, p in enumerate(self._popularity)], axis=1)
        categories[rng.random((rows, NUM_CATEGORIES)) < self._blank_category] = -1
        return integers, categories

    def _score(self, integers: np.ndarray, categories: np.ndarray) -> np.ndarray:
        """Return z without the bias, (R,)."""
        logs = np.sign(integers) * np.log1p(np.abs(integers))
        t = np.nan_to_num((logs - self._location) / self._spread)
        z = t @ self._slopes

        def of(table: np.ndarray, feature: int) -> np.ndarray:
            """Return the table's entry for each row, 0 for a blank."""
            known = categories[:, feature] >= 0
            entries = table[np.maximum(categories[:, feature], 0)]
            return entries * known.reshape(-1, *[1] * (table.ndim - 1))

        for feature, table in enumerate(self._main):
            z += of(table, feature)
        for (f, g), (u, v) in zip(PAIRS, self._pairs, strict=True):
            z += (of(u, f) * of(v, g)).sum(1)
        for (f, j), tilt in zip(TILTED, self._tilts, strict=True):
            z += of(tilt, f) * t[:, j]
        for (f, g, h), (p, q, r) in zip(TRIPLES, self._triples, strict=True):
            z += (of(p, f) * of(q, g) * of(r, h)).sum(1)
        return z

    def _bias_for(self, click_rate: float) -> float:
        """Find the bias for a click rate by bisection on a separate sample."""
        z = self._score(*self._draw_features(_generator(self.seed, 2), 50_000))
        low, high = -10.0, 10.0
        for _ in range(40):
            middle = (low + high) / 2
            too_many = (1 / (1 + np.exp(-z - middle))).mean() > click_rate
            low, high = (low, middle) if too_many else (middle, high)
        return low


def generate_click_log(folder: str | Path, rows: Mapping[str, int], seed: int = 0) -> dict[str, FileTruth]:
    """Write `<split>.tsv.gz` for each split in `rows`, and truth.json. Returns the truth by file name.

    truth.json is {"version", "seed", "files": {name: {"rows", "clicks", "best_possible_ne"}}}. It is written last, so a
    folder without it is incomplete. The same rows and seed give the same bytes. Holds 100,000 rows in memory at a time.

    Raises ValueError if a split has so few rows that all or none of them are clicks.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRUTH_FILE).unlink(missing_ok=True)
    model = ClickModel(seed)
    truths = {
        f"{split}.tsv.gz": _write_file(folder / f"{split}.tsv.gz", model, count, number)
        for number, (split, count) in enumerate(rows.items())
    }
    content = {"version": VERSION, "seed": seed, "files": {name: asdict(truth) for name, truth in truths.items()}}
    with _atomic_file(folder / TRUTH_FILE) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")
    return truths


def holds_click_log(folder: str | Path, rows: Mapping[str, int], seed: int = 0) -> bool:
    """Whether `folder` already holds the complete log that `generate_click_log` would write."""
    try:
        content = json.loads((Path(folder) / TRUTH_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    # Compared in order, because a file's position seeds it.
    generated = [(name, truth["rows"]) for name, truth in content["files"].items()]
    wanted = [(f"{split}.tsv.gz", count) for split, count in rows.items()]
    return (content.get("version"), content["seed"], generated) == (VERSION, seed, wanted)


def _write_file(path: Path, model: ClickModel, rows: int, number: int) -> FileTruth:
    logloss, clicks = 0.0, 0
    with _atomic_file(path) as raw, gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as file:
        for chunk, first in enumerate(range(0, rows, CHUNK_ROWS)):
            drawn = model.draw(min(CHUNK_ROWS, rows - first), number, chunk)
            file.write(_as_tsv(drawn))
            click_chance = np.where(drawn.labels == 1, drawn.probabilities, 1 - drawn.probabilities)
            logloss -= float(np.log(click_chance).sum())
            clicks += int(drawn.labels.sum())
        if not 0 < clicks < rows:
            raise ValueError(
                f"{path.name}: {clicks} of {rows} rows are clicks, so NE is undefined. Generate more rows."
            )
    return FileTruth(rows, clicks, best_possible_ne(logloss, clicks, rows))


@contextmanager
def _atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a draft file for writing. It is renamed to `path` on success and removed on failure."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("wb") as file:
            yield file
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def best_possible_ne(logloss_sum: float, clicks: int, rows: int) -> float:
    """Return the log loss of the true probabilities, divided by the entropy of the click rate (paper 4.1)."""
    rate = clicks / rows
    return logloss_sum / rows / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


def _as_tsv(rows: Rows) -> bytes:
    columns = {"label": pl.Series(rows.labels)}
    for j in range(NUM_INTEGERS):
        columns[f"I{j + 1}"] = pl.Series(rows.integers[:, j]).fill_nan(None).cast(pl.Int64)
    for f in range(NUM_CATEGORIES):
        # The last name, "", is for a blank (-1).
        names = pl.Series([*(f"{_name(f, c):08x}" for c in range(CARDINALITIES[f])), ""])
        columns[f"C{f + 1}"] = names.gather(
            np.where(rows.categories[:, f] < 0, CARDINALITIES[f], rows.categories[:, f])
        )
    return pl.DataFrame(columns).write_csv(include_header=False, separator="\t", quote_style="never").encode()


def _name(feature: int, category: int) -> int:
    """Return 32 random-looking bits, unique within a feature because an odd multiplier is a permutation."""
    return ((category + 1) * 2654435761 + (feature + 1) * 40503 * 65537) % 2**32


def _factors(rng: np.random.Generator, feature: int, scale: float) -> np.ndarray:
    return rng.normal(0, scale, (CARDINALITIES[feature], LATENT_DIM))


def _zipf(count: int) -> np.ndarray:
    weights = 1 / (np.arange(count) + 3.0)
    return weights / weights.sum()


def _generator(*seeds: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seeds)))
