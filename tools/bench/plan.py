"""Compares the planner's predictions with training runs: memory and seconds by depth and technique (paper 3.1).

    python tools/bench/plan.py --depths 1 4 12
    python tools/bench/plan.py --depths 1 4 12 32 --rounds 0 --link_mbit 0 --local_mbit 0

The first command builds a cluster on this machine (tools/cluster.py) and trains every technique at every depth. It
measures the peak bytes of live tensors on the fullest rank, and the seconds per step. A pause stands for the
accelerator: it lasts as long as the layer's operations take at the machine's rates, in all techniques, and again when a
layer is recomputed. Before that, the ranks measure what an all-reduce and an all-gather get of the links' rates. The
command prints measurements beside predictions, with the median and worst error of memory, and with Kendall's tau of the
order by speed. Links and accelerator are slow, so that the ranks' shortage of CPU cores hardly matters.

The second command measures memory only, on unlimited links.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import functools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import DsConfig
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.sparse_feature import SparseFeature
from dhen.planner.job import Job
from dhen.planner.live_memory import LiveMemory
from dhen.planner.machine import Machine, read_machine
from dhen.planner.minimum_set import Planner
from dhen.planner.step_time import compute_seconds
from dhen.planner.step_trace import trace_step
from dhen.planner.technique import SCHEMES, Technique
from dhen.runtime.topology import Topology
from dhen.training.parallel_model import ParallelDhen
from dhen.training.parallelize import lay_out, parallelize
from tools.bench import launch
from tools.bench.clock import in_turns, largest, median_seconds
from tools.bench.report import print_table
from tools.bench.small_work import NUM_DENSE, OPTIMIZER, random_batch, take_step
from tools.bench.stand_ins import paused, replace_reduce_scatter
from tools.cluster import add_arguments

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
        flops={"fp32": arguments.gflops * 1e9},
        memory_bytes_per_second=2e9,
        local_bytes_per_second=(arguments.local_mbit or 1e5) * 125e3,
        node_bytes_per_second=(arguments.link_mbit or 1e5) * 125e3,
        can_overlap=True,
        seconds_per_operation=0.0,
        seconds_per_collective=0.0,
    )


def job_of(depth: int, arguments: argparse.Namespace, machine: Machine) -> Job:
    """The model of the grid at a depth."""
    config = DhenConfig(
        num_dense_features=NUM_DENSE,
        sparse_features=[{"name": table.name, "num_embeddings": table.num_embeddings} for table in TABLES],
        embedding_dim=arguments.embedding_dim,
        num_layers=depth,
        num_embeddings_out=arguments.num_embeddings_out,
        interactions=["advanced_dlrm", "self_attention", "linear", "deep_cross_flattened"],
    )
    return Job(config, BATCH, machine, nodes=arguments.nodes)


def measure(topology: Topology, arguments: argparse.Namespace) -> list[Point]:
    """Measure the links, then all techniques at one depth. Communicates; all ranks call it."""
    replace_reduce_scatter()
    machine = machine_of(arguments)
    if arguments.rounds and topology.world_size > 1:
        machine = with_measured_links(machine, topology)
        if topology.is_main:
            efficiency, hop_ms = machine.link_efficiency, 1e3 * machine.seconds_per_collective
            print(f"collectives get {efficiency:.0%} of the links' rates, and a hop takes {hop_ms:.2f} ms", flush=True)
    (depth,) = arguments.depths
    return measure_techniques(topology, depth, arguments, machine)


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


def measure_techniques(topology: Topology, depth: int, arguments: argparse.Namespace, machine: Machine) -> list[Point]:
    """All techniques at one depth: memory one after another, then seconds in turns. Communicates; all ranks call it."""
    planner = Planner(job_of(depth, arguments, machine))
    steps: dict[Technique, Callable[[], None]] = {}
    peaks: dict[Technique, int] = {}
    for technique in techniques(depth, arguments.techniques):
        memory = LiveMemory()
        with memory:
            model = build(planner, technique, topology)
            step = functools.partial(take_step, model, random_batch(TABLES, BATCH, topology.rank))
            for _ in range(_WARM):
                step()
            peaks[technique] = worst_of_ranks(topology, memory, step)
        add_pauses(planner, model)
        steps[technique] = step

    def step_together(step: Callable[[], None]) -> None:
        step()
        topology.barrier()

    rounds = 1 + arguments.rounds if arguments.rounds else 0  # the first round warms up
    together = {technique: functools.partial(step_together, step) for technique, step in steps.items()}
    seconds = in_turns(together, topology, rounds)
    predictions = {technique: planner.predict(technique) for technique in steps}
    return [
        Point(
            depth=depth,
            technique=str(technique),
            peak=peaks[technique],
            seconds=statistics.median(seconds[technique][1:] or [0.0]),
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
        "optimizer": OPTIMIZER,
    }
    settings.pop("train_batch_size")
    return parallelize(lay_out(planner.job.config, topology, DsConfig("tools/bench/plan.py", settings, section)))


def add_pauses(planner: Planner, model: ParallelDhen) -> None:
    """Let every layer take as long as its operations do at the machine's rates, also when it is recomputed."""
    trace = trace_step(planner.job.config, BATCH)
    loss_at = trace.loss_at
    seconds: dict[tuple[int | None, bool], float] = defaultdict(float)
    for index, event in enumerate(trace.events):
        seconds[event.layer, index > loss_at] += compute_seconds(event.work, planner.job.machine)
    for index, layer in enumerate(model.engine.module.model.layers):
        forward, backward = seconds[index, False], seconds[index, True]
        inner = layer.forward
        if isinstance(inner, functools.partial):  # recomputed: the pause too
            layer.forward = functools.partial(checkpoint, paused(inner.args[0], forward, backward), use_reentrant=False)
        else:
            layer.forward = paused(inner, forward, backward)


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Pairs in the same order in both minus pairs in opposite orders, as a share of all pairs; a tie counts as 0."""
    agreement = np.sign(np.subtract.outer(first, first)) * np.sign(np.subtract.outer(second, second))
    return float(agreement.sum()) / (len(first) * (len(first) - 1))


def show(points: Sequence[Point]) -> None:
    """Print a row per point, beside what the first technique needs at that depth; then errors and agreement."""
    by_depth = {depth: [p for p in points if p.depth == depth] for depth in dict.fromkeys(p.depth for p in points)}
    rows = []
    for plain, point in ((of_depth[0], point) for of_depth in by_depth.values() for point in of_depth):
        row = [str(point.depth), point.technique, f"{point.peak / 2**20:.1f}", f"{point.predicted_peak / 2**20:.1f}"]
        row += [f"{point.error:+.1%}", f"{point.peak / plain.peak:.0%}"]
        row.append(f"{point.predicted_peak / plain.predicted_peak:.0%}")
        if point.seconds:
            row += [f"{point.seconds:.2f}", f"{point.predicted_seconds:.2f}", f"{point.seconds / plain.seconds:.2f}x"]
            row.append(f"{point.predicted_seconds / plain.predicted_seconds:.2f}x")
        rows.append(row)
    beside = f"of {points[0].technique}"
    memory = ("MiB", "predicted", "off by", beside, "predicted")
    print_table(("layers", "technique", *memory, "seconds", "predicted", beside, "predicted"), rows, ["technique"])
    errors = [abs(point.error) for point in points]
    print(f"memory, {len(points)} points: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    for depth, of_depth in by_depth.items():
        if len(of_depth) > 1 and all(point.seconds for point in of_depth):
            tau = kendall_tau([p.seconds for p in of_depth], [p.predicted_seconds for p in of_depth])
            print(f"order by speed at {depth} layers: Kendall's tau {tau:.2f}")


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, which the ranks get too."""
    parser = launch.argument_parser(__doc__)
    add_arguments(parser, link_mbit=25, local_mbit=600)
    add = parser.add_argument
    add("--depths", type=int, nargs="+", default=[1, 4, 12, 32], help="DHEN layers")
    add("--techniques", nargs="+", choices=TECHNIQUES, default=TECHNIQUES, help="techniques to train (default: all)")
    add("--embedding_dim", type=int, default=16, help="embedding dimension of the model")
    add("--num_embeddings_out", type=int, default=6, help="embeddings that each of a layer's four interactions returns")
    add("--gflops", type=float, default=1.0, help="Gflop per second of the accelerator that a pause stands for")
    add("--rounds", type=int, default=3, help="timed steps per technique; 0 measures memory only")
    add("--output", type=Path, default="runs/bench_plan", help=f"folder of {launch.RESULTS_FILE}")
    return parser.parse_args(command_line)


if __name__ == "__main__":
    sys.exit(launch.run(parse_arguments(), Point, measure, lambda points, _: show(points)))
