"""Logs with which models are compared: the planted one, and those of the CTR benchmark, made of real samples."""

from pathlib import Path

from dhen.data.schema import Schema
from tests.recipes.launch import TINY, run_script, summary

SMALL = (
    *TINY,
    "--max_steps=2",
    "--per_device_train_batch_size=64",
    "--head_mlp",
    "8",
    "--ds_config=ds_configs/zero0.json",
)


def train(folder: Path, recipe: str, *flags: str) -> Path:
    """Start a recipe and return its prepared folder."""
    done = run_script(
        "train.py", f"--config=recipes/configs/{recipe}.yaml", f"--output_dir={folder / 'run'}", *SMALL, *flags
    )
    assert done.status == 0, done.output
    (prepared,) = (folder / "prepared").glob("*/schema.json")
    return prepared.parent


def test_a_planted_log_of_any_size_trains_and_knows_its_best(tmp_path):
    schema = Schema.load(train(tmp_path, "planted", "--dataset_name=planted-3k"))
    assert {split: counts.rows for split, counts in schema.splits.items()} == {
        "train": 3000, "validation": 300, "test": 300
    }  # fmt: skip
    found = summary(tmp_path / "run")["test"]
    assert found["best_possible_ne"] == schema.best_possible_ne["test"] < found["ne"]
