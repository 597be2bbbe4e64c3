"""Reshards a checkpoint of the dense part for a different number of ranks, through DeepSpeed's universal checkpoint.

ZeRO saves the shards as the ranks hold them. If a job shards over a different number of ranks, rank 0 converts the
checkpoint to full weights, and each rank loads its own shard from these.
"""

import contextlib
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import deepspeed
import torch

from dhen.runtime.collectives import rank_zeros
from dhen.runtime.topology import Topology
from dhen.training.parallel_model import ParallelDhen
from dhen.training.saved.checkpoint_folder import CheckpointError, no_code_from


def load_resharded(model: ParallelDhen, checkpoint: Path) -> None:
    """Load the weights and optimizer of the dense part from `checkpoint`. Communicates; all ranks call it.

    The ZeRO stage must be that of the checkpoint. Raises CheckpointError.
    """
    config = model.engine._config
    with converted(checkpoint, model.topology) as folder:
        try:
            config.load_universal_checkpoint = True
            model.engine.load_checkpoint(str(checkpoint), tag=folder.name, load_lr_scheduler_states=False)
            _load_the_rest(model, checkpoint)
        finally:
            config.load_universal_checkpoint = False


@contextlib.contextmanager
def converted(checkpoint: Path, topology: Topology) -> Iterator[Path]:
    """The universal checkpoint, inside this context. Communicates; all ranks enter together. Raises CheckpointError."""
    folder = checkpoint / f"universal-{rank_zeros(topology, uuid4).hex}"  # other runs may convert it at the same time
    try:
        failure = _convert(checkpoint, folder) if topology.is_main else None
        topology.barrier()
        if not (folder / "zero").is_dir():
            raise CheckpointError(f"{checkpoint}: DeepSpeed cannot convert this checkpoint: {failure or 'see rank 0'}")
        yield folder
    finally:
        topology.barrier()
        if topology.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            (checkpoint / "latest_universal").unlink(missing_ok=True)


def _convert(checkpoint: Path, folder: Path) -> str | None:
    """Write the universal checkpoint to `folder`. Runs in its own process, because it forks. Returns any error.

    That process is `main` of this module, which unpickles no more than this one does.
    """
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", __name__, "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(folder), "--num_extract_workers=1"]
    done = subprocess.run([*command, "--num_merge_workers=1"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"


def _load_the_rest(model: ParallelDhen, checkpoint: Path) -> None:
    """Load the buffers (running statistics of batch norms) and the frozen weights, which DeepSpeed's loader skips."""
    files, module = checkpoint.glob("*mp_rank_00_model_states.pt"), model.engine.module
    files = sorted(files, key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)])  # by rank
    first = _load(files[0])
    for name, buffer in module.named_buffers():
        if name in first["module"]:  # other buffers are constants
            buffer.copy_(first["module"][name])
    frozen = {name: weight for name, weight in module.named_parameters() if not weight.requires_grad}
    is_sharded = any(hasattr(weight, "ds_id") for weight in frozen.values())
    is_writer = not is_sharded or model.topology.rank % model.shard_size == 0
    by_rank = [first, *map(_load, files[1:])] if is_sharded and is_writer else [first]
    for name, weight in frozen.items():
        with torch.no_grad(), deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=is_sharded):
            if is_sharded and is_writer:
                shards = [of_rank["frozen_param_fragments"][name] for of_rank in by_rank]
                weight.copy_(torch.cat(shards)[: weight.ds_numel].view(weight.ds_shape))
            elif is_writer:
                weight.copy_(first["module"][name])


def _load(file: Path) -> dict[str, Any]:
    return torch.load(file, map_location="cpu", weights_only=False)


def main() -> None:
    """Run DeepSpeed's converter with the arguments of the command line."""
    with no_code_from(Path(sys.argv[sys.argv.index("--input_folder") + 1])):
        runpy.run_module("deepspeed.checkpoint.ds_to_universal", run_name="__main__")


if __name__ == "__main__":
    main()
