"""What a rank of tools/bench/plan.py does: build each technique, take steps, count seconds and bytes alive."""

import argparse
import ctypes
import functools
import gc
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.checkpoint import checkpoint

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import DsConfig
from dhen.model.features import SparseIds
from dhen.planner.live_memory import LiveMemory
from dhen.planner.machine import Machine
from dhen.planner.minimum_set import Planner, Technique
from dhen.planner.step_time import compute_seconds, segments
from dhen.planner.step_trace import trace_step
from dhen.runtime import topology as job
from dhen.runtime.topology import Topology
from dhen.training.parallelize import ParallelDhen, parallelize
from tools.bench.plan_grid import BATCH, NUM_DENSE, ROWS, TABLES, Point, job_of, machine_of, techniques
from tools.bench.sharding_ranks import paused, replace_reduce_scatter

_WARM = 3
"""Steps until DeepSpeed's stage 3 knows the order of the modules."""
_MEASURED = 2


_CALIBRATIONS, _REPETITIONS, _CALIBRATION_BYTES = 5, 3, 2**18
_PASSES = 3
"""Of an all-reduce, which is two, and an all-gather."""


def work(arguments: argparse.Namespace) -> None:
    """Measure all depths on this rank; rank 0 writes the points. Communicates; all ranks call it."""
    topology = job.start(timeout_minutes=5)
    replace_reduce_scatter()
    if arguments.cap_mib:
        train_under_a_cap(topology, arguments)
    machine = machine_of(arguments)
    if arguments.rounds and topology.world_size > 1:
        machine = with_measured_links(machine, topology)
        if topology.is_main:
            efficiency, hop = machine.link_efficiency, 1e3 * machine.seconds_per_collective
            print(f"links give {efficiency:.0%} of their rate, and a hop takes {hop:.2f} ms", flush=True)
    points = [point for depth in arguments.depths for point in measure(topology, depth, arguments, machine)]
    if topology.is_main:
        Path(arguments.output).mkdir(parents=True, exist_ok=True)
        (Path(arguments.output) / "points.json").write_text(json.dumps([vars(point) for point in points], indent=2))
    job.stop()


