"""Compares placements of embedding tables: by cost, by size, and round-robin (paper 3.1, figure 4).

    python tools/bench/placement.py
    python tools/bench/placement.py --costs costs.json --dims 64 --measured_ranks 4

The tables are the 26 of Criteo-1TB, as MLPerf trains them. If --ids_per_bag has several values, the tables take them in
turn. For each number in --ranks, the benchmark predicts the slowest rank's seconds per step from the costs. For each
number in --measured_ranks, it starts a job on this machine's CPU, with gloo, and tables of at most --max_rows rows. A
measured step is the lookup, the all-to-all, the all-to-all of the gradients and the update. The placements take turns
in each round.

Each step has two figures: wall-clock seconds, and the CPU seconds of the busiest rank. Use the second one if the
machine has fewer cores than ranks: then other ranks use the time in which an uneven placement would wait.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, product

from dhen.model.configuration_dhen import SparseFeature
from dhen.runtime.topology import Topology
from dhen.tables.placement.costs import Costs, StepSetting, read_costs
from dhen.tables.placement.packing import longest_first
from dhen.tables.placement.plan import Placement, PlacementOptions, place_tables
from dhen.tables.sharded_tables import ShardedTables
from tools.bench.clock import largest
from tools.bench.launch import argument_parser, results_of_ranks, run, write_json
from tools.bench.report import print_table, ratios
from tools.bench.small_work import random_ids

CRITEO_1TB = (
    40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209, 11_938,
    155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36,
)  # fmt: skip
LOCAL_SIZE = 8


@dataclass(frozen=True)
class Problem:
    """The tables to place, and what their placement depends on."""

    tables: tuple[SparseFeature, ...]
    dim: int
    setting: StepSetting
    costs: Costs
    bags: list[int]

    @property
    def ids_per_bag(self) -> dict[str, int]:
        """By table; the tables take the sizes of `bags` in turn."""
        return {table.name: ids for table, ids in zip(self.tables, cycle(self.bags), strict=False)}

    def placements(self) -> dict[str, Placement]:
        """The placement of each way. The lower bound of all is that of placing by cost, which may cut tables."""
        names, ranks = [table.name for table in self.tables], self.setting.world_size
        by_size = longest_first([table.num_embeddings for table in self.tables], ranks)
        round_robin = [index % ranks for index in range(len(names))]

        def uncut(rank_of_table: list[int]) -> PlacementOptions:
            return PlacementOptions(by_hand={name: [rank] for name, rank in zip(names, rank_of_table, strict=True)})

        options = {
            "cost": PlacementOptions(),
            "cost, none cut": PlacementOptions(max_column_shards=1),
            "size": uncut(by_size),  # the largest table first; each goes to the rank with the fewest weights
            "round-robin": uncut(round_robin),
        }
        plans = {
            way: place_tables(self.tables, self.dim, self.setting, self.costs, self.ids_per_bag, asked)
            for way, asked in options.items()
        }
        return {way: replace(plan, unsliceable=plans["cost"].unsliceable) for way, plan in plans.items()}


@dataclass(frozen=True)
class Result:
    """One placement, in seconds per step. predicted: of the slowest rank. wall, cpu: measured, one per round."""

    ranks: int
    dim: int
    ids_per_bag: list[int]
    way: str
    shards: int
    predicted: float
    lower_bound: float
    wall: list[float]
    cpu: list[float]


def problems(arguments: argparse.Namespace, world: int, max_rows: int, costs: str) -> Iterator[Problem]:
    """Criteo's tables, with at most `max_rows` rows, on `world` ranks: each kind of bags with each dimension."""
    tables = tuple(SparseFeature(f"C{i}", min(rows, max_rows)) for i, rows in enumerate(CRITEO_1TB))
    setting = StepSetting(world, min(world, LOCAL_SIZE), arguments.batch_size)
    for bags, dim in product(([1], arguments.ids_per_bag), arguments.dims):
        yield Problem(tables, dim, setting, read_costs(costs), bags)


def compare(problem: Problem, topology: Topology | None = None, rounds: int = 0) -> list[Result]:
    """All placements, measured if there is a topology. Communicates in that case; all ranks call it."""
    placements = problem.placements()
    seconds = measure(problem, placements, topology, rounds) if topology else {}
    return [
        Result(
            ranks=problem.setting.world_size,
            dim=problem.dim,
            ids_per_bag=problem.bags,
            way=way,
            shards=len(plan.shards),
            predicted=plan.makespan,
            lower_bound=plan.lower_bound,
            wall=seconds[way][0] if topology else [],
            cpu=seconds[way][1] if topology else [],
        )
        for way, plan in placements.items()
    ]


