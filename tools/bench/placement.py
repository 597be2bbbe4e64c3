"""Placements of embedding tables compared: by cost, by size, round-robin; predicted for many ranks, measured on four.

    python tools/bench/placement.py
    python tools/bench/placement.py --costs costs.json --dims 64 --measured_ranks 4

Criteo-1TB's 26 tables as MLPerf trains them; of several --ids_per_bag the tables take turns. Predicted: the longest
rank's seconds a step by the costs. Measured: a job of that many ranks on this machine's CPU, gloo between them, with
the tables capped at --max_rows; whole steps of lookup, all-to-all, its way back and update, the placements taking turns
in each round. Two figures are taken of a step: its wall-clock seconds, and the CPU seconds of the rank that has most of
them. On fewer cores than ranks the others' work fills the wall-clock time that an uneven placement would lose; the
second figure is what a core for every rank would wait for.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import json
import os
import statistics
import subprocess
import tempfile
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

CRITEO_1TB = (
    40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209, 11_938,
    155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36,
)  # fmt: skip
LOCAL_SIZE = 8


@dataclass(frozen=True)
class Problem:
    """What is to be placed."""

    tables: tuple[SparseFeature, ...]
    dim: int
    setting: StepSetting
    costs: Costs
    ids_per_bag: dict[str, float]

    def by_cost(self, max_column_shards: int | None = None) -> Placement:
        """The project's own way."""
        options = PlacementOptions(max_column_shards=max_column_shards)
        return place_tables(self.tables, self.dim, self.setting, self.costs, self.ids_per_bag, options)

    def whole_tables(self, ranks: Sequence[int]) -> Placement:
        """Table i, whole, on ranks[i]; the lower bound is as if it could be cut, as by cost it can."""
        shards = []
        for index, (table, rank) in enumerate(zip(self.tables, ranks, strict=True)):
            rows, ids = table.num_embeddings, self.ids_per_bag[table.name]
            seconds = shard_seconds(self.costs, self.setting, rows, self.dim, ids).total
            size = self.setting.shard_bytes(rows, self.dim)
            shards.append(TableShard(index, table.name, rows, 0, self.dim, rank, size, seconds))
        shards.sort(key=lambda shard: (shard.rank, shard.table))
        return Placement(tuple(shards), self.setting.world_size, (), self.by_cost().unsliceable)

    def by_size(self) -> Placement:
        """The largest table first, each to the rank with the fewest weights."""
        return self.whole_tables(longest_first([t.num_embeddings for t in self.tables], self.setting.world_size))

    def round_robin(self) -> Placement:
        """Tables in turn."""
        return self.whole_tables([index % self.setting.world_size for index in range(len(self.tables))])


WAYS: dict[str, Callable[[Problem], Placement]] = {
    "cost": Problem.by_cost,
    "cost, none cut": lambda problem: replace(problem.by_cost(1), unsliceable=problem.by_cost().unsliceable),
    "size": Problem.by_size,
    "round-robin": Problem.round_robin,
}


@dataclass(frozen=True)
class Result:
    """One placement. Seconds a step: predicted, of the longest rank; wall, cpu: measured, one of each round."""

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
    """Criteo's tables on so many ranks; capped rows are for what is measured here, whose costs are then taken."""
    tables = tuple(SparseFeature(f"C{i}", min(rows, max_rows)) for i, rows in enumerate(CRITEO_1TB))
    ids = {table.name: float(ids_per_bag[i % len(ids_per_bag)]) for i, table in enumerate(tables)}
    costs = arguments.costs if max_rows == max(CRITEO_1TB) else arguments.measured_costs
    return Problem(
        tables, dim, StepSetting(world, min(world, LOCAL_SIZE), arguments.batch_size), read_costs(costs), ids
    )


def compare(
    problem: Problem, ids_per_bag: list[int], topology: Topology | None = None, rounds: int = 0
) -> list[Result]:
    """All ways; measured where there is a job. Communicates then; all ranks call it."""
    placements = {way: place(problem) for way, place in WAYS.items()}
    seconds = measure(problem, placements, topology, rounds) if topology else {way: ([], []) for way in WAYS}
    where = (problem.setting.world_size, problem.dim, ids_per_bag)
    return [
        Result(*where, way, len(plan.shards), plan.makespan, plan.lower_bound, *seconds[way])
        for way, plan in placements.items()
    ]