def with_measured_links(machine: Machine, topology: Topology) -> Machine:
    """What an all-reduce and an all-gather over all ranks get of the links' rates, and what a hop takes, so that the
    machine says of them what was measured. Communicates; all ranks call it.
    """
    ranks = topology.world_size

    def seconds(elements: int) -> float:
        """Of both, of so many elements a rank."""
        whole, shard, times = torch.zeros(ranks * elements), torch.zeros(elements), []
        for _ in range(_CALIBRATIONS):
            topology.barrier()
            start = time.perf_counter()
            for _ in range(_REPETITIONS):
                dist.all_reduce(whole)
                dist.all_gather_into_tensor(whole, shard)
            times.append((time.perf_counter() - start) / _REPETITIONS)
        return statistics.median(times)

    elements = _CALIBRATION_BYTES // 4 // ranks
    hops, ring = seconds(1), {"nodes": ranks // topology.local_size, "ranks": ranks}
    # Where the links have no limit, a small message takes as long as a large one.
    of_bytes = max(seconds(elements) - hops, hops)
    return replace(
        machine,
        link_efficiency=_PASSES * machine.gathered(4 * ranks * elements, **ring) / of_bytes,
        seconds_per_collective=hops / _PASSES / (ranks - 1),
    )


def measure(topology: Topology, depth: int, arguments: argparse.Namespace, machine: Machine) -> list[Point]:
    """All techniques at one depth: memory one by one, then seconds interleaved. Communicates; all ranks call it."""
    planner = Planner(job_of(depth, arguments, machine))
    steps: dict[Technique, Callable[[], None]] = {}
    peaks: dict[Technique, int] = {}
    for technique in techniques(depth, arguments.techniques):
        memory = LiveMemory()
        with memory:
            model = build(planner, technique, topology)
            step = functools.partial(take_step, model, *batch(topology.rank))
            for _ in range(_WARM):
                step()
            peaks[technique] = worst_of_ranks(memory, step)
        add_pauses(planner, model)
        steps[technique] = step
    seconds: dict[Technique, list[float]] = {technique: [] for technique in steps}
    for number in range(-1 if arguments.rounds else 0, arguments.rounds):  # the first is for warming up
        for technique, step in steps.items():
            topology.barrier()
            start = time.perf_counter()
            step()
            topology.barrier()
            if number >= 0:
                seconds[technique].append(time.perf_counter() - start)
    return [
        Point(depth, str(technique), peaks[technique], statistics.median(seconds[technique] or [0.0]),
              prediction.memory.peak, prediction.seconds.total)
        for technique in steps
        for prediction in [planner.predict(technique)]
    ]  # fmt: skip


def worst_of_ranks(memory: LiveMemory, step: Callable[[], None]) -> int:
    """Bytes of the fullest rank. Of several steps a rank's least counts: gloo's threads may let go late."""
    peaks = []
    for _ in range(_MEASURED):
        memory.reset_peak()
        step()
        peaks.append(memory.peak)
    worst = torch.tensor(min(peaks))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return int(worst)


def build(planner: Planner, technique: Technique, topology: Topology) -> ParallelDhen:
    """The model as the technique's ds_config has it. Communicates; all ranks call it."""
    whole = planner.whole_ds_config(technique)
    section = DhenSection(**whole.pop("dhen", {}))
    settings = whole | {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    settings.pop("train_batch_size")
    return parallelize(planner.job.config, topology, DsConfig("tools/bench/plan.py", settings, section))


def batch(seed: int) -> tuple[SparseIds, Tensor, Tensor]:
    """A rank's examples."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, ROWS, (TABLES * BATCH,), generator=generator)
    dense_BN = torch.randn(BATCH, NUM_DENSE, generator=generator)
    return SparseIds(ids, num_features=TABLES), dense_BN, torch.randint(0, 2, (BATCH,), generator=generator).float()


def take_step(model: ParallelDhen, sparse: SparseIds, dense_BN: Tensor, labels_B: Tensor) -> None:
    """One step. Communicates; all ranks call it."""
    model.step(binary_cross_entropy_with_logits(model.score(model.look_up(sparse), dense_BN, sparse), labels_B))


def add_pauses(planner: Planner, model: ParallelDhen) -> None:
    """Let every layer take as long as the machine's file says that it computes, recomputation too."""
    trace = trace_step(planner.job.config, BATCH)
    parts = segments(trace, None)
    for index, layer in enumerate(model.engine.module.model.layers):
        forward, backward = (
            sum(
                compute_seconds(part.work, planner.job.machine)
                for part in parts
                if part.layer == index and part.is_backward == is_backward
            )
            for is_backward in (False, True)
        )
        inner = layer.forward
        if isinstance(inner, functools.partial):  # recomputed: the pause too
            layer.forward = functools.partial(checkpoint, paused(inner.args[0], forward, backward), use_reentrant=False)
        else:
            layer.forward = paused(inner, forward, backward)


def train_under_a_cap(topology: Topology, arguments: argparse.Namespace) -> NoReturn:
    """One technique at one depth with so much memory a rank; rank 0 writes whether it trained. Ends the rank."""
    (depth,), file = arguments.depths, Path(arguments.output) / "trained.json"
    warm = Planner(job_of(1, arguments))
    plain = next(iter(techniques(1, arguments.techniques)))
    # What libraries allocate once isn't the model's, and some hang rather than fail where they can't.
    take_step(build(warm, plain, topology), *batch(topology.rank))
    gc.collect()
    planner = Planner(job_of(depth, arguments))
    (technique,) = techniques(depth, arguments.techniques)
    planner.whole_ds_config(technique)
    ctypes.CDLL(None).malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    limit = int(status["VmData"].split()[0]) * 1024 + int(arguments.cap_mib * 2**20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    try:
        model = build(planner, technique, topology)
        for _ in range(_WARM + 1):
            take_step(model, *batch(topology.rank))
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        file.write_text("false")
        os._exit(1)
    topology.barrier()
    if topology.is_main:
        file.write_text("true")
    os._exit(0)
