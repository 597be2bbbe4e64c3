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
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from dhen.model.configuration_dhen import SparseFeature
from dhen.model.features import SparseIds
from dhen.runtime import topology as job
from dhen.runtime.topology import Topology
from dhen.tables.placement.costs import Costs, StepSetting, read_costs, shard_seconds
from dhen.tables.placement.packing import longest_first
from dhen.tables.placement.plan import Placement, PlacementOptions, TableShard, place_tables
from dhen.tables.sharded_tables import ShardedTables
from tools.bench.launch import argument_parser, is_rank, results_of_ranks

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


def make_problem(arguments: argparse.Namespace, world: int, dim: int, ids_per_bag: list[int], max_rows: int) -> Problem:
    """Criteo's tables on `world` ranks. Tables with capped rows are measured here, so they take --measured_costs."""
    tables = tuple(SparseFeature(f"C{i}", min(rows, max_rows)) for i, rows in enumerate(CRITEO_1TB))
    ids = {table.name: float(ids_per_bag[i % len(ids_per_bag)]) for i, table in enumerate(tables)}
    costs = arguments.costs if max_rows == max(CRITEO_1TB) else arguments.measured_costs
    setting = StepSetting(world, min(world, LOCAL_SIZE), arguments.batch_size)
    return Problem(tables, dim, setting, read_costs(costs), ids)


def compare(
    problem: Problem, ids_per_bag: list[int], topology: Topology | None = None, rounds: int = 0
) -> list[Result]:
    """All placements, measured if there is a topology. Communicates in that case; all ranks call it."""
    placements = {way: place(problem) for way, place in WAYS.items()}
    seconds = measure(problem, placements, topology, rounds) if topology else {}
    results = []
    for way, placement in placements.items():
        wall, cpu = seconds.get(way, ([], []))
        result = Result(
            ranks=problem.setting.world_size,
            dim=problem.dim,
            ids_per_bag=ids_per_bag,
            way=way,
            shards=len(placement.shards),
            predicted=placement.makespan,
            lower_bound=placement.lower_bound,
            wall=wall,
            cpu=cpu,
        )
        results.append(result)
    return results


def measure(
    problem: Problem, placements: dict[str, Placement], topology: Topology, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """By way: wall-clock seconds per round, and the busiest rank's CPU seconds per round. Communicates."""
    systems = {way: build(problem, plan, topology) for way, plan in placements.items()}
    seconds: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in systems}
    for number in range(rounds + 1):  # the first round warms up
        sparse = make_batch(problem, topology, number)
        for way, tables in systems.items():
            topology.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            embeddings_BFD = tables(sparse)
            embeddings_BFD.backward(embeddings_BFD.detach())
            cpu = time.process_time() - cpu_start
            topology.barrier()
            wall = time.perf_counter() - start
            largest = torch.tensor([wall, cpu], dtype=torch.float64)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=topology.world)
            if number:
                for values, value in zip(seconds[way], largest.tolist(), strict=True):
                    values.append(value)
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


def make_batch(problem: Problem, topology: Topology, seed: int) -> SparseIds:
    """Uniform ids of this rank's examples; the same for all placements."""
    generator, batch = torch.Generator().manual_seed(1000 * seed + topology.rank), problem.setting.batch_size
    counts = [int(problem.ids_per_bag[table.name]) for table in problem.tables]
    ids = [
        torch.randint(0, table.num_embeddings, (count * batch,), generator=generator)
        for table, count in zip(problem.tables, counts, strict=True)
    ]
    lengths_FB = torch.tensor(counts)[:, None].expand(-1, batch).contiguous()
    return SparseIds(torch.cat(ids), len(problem.tables), lengths_FB if max(counts) > 1 else None)


def show(results: Sequence[Result]) -> None:
    """One row per placement: the slowest rank over the lower bound, and the seconds over those of placing by cost."""
    table = Table(box=None, pad_edge=False)
    columns = ["ranks", "dim", "ids", "placed by", "shards", "x bound", "predicted", "CPU", "range", "wall", "range"]
    for column in columns:
        table.add_column(column, justify="left" if column == "placed by" else "right")
    base = results[0]
    for result in results:
        if result.way == "cost":  # the first one of each case
            base = result
        cells = [f"{result.predicted / result.lower_bound:.3f}", f"{result.predicted / base.predicted:.2f}"]
        cells += [*ratio(result.cpu, base.cpu), *ratio(result.wall, base.wall)]
        ids = ",".join(map(str, result.ids_per_bag))
        table.add_row(str(result.ranks), str(result.dim), ids, result.way, str(result.shards), *cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print("x bound: the slowest rank's predicted seconds over the mean rank's, or over the longest uncuttable shard's.")
    print("predicted, CPU, wall: seconds over those of placing by cost; CPU is the busiest rank's, wall the job's.")
    print("CPU and wall are ratios of medians; range is the ratio's range over the rounds.")


def ratio(seconds: Sequence[float], base: Sequence[float]) -> tuple[str, str]:
    """The ratio of the medians, and the ratio's range over the rounds."""
    if not seconds:
        return "-", "-"
    by_round = [own / other for own, other in zip(seconds, base, strict=True)]
    return f"{statistics.median(seconds) / statistics.median(base):.2f}", f"{min(by_round):.2f}-{max(by_round):.2f}"


def measure_all(topology: Topology, arguments: argparse.Namespace) -> list[Result]:
    """Compare the placements in all cases on the job's ranks. Communicates; all ranks call it."""
    results = []
    for ids_per_bag in ([1], arguments.ids_per_bag):
        for dim in arguments.dims:
            problem = make_problem(arguments, topology.world_size, dim, ids_per_bag, arguments.max_rows)
            results += compare(problem, ids_per_bag, topology, arguments.rounds)
    return results


def write(results: Sequence[Result], output: Path) -> None:
    """Write the results as JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


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
    add("--measured_costs", default="cpu", help="costs for the predictions beside measurements")
    add("--rounds", type=int, default=9, help="measured steps per placement")
    add("--output", default="runs/bench_placement.json", help="JSON file to write")
    return parser.parse_args()


def main() -> int:
    """Predict, measure, show."""
    arguments = parse_arguments()
    if is_rank():
        topology = job.start()
        results = measure_all(topology, arguments)
        if topology.is_main:
            write(results, Path(arguments.output))
        job.stop()
        return 0
    results = []
    for ids_per_bag in ([1], arguments.ids_per_bag):
        for dim in arguments.dims:
            for world in arguments.ranks:
                problem = make_problem(arguments, world, dim, ids_per_bag, max(CRITEO_1TB))
                results += compare(problem, ids_per_bag)
    for ranks in arguments.measured_ranks:
        results += [Result(**result) for result in results_of_ranks(ranks, __file__, DS_ACCELERATOR="cpu")]
    show(results)
    write(results, Path(arguments.output))
    print(f"{arguments.output} has the results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
