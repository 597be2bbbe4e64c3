"""recipes/train.py, with training steps that are measured: a rank of an experiment on nodes runs this in its place.

Rank 0 writes measured.json to the run's folder: bytes that node 0 sends per step, seconds of a step (the median), and
bytes of the tables of all ranks with their optimizer's states. Evaluations during training are left out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that a call by path finds tools.cluster

import json
import runpy
import statistics
import time
from itertools import pairwise
from typing import Any

from dhen.training.loop import Trainer
from tools.cluster import bytes_sent
from tools.experiments import MEASURED_FILE, ROOT

train = Trainer.train


def train_and_measure(trainer: Trainer, *arguments: Any) -> bool:
    """`Trainer.train`, measured. Communicates; all ranks call it."""
    trainer.validation_loader = None  # the bytes are those of training steps
    engine, topology = trainer.model.engine, trainer.model.topology
    step = engine.step
    ends: list[float] = []

    def step_and_note() -> None:
        step()
        ends.append(time.perf_counter())

    engine.step = step_and_note
    topology.barrier()
    before = bytes_sent()
    is_stopped = train(trainer, *arguments)
    topology.barrier()
    if topology.is_main:
        measured = {
            "bytes_per_step": (bytes_sent() - before) / trainer.state.step,
            "seconds_per_step": statistics.median(after - before for before, after in pairwise(ends)),
            "table_bytes": sum(shard.num_bytes for shard in trainer.model.placement.shards),
        }
        (trainer.output_dir / MEASURED_FILE).write_text(json.dumps(measured), encoding="utf-8")
    return is_stopped


Trainer.train = train_and_measure
runpy.run_path(str(ROOT / "recipes" / "train.py"), run_name="__main__")
