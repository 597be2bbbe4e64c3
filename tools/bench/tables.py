"""Compares embedding tables (paper 3.1, figure 4): this project's, TorchRec's, and nn.EmbeddingBag under DDP.

    pip install -e '.[bench]' && pip install --no-deps torchrec==1.8.0
    python tools/bench/tables.py --ranks 1 2 4 --dims 16 64 128
    python tools/bench/tables.py --systems "ours cut" ours "ours by size" "ours round-robin" --ids_per_bag 1,3,10,20

The tables are 26 with Criteo's numbers of rows, but at most --max_rows, so that the copies of EmbeddingBag fit on every
rank. A step looks ids up and sends back a gradient of ones; then the optimizer updates the tables. It is row-wise
Adagrad, and plain Adagrad for EmbeddingBag, because torch has no row-wise one. The systems take turns in each round.
There is no dense model, so nothing overlaps with the all-to-all.

This project's tables are placed by cost, and none is cut. "ours cut" may cut them, "ours by size" puts the largest
first, each on the rank with the fewest rows, and "ours round-robin" takes the ranks in turn.
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
from itertools import product

import torch

from dhen.runtime.topology import Topology
from tools.bench.clock import largest, now
from tools.bench.launch import argument_parser, is_rank, results_of_ranks, run, write_json
from tools.bench.report import print_table, ratios
from tools.bench.small_work import random_ids
from tools.bench.table_systems import EMBEDDING_BAG, OURS, TORCHREC, Case, build, placement


@dataclass(frozen=True)
class Measured:
    """One system in one case, in each round: seconds of the slowest rank, and CPU seconds of the busiest."""

    system: str
    case: Case
    forward: list[float]
    backward: list[float]
    cpu: list[float]

    @property
    def seconds(self) -> list[float]:
        """Seconds of whole steps."""
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


def measure(case: Case, systems: Sequence[str], rounds: int, topology: Topology) -> list[Measured]:
    """Measure all systems, one step each per round. Communicates; all ranks call it."""
    steps = {system: build(system, case, topology) for system in systems}
    seeds = range(topology.rank, 4000, 1000)
    batches = [random_ids(case.tables, case.bag_sizes, case.batch_size, seed).to(topology.device) for seed in seeds]
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
    return [
        Measured(system, case, *map(list, zip(*largest(topology, of_system), strict=True)))
        for system, of_system in times.items()
    ]


def show(results: Sequence[Measured]) -> None:
    """One row per case and system, with how many times as fast it is as each base.

    Bases: TorchRec and EmbeddingBag, as far as they ran, or else the first system.
    """
    bases = [name for name in (TORCHREC, EMBEDDING_BAG) if any(result.system == name for result in results)]
    bases = bases or [results[0].system]
    columns = ["ranks", "dim", "ids", "system", "ms", "CPU ms", "predicted"]
    for base in bases:
        columns += [f"x {base}", "from-to", "forward", "backward", "CPU"]
    rows = []
    for result in results:
        case = result.case
        row = [str(case.ranks), str(case.dim), ",".join(map(str, case.ids_in_turn)), result.system]
        row += [f"{1e3 * statistics.median(seconds):.1f}" for seconds in (result.seconds, result.cpu)]
        row.append(f"{1e3 * predicted_seconds(result):.1f}" if result.system in OURS else "-")
        for name in bases:
            base = next(other for other in results if (other.case, other.system) == (case, name))
            row += ratios(base.seconds, result.seconds)
            parts = (base.forward, result.forward), (base.backward, result.backward), (base.cpu, result.cpu)
            row += [ratios(*of_part)[0] for of_part in parts]
        rows.append(row)
    print_table(columns, rows, left=["system"])
    print(
        "ms: the median step of the slowest rank. CPU ms: the median of the busiest rank. predicted: ms by the costs."
    )
    print("x: times as fast, by medians; then the range over the rounds, and the same for the forward and the backward")
    print("alone, and for CPU time.")


def predicted_seconds(result: Measured) -> float:
    """Seconds per step of the slowest rank, by the placement's costs."""
    costs, placed = "gpu" if torch.cuda.is_available() else "cpu", OURS[result.system].get("placed", "by cost")
    return placement(result.case, result.case.ranks, costs, placed=placed).makespan


def bag_sizes(text: str) -> tuple[int, ...]:
    """Ids per bag: of all tables, or those that the tables take in turn, with commas."""
    return tuple(map(int, text.split(",")))


def parse_arguments() -> argparse.Namespace:
    """The command line, which the ranks get too."""
    parser = argument_parser(__doc__)
    systems, default = [*OURS, TORCHREC, EMBEDDING_BAG], ["ours", TORCHREC, EMBEDDING_BAG]
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    add("--dims", type=int, nargs="+", default=[16, 64, 128], help="embedding dimensions")
    add("--ids_per_bag", type=bag_sizes, nargs="+", default=[(1,), (20,)], help="ids; with commas, for tables in turn")
    add("--batch_size", type=int, default=4096, help="examples per rank")
    add("--max_rows", type=int, default=100_000, help="most rows of a table")
    add("--rounds", type=int, default=9, help="measured steps per system")
    add(
        "--systems",
        nargs="+",
        default=default,
        choices=systems,
        help="compared with the first, unless torchrec or embedding bag are named",
    )
    add("--output", type=Path, default="runs/bench_tables.json", help="JSON file to write")
    arguments = parser.parse_args()
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
    for dim, ids_per_bag in product(arguments.dims, arguments.ids_per_bag):
        case = Case(topology.world_size, dim, ids_per_bag, arguments.batch_size, arguments.max_rows)
        results += measure(case, arguments.systems, arguments.rounds, topology)
    return results


def start_and_show(arguments: argparse.Namespace) -> None:
    """Measure each number of ranks in a job of its own, and show all."""
    results = [result for ranks in arguments.ranks for result in results_of_ranks(ranks, list[Measured])]
    write_json(arguments.output, results)
    show(results)
    print(f"{arguments.output} has the results")


if __name__ == "__main__":
    sys.exit(run(parse_arguments(), measure_all, start_and_show))
