"""Generates click logs with known click probabilities, in Criteo's format.

The click probability is sigmoid(z) with

    z = bias + sum_f main_f[c_f] + sum_j slope_j t(x_j)                        first order
      + sum_(f,g,...) sum_k u_f[c_f]_k v_g[c_g]_k ... [t(x_j)]                 interactions

where c_f is the f-th category, x_j the j-th integer and t its standardized signed log1p. A `Recipe` lists the
interactions. A blank adds nothing. The best log loss that a model can reach on the generated labels is therefore known:
it is that of the true probabilities.
"""

import gzip
import json
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from dhen.paths import write_atomically

NUM_INTEGERS, NUM_CATEGORIES = 13, 26
TRUTH_FILE = "truth.json"
VERSION = 1
"""Version of the generator. Raise it when the same recipe, seed and rows give a different log."""
CHUNK_ROWS = 100_000


@dataclass(frozen=True)
class Interaction:
    """A product of the latent factors of some categories, summed over k, and of an integer if there is one.

    scale: standard deviation of the sum, where no value is blank and the factors have variance 1.
    """

    categories: tuple[int, ...]
    scale: float
    integer: int | None = None
    latent_dim: int = 2


@dataclass(frozen=True)
class Recipe:
    """What a log is generated from.

    rows: by split. cardinalities: of the 26 categories. main, slope: standard deviations of the first-order parts of z.
    has_shared_factors: whether a category has one set of factors for all of its interactions, with mean 0 and variance
        1 over the log. If so, an interaction has no part of a lower order, and what a model learns from one helps with
        the next. If not, each interaction draws its own factors.
    """

    rows: dict[str, int]
    cardinalities: tuple[int, ...]
    interactions: tuple[Interaction, ...]
    click_rate: float
    main: float
    slope: float
    has_shared_factors: bool = False


QUICKSTART = Recipe(
    {"train": 1_000_000, "validation": 30_000, "test": 60_000},
    (8, 12, 6, 10, 5, 9, 14, 7, 4, 16, 20, 24, 40, 30, 15, 50, 18, 10, 80, 12, 25, 6, 200, 22, 11, 35),
    (
        *(Interaction(pair, 0.6) for pair in ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))),
        *(Interaction((f,), 0.15, integer=j, latent_dim=1) for f, j in ((0, 0), (4, 2), (7, 5))),
        *(Interaction(triple, 0.35) for triple in ((2, 4, 8), (4, 7, 8))),
    ),
    click_rate=0.22,
    main=0.15,
    slope=0.12,
)
"""Orders 1 to 3. The interactions dominate, so a linear model falls short."""
PLANTED = Recipe(
    {"train": 2_000_000, "validation": 200_000, "test": 200_000},
    (*(4, 5, 4, 5, 4) * 4, 40, 25, 60, 30, 100, 50),
    (
        *(Interaction((f, f + 1), 0.25, latent_dim=1) for f in range(20) if f % 5 < 4),
        *(
            Interaction(tuple(range(f, f + order)), scale, latent_dim=1)
            for f in (0, 5, 10, 15)
            for order, scale in ((3, 0.15), (4, 0.4), (5, 0.55))
        ),
        *(Interaction((f, f + 1), 0.25, integer=f, latent_dim=1) for f in (0, 6)),
    ),
    click_rate=0.25,
    main=0.05,
    slope=0.05,
    has_shared_factors=True,
)
"""Orders 1 to 5, in four chains of five categories. More than half of the variance of z is of orders 4 and 5, so depth
pays; the pairs of neighbors teach a model the factors."""
RECIPES = {"quickstart": QUICKSTART, "planted": PLANTED}


