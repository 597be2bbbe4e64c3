"""A checkpoint of the dense part that other ranks wrote: cut anew for this job, through DeepSpeed's universal form.

ZeRO saves the shards as the ranks held them. Where a job has another number of them (more or fewer ranks, another
shard group), rank 0 turns the checkpoint into one of whole weights, from which every rank takes its shard.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dhen.training.parallelize import ParallelDhen


class ReshardingError(ValueError):
    """A checkpoint that can't be cut anew; the message names the folder and what DeepSpeed said."""


def load_resharded(model: ParallelDhen, checkpoint: Path) -> None:
    """Load the dense part, weights and optimizer, of `checkpoint`. Communicates; all ranks call it.

    The ZeRO stage must be the save's. Raises ReshardingError.
    """
    folder = checkpoint / "universal"
    try:
        failure = _convert(checkpoint, folder) if model.topology.is_main else None
        model.topology.barrier()
        if not (folder / "zero").is_dir():
            raise ReshardingError(f"{checkpoint}: DeepSpeed can't convert it: {failure or 'see rank 0'}")
        with _universal(model):
            model.engine.load_checkpoint(str(checkpoint), tag=folder.name, load_lr_scheduler_states=False)
        _load_buffers(model, folder)
    finally:
        model.topology.barrier()
        if model.topology.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            (checkpoint / "latest_universal").unlink(missing_ok=True)


def _convert(checkpoint: Path, folder: Path) -> str | None:
    """Write the universal form into `folder`; returns what DeepSpeed complains of. A process of its own: it forks."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(folder), "--num_extract_workers=1"]
    done = subprocess.run([*command, "--num_merge_workers=1"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"


@contextmanager
def _universal(model: ParallelDhen) -> Iterator[None]:
    config = model.engine._config
    config.load_universal_checkpoint = True
    try:
        yield
    finally:
        config.load_universal_checkpoint = False


def _load_buffers(model: ParallelDhen, folder: Path) -> None:
    """The universal form's loader leaves out buffers, the running statistics of batch norms."""
    first, *_ = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    saved = torch.load(first, map_location="cpu", weights_only=False)["module"]
    for name, buffer in model.engine.module.named_buffers():
        if name in saved:  # the others are constants
            buffer.copy_(saved[name])
