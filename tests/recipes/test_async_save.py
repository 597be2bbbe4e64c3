"""A save in the background has what a save at once has, to the bit, while the next steps change everything."""

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from dhen.training.saved import checkpoint_writing
from dhen.training.saved.checkpoint_folder import no_code_from
from tests.recipes.launch import TINY, last_step, losses, run_script

STEPS, SAVED, WRITTEN = 55, 30, 50
PADDED = 13_681
"""Half of the 27,361 dense weights, rounded up."""


def flags(run: Path, click_log: Path, stage: int, async_save: str) -> list[str]:
    return [
        f"--ds_config=ds_configs/zero{stage}.json", f"--dataset_name={click_log}", f"--output_dir={run}", *TINY,
        "--per_device_train_batch_size=12", f"--max_steps={STEPS}", f"--save_steps={SAVED}", "--save_total_limit=9",
        "--eval_steps=1000", "--ema_decay=0.9", "--batch_norm=true", f"--async_save={async_save}",
    ]  # fmt: skip


class Slow:
    """The first checkpoint is written when 20 more steps are done."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def __call__(self) -> None:
        write = checkpoint_writing.CheckpointFiles.write

        def slow(files):
            if files.folder.name == f"checkpoint-{SAVED}":
                deadline = time.monotonic() + 60
                while last_step(self.run) < WRITTEN and time.monotonic() < deadline:
                    time.sleep(0.01)
            return write(files)

        checkpoint_writing.CheckpointFiles.write = slow


def contents(folder: Path) -> dict[str, list]:
    """All tensors and values of each file but the state."""
    found = {}
    with no_code_from(folder):
        for file in sorted(folder.glob("*.pt")):
            found[file.name] = tree_leaves(torch.load(file))
    return found | {file.name: tree_leaves(load_file(file)) for file in sorted(folder.glob("*.safetensors"))}


def is_same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        if left.shape == (PADDED,):  # ZeRO-3 fills up the last shard with whatever was in memory
            left, right = left[:-1], right[:-1]
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and (left == right or not isinstance(left, int | float | str | bool))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_in_the_background_as_at_once_to_the_bit(tmp_path, click_log, stage):
    runs = {name: tmp_path / name for name in ("on", "off")}
    for name, run in runs.items():
        patch = Slow(run) if name == "on" else None
        done = run_script("train.py", *flags(run, click_log, stage, name), ranks=2, patch=patch)
        assert done.status == 0, done.output
    assert losses(runs["on"]) == losses(runs["off"])
    for step in (SAVED, STEPS):
        written, expected = (contents(run / f"checkpoint-{step}") for run in runs.values())
        assert written.keys() == expected.keys()
        assert len(written) >= 5
        different = [
            name for name in expected
            if len(written[name]) != len(expected[name]) or not all(map(is_same, written[name], expected[name]))
        ]  # fmt: skip
        assert not different
