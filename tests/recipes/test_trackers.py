"""A run reports to the trackers that it names, and from one rank alone."""

import json
import os
from pathlib import Path

import pytest

from tests.recipes.launch import TINY, run_script
from tests.training.test_trackers import wandb_run


def _offline() -> None:
    os.environ["WANDB_MODE"] = "offline"


def test_a_run_reports_to_the_trackers_that_it_names(click_log, tmp_path):
    pytest.importorskip("wandb", reason="Weights & Biases is an extra: pip install 'dhen[trackers]'")
    run = tmp_path / "run"
    flags = [f"--dataset_name={click_log}", "--ds_config=ds_configs/zero0.json", "--max_steps=2", f"--output_dir={run}"]
    done = run_script("train.py", *flags, *TINY, "--skip_test", "--report_to", "wandb", ranks=2, patch=_offline)
    assert done.status == 0, done.output
    (folder,) = (run / "wandb").glob("offline-run-*")
    config, points = wandb_run([next(folder.glob("*.wandb"))])
    assert (config["max_steps"], config["ds_config"]) == (2, "ds_configs/zero0.json")
    assert len(points["train/loss"]) == 2
    assert json.loads((run / "trackers.json").read_text())["wandb"] in folder.name
    assert not Path(run / "tensorboard").exists()
