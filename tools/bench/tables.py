"""Compares embedding tables (paper 3.1, figure 4): this project's, TorchRec's, and nn.EmbeddingBag under DDP.

    pip install -e '.[bench]' && pip install --no-deps torchrec==1.8.0
    python tools/bench/tables.py --ranks 1 2 4 --dims 16 64 128

The tables are 26 with Criteo's numbers of rows, but at most --max_rows, so that the copies of EmbeddingBag fit on every
rank. A step looks ids up and sends back a gradient of ones; then the optimizer updates the tables. It is row-wise
Adagrad, and plain Adagrad for EmbeddingBag, because torch has no row-wise one. The systems take turns in each round.

There is no dense model, so nothing overlaps with the all-to-all. With --whole_step there is a dense model of two
layers, and only this project's variants are compared. That shows what stochastic rounding costs in training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import importlib.util
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dhen.runtime.topology import Topology
from dhen.tables.placement.costs import StepSetting, lookup_work, update_work
from tools.bench.clock import largest, median_seconds, now
from tools.bench.launch import argument_parser, is_rank, results_of_ranks, run, write_json
from tools.bench.report import print_table, ratios
from tools.bench.small_work import random_ids
from tools.bench.table_systems import EMBEDDING_BAG, FP16, OPTIMIZER, OURS, ROUNDED, TORCHREC, Case, build


@dataclass(frozen=True)
class Measured:
    """One system in one case: the slowest rank's seconds in each round. cpu_seconds: the sum over the ranks.

    bandwidth_share: bytes per second of the tables' memory traffic, over those of a plain copy by all ranks at once.
    """

    system: str
    case: Case
    forward: list[float]
    backward: list[float]
    cpu_seconds: list[float]
    bandwidth_share: float

    @property
    def seconds(self) -> list[float]:
        """Seconds of whole steps."""
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]

    @property
    def cpu_microseconds_per_sample(self) -> float:
        """CPU time of all threads of all ranks."""
        return 1e6 * statistics.median(self.cpu_seconds) / (self.case.ranks * self.case.batch_size)


def measure(
    case: Case, systems: Sequence[str], rounds: int, topology: Topology, *, whole_step: bool = False
) -> list[Measured]:
    """Measure all systems, one step each per round. Communicates; all ranks call it."""
    steps = {system: build(system, case, topology, whole_step=whole_step) for system in systems}
    seeds, ids_per_bag = range(topology.rank, 4000, 1000), [case.ids_per_bag] * len(case.tables)
    batches = [random_ids(case.tables, ids_per_bag, case.batch_size, seed).to(topology.device) for seed in seeds]
    times: dict[str, list[list[float]]] = {system: [] for system in steps}
    for round_number in range(-2, rounds):  # the first two rounds warm up
        for system, (forward, backward) in steps.items():
            topology.barrier()
            start, cpu = now(topology.device), time.process_time()
            embeddings = forward(batches[round_number % len(batches)])
            middle = now(topology.device)
            backward(embeddings)
            end = now(topology.device)
            if round_number >= 0:
                times[system].append([middle - start, end - middle, time.process_time() - cpu])
    copied = copy_bandwidth(topology)
    results = []
    for system, of_system in times.items():
        forward, backward, _ = map(list, zip(*largest(topology, of_system), strict=True))
        cpu_seconds = torch.tensor([cpu for *_, cpu in of_system], dtype=torch.float64, device=topology.device)
        dist.all_reduce(cpu_seconds)
        seconds = statistics.median(f + b for f, b in zip(forward, backward, strict=True))
        share = table_bytes(case, system) / seconds / copied
        results.append(Measured(system, case, forward, backward, cpu_seconds.tolist(), share))
    return results


def table_bytes(case: Case, system: str) -> float:
    """Bytes that all ranks' lookups and updates of a step read and write, with the system's dtype and optimizer."""
    setting = StepSetting(
        case.ranks,
        case.ranks,
        case.batch_size,
        optimizer=OPTIMIZER.get(system, "rowwise_adagrad"),
        table_dtype=OURS.get(system, {}).get("table_dtype", "fp32"),
    )
    bags = setting.global_batch
    works = [
        work(bags * case.ids_per_bag, bags, table.num_embeddings, case.dim, setting)
        for table in case.tables
        for work in (lookup_work, update_work)
    ]
    return sum(work.row_bytes + work.other_bytes for work in works)


def copy_bandwidth(topology: Topology) -> float:
    """Bytes per second that all ranks together read and write in a plain copy. Communicates; all ranks call it."""
    source = torch.ones(2**24, device=topology.device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), topology, rounds=5)
    return topology.world_size * 2 * source.numel() * 4 / largest(topology, seconds)


def show(results: Sequence[Measured]) -> None:
    """One row per case and system, with its speed over TorchRec's and over EmbeddingBag's if they ran."""
    names = {TORCHREC: "TorchRec", EMBEDDING_BAG: "Bag"}
    bases = {base: name for base, name in names.items() if any(result.system == base for result in results)}
    columns = ["ranks", "dim", "ids", "system", "ms", "CPU us"]
    for name in bases.values():
        columns += [f"x {name}", "from-to", "forward", "backward"]
    rows = []
    for result in results:
        case = result.case
        of_case = {other.system: other for other in results if other.case == case}
        cells = [str(case.ranks), str(case.dim), str(case.ids_per_bag), result.system]
        cells += [f"{1e3 * statistics.median(result.seconds):.1f}", f"{result.cpu_microseconds_per_sample:.1f}"]
        for base in bases:
            cells += times_as_fast(of_case[base], result) if base in of_case else ["", "", "", ""]
        rows.append([*cells, f"{result.bandwidth_share:.0%}"])
    print_table([*columns, "bandwidth"], rows, left=["system"])
    print("ms: the median step. CPU us: CPU microseconds per example. bandwidth: memory traffic over a plain copy's.")
    if bases:
        print(f"x {', x '.join(bases.values())}: times as fast, by medians; then the range over the rounds, and the")
        print("same for the forward and the backward alone.")
    for case in dict.fromkeys(result.case for result in results):
        of_case = {result.system: result for result in results if result.case == case}
        if FP16 in of_case and ROUNDED in of_case:
            whole, spread, *_ = times_as_fast(of_case[ROUNDED], of_case[FP16])
            at = f"{case.ranks} ranks, dim {case.dim}, {case.ids_per_bag} ids per bag"
            cpu = of_case[ROUNDED].cpu_microseconds_per_sample / of_case[FP16].cpu_microseconds_per_sample
            costs = f"{whole} times ({spread}) the seconds and {cpu:.2f} times the CPU time of rounding to nearest"
            print(f"stochastic rounding, {at}: {costs}")


def times_as_fast(base: Measured, result: Measured) -> list[str]:
    """How many times as fast as `base`: by medians, the range over the rounds, the forward, the backward."""
    alone = ratios(base.forward, result.forward)[0], ratios(base.backward, result.backward)[0]
    return [*ratios(base.seconds, result.seconds), *alone]


def parse_arguments() -> argparse.Namespace:
    """The command line, which the ranks get too."""
    parser = argument_parser(__doc__)
    systems = [*OURS, TORCHREC, EMBEDDING_BAG]
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 128], help="embedding dimensions")
    parser.add_argument("--ids_per_bag", type=int, nargs="+", default=[1, 20], help="ids per bag")
    parser.add_argument("--batch_size", type=int, default=4096, help="examples per rank")
    parser.add_argument("--max_rows", type=int, default=100_000, help="most rows of a table")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps per system")
    parser.add_argument("--systems", nargs="+", default=systems, choices=systems, help="systems to compare")
    parser.add_argument("--whole_step", action="store_true", help="train with a dense part; this project's tables only")
    parser.add_argument("--output", type=Path, default="runs/bench_tables.json", help="JSON file to write")
    arguments = parser.parse_args()
    arguments.systems = [system for system in arguments.systems if system in OURS or not arguments.whole_step]
    if TORCHREC in arguments.systems and importlib.util.find_spec("torchrec") is None:
        arguments.systems.remove(TORCHREC)
        if not is_rank():
            print("torchrec is not installed, so it is left out; --help shows how to install it", file=sys.stderr)
    if not arguments.systems:
        parser.error("--systems names no system that can run. Name one of this project's.")
    return arguments


def measure_all(topology: Topology, arguments: argparse.Namespace) -> list[Measured]:
    """Compare the systems in all cases on the job's ranks. Communicates; all ranks call it."""
    results = []
    for dim in arguments.dims:
        for ids_per_bag in arguments.ids_per_bag:
            case = Case(topology.world_size, dim, ids_per_bag, arguments.batch_size, arguments.max_rows)
            results += measure(case, arguments.systems, arguments.rounds, topology, whole_step=arguments.whole_step)
    return results


def start_and_show(arguments: argparse.Namespace) -> None:
    """Measure each number of ranks in a job of its own, and show all."""
    results = [result for ranks in arguments.ranks for result in results_of_ranks(ranks, list[Measured])]
    write_json(arguments.output, results)
    show(results)
    print(f"{arguments.output} has the results")


if __name__ == "__main__":
    sys.exit(run(parse_arguments(), measure_all, start_and_show))