def measure(
    problem: Problem, placements: dict[str, Placement], topology: Topology, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """By way: wall-clock seconds per round, and the busiest rank's CPU seconds per round. Communicates."""
    systems = {
        way: ShardedTables(problem.tables, problem.dim, plan, topology, init_std=0.01)
        for way, plan in placements.items()
    }
    for tables in systems.values():
        tables.set_learning_rate(0.01)
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in systems}
    counts = list(problem.ids_per_bag.values())
    for number in range(rounds + 1):  # the first round warms up
        sparse = random_ids(problem.tables, counts, problem.setting.batch_size, 1000 * number + topology.rank)
        for way, tables in systems.items():
            topology.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            embeddings_BFD = tables(sparse)
            embeddings_BFD.backward(embeddings_BFD.detach())
            cpu = time.process_time() - cpu_start
            topology.barrier()
            seconds[way].append((time.perf_counter() - start, cpu))
    slowest = {way: largest(topology, of_way[1:]) for way, of_way in seconds.items()}
    return {way: ([wall for wall, _ in both], [cpu for _, cpu in both]) for way, both in slowest.items()}


def show(results: Sequence[Result]) -> None:
    """One row per placement: the slowest rank over the lower bound, and the seconds over those of placing by cost."""
    base, rows = results[0], []
    for result in results:
        if result.way == "cost":  # the first one of each case
            base = result
        row = [str(result.ranks), str(result.dim), ",".join(map(str, result.ids_per_bag)), result.way]
        row += [str(result.shards), f"{result.predicted / result.lower_bound:.3f}"]
        row.append(f"{result.predicted / base.predicted:.2f}")
        for seconds, of_base in ((result.cpu, base.cpu), (result.wall, base.wall)):
            row += ratios(seconds, of_base) if seconds else ("-", "-")
        rows.append(row)
    columns = ("ranks", "dim", "ids", "placed by", "shards", "x bound", "predicted", "CPU", "range", "wall", "range")
    print_table(columns, rows, left=["placed by"])
    print("x bound: the slowest rank's predicted seconds over the mean rank's, or over the longest uncuttable shard's.")
    print("predicted, CPU, wall: seconds over those of placing by cost; CPU is the busiest rank's, wall the job's.")
    print("CPU and wall are ratios of medians; range is the ratio's range over the rounds.")


def measure_all(topology: Topology, arguments: argparse.Namespace) -> list[Result]:
    """Compare the placements in all cases on the job's ranks. Communicates; all ranks call it."""
    # Measured on this machine's CPU, whatever --costs says.
    cases = problems(arguments, topology.world_size, arguments.max_rows, costs="cpu")
    return [result for problem in cases for result in compare(problem, topology, arguments.rounds)]


def parse_arguments() -> argparse.Namespace:
    """The command line, which the ranks get too."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[8, 16, 128], help="numbers of ranks to predict for")
    add("--measured_ranks", type=int, nargs="*", default=[4], help="numbers of ranks to measure")
    add("--dims", type=int, nargs="+", default=[16, 64], help="embedding dimensions")
    add("--ids_per_bag", type=int, nargs="+", default=[1, 3, 10, 20], help="ids per bag, which the tables take in turn")
    add("--batch_size", type=int, default=4096, help="examples per rank")
    add("--max_rows", type=int, default=200_000, help="most rows of a measured table")
    add("--costs", default="gpu", help="costs for the predictions: gpu, cpu or a file")
    add("--rounds", type=int, default=9, help="measured steps per placement")
    add("--output", type=Path, default="runs/bench_placement.json", help="JSON file to write")
    return parser.parse_args()


def predict_measure_show(arguments: argparse.Namespace) -> None:
    """Predict here, measure in a job for each number of ranks, show both."""
    results = []
    for world in arguments.ranks:
        for problem in problems(arguments, world, max(CRITEO_1TB), arguments.costs):
            results += compare(problem)
    for ranks in arguments.measured_ranks:
        results += results_of_ranks(ranks, list[Result], DS_ACCELERATOR="cpu")
    show(results)
    write_json(arguments.output, results)
    print(f"{arguments.output} has the results")


if __name__ == "__main__":
    sys.exit(run(parse_arguments(), measure_all, predict_measure_show))
