"""The grid of tools/bench/plan.py, and a rank's work: builds each technique, measures seconds and live bytes."""

import argparse
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import DsConfig
from dhen.data.loading.batches import Batch
from dhen.model.configuration_dhen import DhenConfig, SparseFeature
from dhen.planner.live_memory import LiveMemory
from dhen.planner.machine import Machine, read_machine
from dhen.planner.minimum_set import Job, Planner
from dhen.planner.step_time import compute_seconds, segments
from dhen.planner.step_trace import trace_step
from dhen.planner.technique import SCHEMES, Technique
from dhen.runtime.topology import Topology
from dhen.training.parallel_model import ParallelDhen
from dhen.training.parallelize import lay_out, parallelize
from tools.bench.clock import largest, median_seconds
from tools.bench.small_work import NUM_DENSE, random_batch, take_step
from tools.bench.stand_ins import paused, replace_reduce_scatter, run_under_a_cap

POINTS_FILE, TRAINED_FILE = "points.json", "trained.json"
BATCH = 64
TABLES = [SparseFeature(f"C{index}", 1000) for index in range(8)]
TECHNIQUES = (
    "dp", "dp+recompute", "zero1", "zero1+recompute", "zero2", "zero2+recompute", "zero2+offload", "hsdp",
    "hsdp+recompute", "hsdp+offload", "zero3", "zero3+recompute", "zero3+offload", "zero3+recompute+offload",
)  # fmt: skip
_WARM = 3
"""Steps after which DeepSpeed's stage 3 knows the order of the modules."""
_MEASURED = 2
_CALIBRATIONS, _REPETITIONS, _CALIBRATION_BYTES = 5, 3, 2**18
_PASSES = 3
"""Passes of the ring: two of an all-reduce and one of an all-gather."""


@dataclass(frozen=True)
class Point:
    """One technique at one depth: peak bytes of the fullest rank and seconds per step, measured and predicted."""

    depth: int
    technique: str
    peak: int
    seconds: float
    predicted_peak: int
    predicted_seconds: float

    @property
    def error(self) -> float:
        """Relative error of the predicted peak."""
        return self.predicted_peak / self.peak - 1


def techniques(depth: int, names: Iterable[str]) -> Iterator[Technique]:
    """The techniques with these names. One that recomputes does so in all layers; stage 3 offloads parameters too."""
    for name in names:
        scheme, *more = name.split("+")
        offload = "parameters" if SCHEMES[scheme] == 3 else "optimizer"
        yield Technique(scheme, depth if "recompute" in more else 0, offload if "offload" in more else "none")


def machine_of(arguments: argparse.Namespace) -> Machine:
    """The cluster of tools/cluster.py with the accelerator that the pauses stand for. Its links are not measured."""
    return read_machine(
        "cpu",
        ranks_per_node=arguments.ranks_per_node,
        memory_gib=(arguments.cap_mib or 1024) / 1024,
        flops={"fp32": arguments.gflops * 1e9},
        memory_bytes_per_second=2e9,
        local_bytes_per_second=(arguments.local_mbit or 1e5) * 125e3,
        node_bytes_per_second=(arguments.link_mbit or 1e5) * 125e3,
        can_overlap=True,
        seconds_per_operation=0.0,
        seconds_per_collective=0.0,
    )


def job_of(depth: int, arguments: argparse.Namespace, machine: Machine | None = None) -> Job:
    """The model of the grid at a depth. machine: by default without measured links."""
    config = DhenConfig(
        num_dense_features=NUM_DENSE,
        sparse_features=[{"name": table.name, "num_embeddings": table.num_embeddings} for table in TABLES],
        embedding_dim=arguments.embedding_dim,
        num_layers=depth,
        num_embeddings_out=arguments.num_embeddings_out,
        interactions=["advanced_dlrm", "self_attention", "linear", "deep_cross_flattened"],
    )
    return Job(config, BATCH, machine or machine_of(arguments), nodes=arguments.nodes)


def measure_points(topology: Topology, arguments: argparse.Namespace) -> list[Point]:
    """Measure all depths, or end the rank after training under a cap. Communicates; all ranks call it."""
    replace_reduce_scatter()
    if arguments.cap_mib:
        train_under_a_cap(topology, arguments)
    machine = machine_of(arguments)
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
        whole, shard = torch.zeros(ranks * elements), torch.zeros(elements)

        def exchange() -> None:
            for _ in range(_REPETITIONS):
                dist.all_reduce(whole)
                dist.all_gather_into_tensor(whole, shard)

        return median_seconds(exchange, topology, _CALIBRATIONS) / _REPETITIONS

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
            step = functools.partial(take_step, model, batch_of(topology))
            for _ in range(_WARM):
                step()
            peaks[technique] = worst_of_ranks(topology, memory, step)
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


def worst_of_ranks(topology: Topology, memory: LiveMemory, step: Callable[[], None]) -> int:
    """Peak bytes of the fullest rank. Communicates; all ranks call it.

    A rank takes the lowest peak of several steps, because gloo's threads may free their tensors late.
    """
    peaks = []
    for _ in range(_MEASURED):
        memory.reset_peak()
        step()
        peaks.append(memory.peak)
    return int(largest(topology, min(peaks)))


def build(planner: Planner, technique: Technique, topology: Topology) -> ParallelDhen:
    """The model under the technique's ds_config. Communicates; all ranks call it."""
    whole = planner.whole_ds_config(technique)
    section = DhenSection(**whole.pop("dhen", {}))
    settings = whole | {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}},
    }
    settings.pop("train_batch_size")
    return parallelize(lay_out(planner.job.config, topology, DsConfig("tools/bench/plan.py", settings, section)))


def batch_of(topology: Topology) -> Batch:
    """One rank's examples."""
    return random_batch(TABLES, BATCH, topology.rank)


def add_pauses(planner: Planner, model: ParallelDhen) -> None:
    """Let every layer take as long as its operations do at the machine's rates, also when it is recomputed."""
    trace = trace_step(planner.job.config, BATCH)
    seconds: dict[tuple[int | None, bool], float] = defaultdict(float)
    for part in segments(trace, None):
        seconds[part.layer, part.is_backward] += compute_seconds(part.work, planner.job.machine)
    for index, layer in enumerate(model.engine.module.model.layers):
        forward, backward = seconds[index, False], seconds[index, True]
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
    take_step(build(Planner(job_of(1, arguments)), plain, topology), batch_of(topology))
    planner = Planner(job_of(depth, arguments))
    (technique,) = techniques(depth, arguments.techniques)

    def train() -> bool:
        model = build(planner, technique, topology)
        for _ in range(_WARM + 1):
            take_step(model, batch_of(topology))
        return True

    run_under_a_cap(arguments.cap_mib, arguments.output / TRAINED_FILE, topology, train)
