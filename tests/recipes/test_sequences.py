"""A log in which the clicks depend on how often a user saw items like the one that is shown: attention finds it."""

import json
from pathlib import Path

import pytest

from tests.recipes.launch import run_script
from tools.histories import ROWS, write_histories


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("sequences")
    return folder, write_histories(folder)


def test_attention_finds_what_mean_pooling_does_not(logs):
    """Within 1 % of the best possible NE; the mean of the items stays 3 % away from it."""
    folder, best = logs
    found = {}
    for name in ("attention", "mean"):
        flags = [f"--{key}={value}" for key, value in {
            **{f"{split}_file": folder / f"{split}.csv" for split in ROWS}, "output_dir": folder / name,
            "dataset_schema": f"recipes/configs/schemas/histories_{name}.yaml", "ds_config": "ds_configs/zero0.json",
            "config": "recipes/configs/histories.yaml",
        }.items()]  # fmt: skip
        done = run_script("train.py", *flags)
        assert done.status == 0, done.output
        found[name] = json.loads((folder / name / "summary.json").read_text())["test"]["ne"]
    assert found["attention"] < 1.01 * best
    assert found["mean"] > 1.03 * best
