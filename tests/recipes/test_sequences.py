"""A log in which the clicks depend on how often a user saw items like the one that is shown: attention finds it."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.recipes.launch import run_script

ITEMS, KINDS, LONGEST = 60, 6, 8
ROWS = {"train": 60_000, "validation": 10_000, "test": 10_000}
ATTENTION = f"{{name: seen, separator: '|', table: item, pooling: attention, target: item, max_length: {LONGEST}}}"
MEAN = "{name: seen, separator: '|', table: item, pooling: mean}"


def log(rows: int, seed: int) -> tuple[pl.DataFrame, float]:
    """Rows, and their NE under the true chances: the logit is -2.5, and 1.5 more per item of the shown item's kind."""
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


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("sequences")
    for seed, (split, rows) in enumerate(ROWS.items()):
        frame, best = log(rows, seed)
        frame.write_csv(folder / f"{split}.csv")
    return folder, best


def test_attention_finds_what_mean_pooling_does_not(logs):
    """Within 1 % of the best possible NE; the mean of the items stays 3 % away from it."""
    folder, best = logs
    found = {}
    for name, feature in (("attention", ATTENTION), ("mean", MEAN)):
        (folder / f"{name}.yaml").write_text(f"sparse:\n  - item\n  - {feature}\n")
        flags = [f"--{key}={value}" for key, value in {
            **{f"{split}_file": folder / f"{split}.csv" for split in ROWS}, "output_dir": folder / name,
            "dataset_schema": folder / f"{name}.yaml", "ds_config": "ds_configs/zero0.json",
            "id_encoding": "vocabulary", "num_layers": 1,
            "per_device_train_batch_size": 500, "num_train_epochs": 6, "learning_rate": 0.005,
            "embedding_dim": 8,
        }.items()]  # fmt: skip
        done = run_script("train.py", *flags)
        assert done.status == 0, done.output
        found[name] = json.loads((folder / name / "summary.json").read_text())["test"]["ne"]
    assert found["attention"] < 1.01 * best
    assert found["mean"] > 1.03 * best