def measure(
    problem: Problem, placements: dict[str, Placement], topology: Topology, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Wall-clock seconds, and CPU seconds of the busiest rank, of each round, by way. Communicates."""
    systems = {way: build(problem, plan, topology) for way, plan in placements.items()}
    seconds: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in systems}
    for number in range(rounds + 1):  # the first is for warming up
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
    setting = problem.setting
    what = {"optimizer": setting.optimizer, "table_dtype": setting.table_dtype, "init_std": 0.01}
    tables = ShardedTables(problem.tables, problem.dim, placement, topology, **what)
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
    """One row a placement: its longest rank over its lower bound, and its seconds over those of placing by cost."""
    table = Table(box=None, pad_edge=False)
    for column in (
        "ranks",
        "dim",
        "ids",
        "placed by",
        "shards",
        "x bound",
        "predicted",
        "CPU",
        "range",
        "wall",
        "range",
    ):
        table.add_column(column, justify="left" if column == "placed by" else "right")
    for result in results:
        of_case = [
            r for r in results if (r.ranks, r.dim, r.ids_per_bag) == (result.ranks, result.dim, result.ids_per_bag)
        ]
        base = next(r for r in of_case if r.way == "cost" and bool(r.wall) == bool(result.wall))
        cells = [f"{result.predicted / result.lower_bound:.3f}", f"{result.predicted / base.predicted:.2f}"]
        for part in ("cpu", "wall"):
            cells += ratio(getattr(result, part), getattr(base, part))
        ids = ",".join(map(str, result.ids_per_bag))
        table.add_row(str(result.ranks), str(result.dim), ids, result.way, str(result.shards), *cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(
        "x bound: over max(mean rank, longest shard that can't be cut). Predicted, and measured on this machine: over"
    )
    print("placing by cost; CPU: of the busiest rank, wall: of the job; medians, in rounds from-to")


def ratio(seconds: Sequence[float], base: Sequence[float]) -> tuple[str, str]:
    """Of the medians, and its range over the rounds."""
    if not seconds:
        return "-", "-"
    by_round = [own / other for own, other in zip(seconds, base, strict=True)]
    return f"{statistics.median(seconds) / statistics.median(base):.2f}", f"{min(by_round):.2f}-{max(by_round):.2f}"


def work(arguments: argparse.Namespace) -> None:
    """One rank's part of what is measured, for its number of ranks; rank 0 writes it."""
    topology = job.start()
    results = []
    for ids_per_bag in ([1], arguments.ids_per_bag):
        for dim in arguments.dims:
            problem = make_problem(arguments, topology.world_size, dim, ids_per_bag, arguments.max_rows)
            results += compare(problem, ids_per_bag, topology, arguments.rounds)
    if topology.is_main:
        write(results, Path(arguments.output))
    job.stop()


def start_ranks(ranks: int) -> list[Result]:
    """This tool in a job of that many ranks. Raises CalledProcessError."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        subprocess.run([*launcher, __file__, *sys.argv[1:], f"--output={output}"], env=environment, check=True)
        return [Result(**result) for result in json.loads(output.read_text())]


def write(results: Sequence[Result], output: Path) -> None:
    """As JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The arguments; the ranks get the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 128], help="numbers of ranks to predict for")
    parser.add_argument("--measured_ranks", type=int, nargs="*", default=[4], help="numbers of ranks to measure")
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64], help="embedding dimensions")
    parser.add_argument("--ids_per_bag", type=int, nargs="+", default=[1, 3, 10, 20], help="of a table, in turn")
    parser.add_argument("--batch_size", type=int, default=4096, help="examples of a rank")
    parser.add_argument("--max_rows", type=int, default=200_000, help="cap of a measured table's rows")
    parser.add_argument("--costs", default="gpu", help="costs to predict with: gpu, cpu or a file")
    parser.add_argument("--measured_costs", default="cpu", help="costs to predict with what is measured here")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each placement")
    parser.add_argument("--output", default="runs/bench_placement.json", help="the file to write")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Predict, measure, show."""
    arguments = parse_arguments()
    if "RANK" in os.environ:
        work(arguments)
        return 0
    results = []
    for ids_per_bag in ([1], arguments.ids_per_bag):
        for dim in arguments.dims:
            for world in arguments.ranks:
                problem = make_problem(arguments, world, dim, ids_per_bag, max(CRITEO_1TB))
                results += compare(problem, ids_per_bag)
    for ranks in arguments.measured_ranks:
        try:
            results += start_ranks(ranks)
        except subprocess.CalledProcessError as error:
            return error.returncode
    show(results)
    write(results, Path(arguments.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