def generated_log(name: str) -> Recipe | None:
    """The recipe of a generated log, such as `planted` or, with 500,000 training rows, `planted-500k`; else None.

    The other splits shrink or grow alike.
    """
    named = re.fullmatch(rf"({'|'.join(RECIPES)})(?:-([1-9]\d*)([kM]))?", name)
    recipe = RECIPES[named[1]] if named else None
    if recipe is None or named[2] is None:
        return recipe
    train = int(named[2]) * {"k": 1_000, "M": 1_000_000}[named[3]]
    return replace(recipe, rows={split: rows * train // recipe.rows["train"] for split, rows in recipe.rows.items()})


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

    def __init__(self, seed: int = 0, recipe: Recipe = QUICKSTART) -> None:
        self.seed, self.recipe = seed, recipe
        rng = _generator(seed, 0)
        shares = [_zipf(count) for count in recipe.cardinalities]
        self._popularity = [np.cumsum(share) for share in shares]
        self._main = [rng.normal(0, recipe.main, count) for count in recipe.cardinalities]
        self._slopes = rng.normal(0, recipe.slope, NUM_INTEGERS)
        shared: dict[int, np.ndarray] = {}

        def factors(feature: int, latent_dim: int) -> np.ndarray:
            if feature in shared:
                return shared[feature]
            drawn = rng.normal(0, 1, (recipe.cardinalities[feature], latent_dim))
            if recipe.has_shared_factors:
                drawn -= shares[feature] @ drawn
                drawn /= np.sqrt(shares[feature] @ drawn**2)
                shared[feature] = drawn
            return drawn

        self._factors = []
        for interaction in recipe.interactions:
            first, *others = (factors(feature, interaction.latent_dim) for feature in interaction.categories)
            self._factors.append((first * (interaction.scale / interaction.latent_dim**0.5), *others))
        self._blank_integer = rng.uniform(0, 0.25, NUM_INTEGERS)
        self._blank_category = np.where(rng.random(NUM_CATEGORIES) < 0.4, rng.uniform(0, 0.2, NUM_CATEGORIES), 0.0)
        self._location = rng.uniform(0.5, 4.0, NUM_INTEGERS)
        self._spread = rng.uniform(0.6, 1.4, NUM_INTEGERS)
        self._bias = self._bias_for(recipe.click_rate)

    def draw(self, rows: int, *stream: int) -> Rows:
        """Draw `rows` rows. The same `stream` gives the same rows."""
        rng = _generator(self.seed, 1, *stream)
        integers, categories = self._draw_features(rng, rows)
        probabilities = self.probabilities_of(integers, categories)
        return Rows(probabilities, (rng.random(rows) < probabilities).astype(np.int8), integers, categories)

    def probabilities_of(self, integers: np.ndarray, categories: np.ndarray) -> np.ndarray:
        """The true click probabilities of rows, (R,)."""
        return 1 / (1 + np.exp(-self._score(integers, categories) - self._bias))

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
        for interaction, factors in zip(self.recipe.interactions, self._factors, strict=True):
            product = math.prod(map(of, factors, interaction.categories)).sum(1)
            z += product if interaction.integer is None else product * t[:, interaction.integer]
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


def generate_click_log(folder: str | Path, rows: Mapping[str, int], seed: int = 0, recipe: Recipe = QUICKSTART) -> None:
    """Write `<split>.tsv.gz` for each split in `rows`, and truth.json.

    truth.json is {"version", "seed", "files": {name: {"rows", "clicks", "best_possible_ne"}}}. best_possible_ne is the
    normalized entropy of the labels under the true probabilities (paper 4.1). The file is written last, so a folder
    without it is incomplete. The same rows, seed and recipe give the same bytes. Holds 100,000 rows in memory at a
    time. A folder holds the logs of one recipe.

    Raises ValueError if a split has so few rows that all or none of them are clicks.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRUTH_FILE).unlink(missing_ok=True)
    model, truths = ClickModel(seed, recipe), {}
    with tempfile.TemporaryDirectory(dir=folder) as drafts:
        for number, (split, count) in enumerate(rows.items()):
            draft = Path(drafts, f"{split}.tsv.gz")
            truths[draft.name] = _write_file(draft, model, count, number)
            draft.replace(folder / draft.name)
    content = {"version": VERSION, "seed": seed, "files": truths}
    write_atomically(folder / TRUTH_FILE, json.dumps(content, indent=2) + "\n")


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


def _write_file(path: Path, model: ClickModel, rows: int, number: int) -> dict[str, float]:
    logloss, clicks = 0.0, 0
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as file:
        for chunk, first in enumerate(range(0, rows, CHUNK_ROWS)):
            drawn = model.draw(min(CHUNK_ROWS, rows - first), number, chunk)
            file.write(_as_tsv(drawn, model.recipe.cardinalities))
            click_chance = np.where(drawn.labels == 1, drawn.probabilities, 1 - drawn.probabilities)
            logloss -= float(np.log(click_chance).sum())
            clicks += int(drawn.labels.sum())
        if not 0 < clicks < rows:
            raise ValueError(f"{path.name}: {clicks} of {rows} rows are clicks, so it has no NE. Generate more rows.")
    rate = clicks / rows
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
    return {"rows": rows, "clicks": clicks, "best_possible_ne": logloss / rows / entropy}


def _as_tsv(rows: Rows, cardinalities: tuple[int, ...]) -> bytes:
    columns = {"label": pl.Series(rows.labels)}
    for j in range(NUM_INTEGERS):
        columns[f"I{j + 1}"] = pl.Series(rows.integers[:, j]).fill_nan(None).cast(pl.Int64)
    for f in range(NUM_CATEGORIES):
        # The last name, "", is for a blank (-1).
        names = pl.Series([*(f"{_name(f, c):08x}" for c in range(cardinalities[f])), ""])
        columns[f"C{f + 1}"] = names.gather(rows.categories[:, f])
    return pl.DataFrame(columns).write_csv(include_header=False, separator="\t", quote_style="never").encode()


def _name(feature: int, category: int) -> int:
    """Return 32 random-looking bits, unique within a feature because an odd multiplier is a permutation."""
    return ((category + 1) * 2654435761 + (feature + 1) * 40503 * 65537) % 2**32


def _zipf(count: int) -> np.ndarray:
    weights = 1 / (np.arange(count) + 3.0)
    return weights / weights.sum()


def _generator(*seeds: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seeds)))
