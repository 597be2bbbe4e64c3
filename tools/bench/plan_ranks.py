"""A rank of tools/bench/plan.py: builds each technique, takes steps, measures seconds and bytes of live tensors."""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
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
from dhen.planner.minimum_set import Planner
from dhen.planner.step_time import compute_seconds, segments
from dhen.planner.step_trace import trace_step
from dhen.planner.technique import Technique
from dhen.runtime.topology import Topology
from dhen.training.parallelize import ParallelDhen, lay_out, parallelize
from tools.bench import plan_grid
from tools.bench.plan_grid import Point, job_of, techniques
from tools.bench.stand_ins import paused, replace_reduce_scatter, run_under_a_cap

_WARM = 3
"""Steps after which DeepSpeed's stage 3 knows the order of the modules."""
_MEASURED = 2
_CALIBRATIONS, _REPETITIONS, _CALIBRATION_BYTES = 5, 3, 2**18
_PASSES = 3
"""Passes of the ring: two of an all-reduce and one of an all-gather."""


def measure_points(topology: Topology, arguments: argparse.Namespace) -> list[Point]:
    """Measure all depths, or end the rank after training under a cap. Communicates; all ranks call it."""
    replace_reduce_scatter()
    if arguments.cap_mib:
        train_under_a_cap(topology, arguments)
    machine = plan_grid.machine_of(arguments)
    if arguments.rounds and topology.world_size > 1:
        machine = with_measured_links(machine, topology)
        if topology.is_main:
            efficiency, hop_ms = machine.link_efficiency, 1e3 * machine.seconds_per_collective
            print(f"collectives get {efficiency:.0%} of the links' rates, and a hop takes {hop_ms:.2f} ms", flush=True)
    return [point for depth in arguments.depths for point in measure(topology, depth, arguments, machine)]


def with_measured_links(machine: Machine, topology: Topology) -> Machine:
    """`machine` with the share of the links' rates that collectives get, and the seconds per hop, as measured.

    Communicates; all ranks call it.
    """
    ranks = topology.world_size

    def seconds(elements: int) -> float:
        """Seconds of an all-reduce and an all-gather with this many elements per rank."""
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
    hops = seconds(1)
    of_bytes = max(seconds(elements) - hops, hops)  # on unlimited links a large message is as fast as a small one
    at_full_rate = machine.gathered(4 * ranks * elements, nodes=ranks // topology.local_size, ranks=ranks)
    return replace(
        machine,
        link_efficiency=_PASSES * at_full_rate / of_bytes,
        seconds_per_collective=hops / _PASSES / (ranks - 1),
    )


def measure(topology: Topology, depth: int, arguments: argparse.Namespace, machine: Machine) -> list[Point]:
    """All techniques at one depth: memory one after another, then seconds in turns. Communicates; all ranks call it."""
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
    for number in range(-1 if arguments.rounds else 0, arguments.rounds):  # the first round warms up
        for technique, step in steps.items():
            topology.barrier()
            start = time.perf_counter()
            step()
            topology.barrier()
            if number >= 0:
                seconds[technique].append(time.perf_counter() - start)
    predictions = {technique: planner.predict(technique) for technique in steps}
    return [
        Point(
            depth=depth,
            technique=str(technique),
            peak=peaks[technique],
            seconds=statistics.median(seconds[technique] or [0.0]),
            predicted_peak=prediction.memory.peak,
            predicted_seconds=prediction.seconds.total,
        )
        for technique, prediction in predictions.items()
    ]


def worst_of_ranks(memory: LiveMemory, step: Callable[[], None]) -> int:
    """Peak bytes of the fullest rank. Communicates; all ranks call it.

    A rank takes the lowest peak of several steps, because gloo's threads may free their tensors late.
    """
    peaks = []
    for _ in range(_MEASURED):
        memory.reset_peak()
        step()
        peaks.append(memory.peak)
    worst = torch.tensor(min(peaks))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return int(worst)


def build(planner: Planner, technique: Technique, topology: Topology) -> ParallelDhen:
    """The model under the technique's ds_config. Communicates; all ranks call it."""
    whole = planner.whole_ds_config(technique)
    section = DhenSection(**whole.pop("dhen", {}))
    settings = whole | {
        "train_micro_batch_size_per_gpu": plan_grid.BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}},
    }
    settings.pop("train_batch_size")
    return parallelize(lay_out(planner.job.config, topology, DsConfig("tools/bench/plan.py", settings, section)))


def batch(seed: int) -> tuple[SparseIds, Tensor, Tensor]:
    """One rank's examples."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, plan_grid.ROWS, (plan_grid.TABLES * plan_grid.BATCH,), generator=generator)
    dense_BN = torch.randn(plan_grid.BATCH, plan_grid.NUM_DENSE, generator=generator)
    return (
        SparseIds(ids, num_features=plan_grid.TABLES),
        dense_BN,
        torch.randint(0, 2, (plan_grid.BATCH,), generator=generator).float(),
    )


def take_step(model: ParallelDhen, sparse: SparseIds, dense_BN: Tensor, labels_B: Tensor) -> None:
    """Take one step. Communicates; all ranks call it."""
    model.step(binary_cross_entropy_with_logits(model.score(model.look_up(sparse), dense_BN, sparse), labels_B))


def add_pauses(planner: Planner, model: ParallelDhen) -> None:
    """Let every layer take as long as its operations do at the machine's rates, also when it is recomputed."""
    trace = trace_step(planner.job.config, plan_grid.BATCH)
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
    """Train one technique at one depth under the cap; rank 0 writes that it trained. Communicates; ends the rank."""
    (depth,) = arguments.depths
    (plain,) = techniques(1, arguments.techniques)
    # Warm up without the cap: what libraries allocate once is not the model's, and some hang if they cannot.
    take_step(build(Planner(job_of(1, arguments)), plain, topology), *batch(topology.rank))
    planner = Planner(job_of(depth, arguments))
    (technique,) = techniques(depth, arguments.techniques)
    planner.whole_ds_config(technique)

    def train() -> bool:
        model = build(planner, technique, topology)
        for _ in range(_WARM + 1):
            take_step(model, *batch(topology.rank))
        return True

    run_under_a_cap(arguments.cap_mib, arguments.output / plan_grid.TRAINED_FILE, topology, train)
