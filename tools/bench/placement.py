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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from dhen.model.configuration_dhen import SparseFeature
from dhen.runtime.topology import Topology
from dhen.tables.placement.costs import Costs, StepSetting, read_costs, shard_seconds
from dhen.tables.placement.packing import longest_first
from dhen.tables.placement.plan import Placement, PlacementOptions, TableShard, place_tables
from dhen.tables.sharded_tables import ShardedTables
from tools.bench.clock import slowest
from tools.bench.launch import argument_parser, is_rank, measure_as_a_rank, results_of_ranks, write_json
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
    ids_per_bag: dict[str, float]

    def by_cost(self, max_column_shards: int | None = None) -> Placement:
        """By predicted seconds, as the project does it."""
        options = PlacementOptions(max_column_shards=max_column_shards)
        return place_tables(self.tables, self.dim, self.setting, self.costs, self.ids_per_bag, options)

    def whole_tables(self, ranks: Sequence[int]) -> Placement:
        """Table i, uncut, on ranks[i]. The lower bound is that of `by_cost`, which may cut tables."""
        shards = []
        for index, (table, rank) in enumerate(zip(self.tables, ranks, strict=True)):
            rows, ids = table.num_embeddings, self.ids_per_bag[table.name]
            seconds = shard_seconds(self.costs, self.setting, rows, self.dim, ids).total
            size = self.setting.shard_bytes(rows, self.dim)
            shards.append(TableShard(index, table.name, rows, 0, self.dim, rank, size, seconds))
        shards.sort(key=lambda shard: (shard.rank, shard.table))
        return Placement(tuple(shards), self.setting.world_size, (), self.by_cost().unsliceable)

    def by_size(self) -> Placement:
        """The largest table first; each goes to the rank with the fewest weights."""
        return self.whole_tables(longest_first([t.num_embeddings for t in self.tables], self.setting.world_size))

    def round_robin(self) -> Placement:
        """Table i on rank i modulo the number of ranks."""
        return self.whole_tables([index % self.setting.world_size for index in range(len(self.tables))])


WAYS: dict[str, Callable[[Problem], Placement]] = {
    "cost": Problem.by_cost,
    "cost, none cut": lambda problem: replace(problem.by_cost(1), unsliceable=problem.by_cost().unsliceable),
    "size": Problem.by_size,
    "round-robin": Problem.round_robin,
}


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


def make_problem(world: int, dim: int, ids_per_bag: list[int], batch_size: int, max_rows: int, costs: str) -> Problem:
    """Criteo's tables, with at most `max_rows` rows, on `world` ranks."""
    tables = tuple(SparseFeature(f"C{i}", min(rows, max_rows)) for i, rows in enumerate(CRITEO_1TB))
    ids = {table.name: float(ids_per_bag[i % len(ids_per_bag)]) for i, table in enumerate(tables)}
    return Problem(tables, dim, StepSetting(world, min(world, LOCAL_SIZE), batch_size), read_costs(costs), ids)


def compare(
    problem: Problem, ids_per_bag: list[int], topology: Topology | None = None, rounds: int = 0
) -> list[Result]:
    """All placements, measured if there is a topology. Communicates in that case; all ranks call it."""
    placements = {way: place(problem) for way, place in WAYS.items()}
    seconds = measure(problem, placements, topology, rounds) if topology else {}
    world, dim = problem.setting.world_size, problem.dim
    results = []
    for way, plan in placements.items():
        wall, cpu = seconds.get(way, ([], []))
        shards, predicted = len(plan.shards), plan.makespan
        results.append(Result(world, dim, ids_per_bag, way, shards, predicted, plan.lower_bound, wall, cpu))
    return results


def measure(
    problem: Problem, placements: dict[str, Placement], topology: Topology, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """By way: wall-clock seconds per round, and the busiest rank's CPU seconds per round. Communicates."""
    systems = {way: build(problem, plan, topology) for way, plan in placements.items()}
    seconds: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in systems}
    counts = [int(problem.ids_per_bag[table.name]) for table in problem.tables]
    for number in range(rounds + 1):  # the first round warms up
        sparse = random_ids(problem.tables, counts, problem.setting.batch_size, 1000 * number + topology.rank)
        for way, tables in systems.items():
            topology.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            embeddings_BFD = tables(sparse)
            embeddings_BFD.backward(embeddings_BFD.detach())
            cpu = time.process_time() - cpu_start
            topology.barrier()
            both = time.perf_counter() - start, cpu
            if number:
                for values, value in zip(seconds[way], both, strict=True):
                    values.append(slowest(topology, value))
    return seconds


def build(problem: Problem, placement: Placement, topology: Topology) -> ShardedTables:
    """This rank's tables. Communicates; all ranks call it."""
    tables = ShardedTables(
        problem.tables,
        problem.dim,
        placement,
        topology,
        optimizer=problem.setting.optimizer,
        table_dtype=problem.setting.table_dtype,
        init_std=0.01,
    )
    tables.set_learning_rate(0.01)
    return tables


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
            of_medians, lowest, highest = ratios(seconds, of_base) if seconds else ("-", "", "")
            row += [of_medians, f"{lowest}-{highest}"]
        rows.append(row)
    columns = ("ranks", "dim", "ids", "placed by", "shards", "x bound", "predicted", "CPU", "range", "wall", "range")
    print_table(columns, rows, left=["placed by"])
    print("x bound: the slowest rank's predicted seconds over the mean rank's, or over the longest uncuttable shard's.")
    print("predicted, CPU, wall: seconds over those of placing by cost; CPU is the busiest rank's, wall the job's.")
    print("CPU and wall are ratios of medians; range is the ratio's range over the rounds.")


def measure_all(topology: Topology, arguments: argparse.Namespace) -> list[Result]:
    """Compare the placements in all cases on the job's ranks. Communicates; all ranks call it."""
    results = []
    for ids_per_bag in ([1], arguments.ids_per_bag):
        for dim in arguments.dims:
            batch_size, max_rows = arguments.batch_size, arguments.max_rows
            # Measured on this machine's CPU, whatever --costs says.
            problem = make_problem(topology.world_size, dim, ids_per_bag, batch_size, max_rows, costs="cpu")
            results += compare(problem, ids_per_bag, topology, arguments.rounds)
    return results


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


def main() -> int:
    """Predict, measure, show."""
    arguments = parse_arguments()
    if is_rank():
        measure_as_a_rank(measure_all, arguments, arguments.output)
        return 0
    results = []
    for ids_per_bag in ([1], arguments.ids_per_bag):
        for dim in arguments.dims:
            for world in arguments.ranks:
                batch_size, max_rows = arguments.batch_size, max(CRITEO_1TB)
                problem = make_problem(world, dim, ids_per_bag, batch_size, max_rows, arguments.costs)
                results += compare(problem, ids_per_bag)
    for ranks in arguments.measured_ranks:
        results += [Result(**result) for result in results_of_ranks(ranks, __file__, DS_ACCELERATOR="cpu")]
    show(results)
    write_json(arguments.output, [asdict(result) for result in results])
    print(f"{arguments.output} has the results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
