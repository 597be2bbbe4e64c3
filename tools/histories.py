"""A log with users' histories: clicks depend on how many of the last items are of the kind of the item that is shown.

The logit is -2.5, and 1.5 more per item of its kind. What is read is the label, the shown item, and the items seen, the
latest last. Mean pooling cannot count those of one kind; attention with the shown item as its target can.
"""

from pathlib import Path

import numpy as np
import polars as pl

ROWS = {"train": 60_000, "validation": 10_000, "test": 10_000}
ITEMS, KINDS, LONGEST = 60, 6, 8


def histories(rows: int, seed: int) -> tuple[pl.DataFrame, float]:
    """The rows, and their normalized entropy under the true chances."""
    draw = np.random.Generator(np.random.PCG64(seed))
    item, lengths = draw.integers(0, ITEMS, rows), draw.integers(0, LONGEST + 1, rows)
    seen = draw.integers(0, ITEMS, (rows, LONGEST))
    is_like = (seen % KINDS == item[:, None] % KINDS) & (np.arange(LONGEST) < lengths[:, None])
    chance = 1 / (1 + np.exp(2.5 - 1.5 * is_like.sum(1)))
    click = draw.random(rows) < chance
    texts = ["|".join(map(str, bag[:length])) for bag, length in zip(seen, lengths, strict=True)]
    loss = -np.log(np.where(click, chance, 1 - chance)).mean()
    rate = click.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return pl.DataFrame({"label": click.astype(int), "item": item, "seen": texts}), loss / entropy


def write_histories(folder: Path) -> float:
    """Write train.csv, validation.csv and test.csv. Returns the normalized entropy of test under the true chances."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, rows) in enumerate(ROWS.items()):
        frame, best = histories(rows, seed)
        frame.write_csv(folder / f"{split}.csv")
    return best
