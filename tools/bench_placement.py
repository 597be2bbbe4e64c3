"""Placements of embedding tables compared: by cost, by size, round-robin; predicted for many ranks, measured for a few.

    python tools/bench_placement.py
    python tools/bench_placement.py --costs costs.json --dims 64 --measured_ranks 4

Criteo-1TB's 26 tables as MLPerf trains them; of several --ids_per_bag the tables take turns. Predicted: the longest
rank's seconds a step by the costs, as a multiple of the best of the four. Measured: the tables, capped at --max_rows;
the lookups and updates of each rank's shards run by themselves, one rank after another on this machine, and the longest
counts. The all-to-all is left out of what is measured, and of what is predicted beside it.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dhen.model.configuration_dhen import SparseFeature
from dhen.parallel.placement import PlacementOptions, TableShard, longest_first, place_tables
from dhen.parallel.sharded_tables import make_lookup
from dhen.parallel.table_costs import Costs, ShardSeconds, StepSetting, read_costs, shard_seconds

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

    def seconds(self, shard: TableShard) -> ShardSeconds:
        """What the costs expect of a shard."""
        ids = self.ids_per_bag[shard.name]
        return shard_seconds(self.costs, self.setting, shard.num_embeddings, shard.num_columns, ids)


def by_cost(problem: Problem, max_column_shards: int | None = None) -> list[TableShard]:
    """The project's own way."""
    options = PlacementOptions(max_column_shards=max_column_shards)
    placement = place_tables(problem.tables, problem.dim, problem.setting, problem.costs, problem.ids_per_bag, options)
    return list(placement.shards)


def by_size(problem: Problem) -> list[TableShard]:
    """Whole tables, the largest first, each to the rank with the fewest weights."""
    sizes = [table.num_embeddings for table in problem.tables]
    return whole_tables(problem, longest_first(sizes, problem.setting.world_size))


def round_robin(problem: Problem) -> list[TableShard]:
    """Whole tables in turn."""
    return whole_tables(problem, [index % problem.setting.world_size for index in range(len(problem.tables))])


def whole_tables(problem: Problem, ranks: Sequence[int]) -> list[TableShard]:
    """Table i on ranks[i]."""
    return [
        TableShard(index, table.name, table.num_embeddings, 0, problem.dim, rank)
        for index, (table, rank) in enumerate(zip(problem.tables, ranks, strict=True))
    ]


WAYS: dict[str, Callable[[Problem], list[TableShard]]] = {
    "cost": by_cost,
    "cost, none cut": lambda problem: by_cost(problem, 1),
    "size": by_size,
    "round-robin": round_robin,
}


@dataclass(frozen=True)
class Result:
    """One placement. Seconds a step of the longest rank; measured and its prediction only where they were asked for."""

    ranks: int
    dim: int
    ids_per_bag: list[int]
    way: str
    shards: int
    predicted: float
    lower_bound: float
    predicted_tables: float | None = None
    measured: float | None = None


def compare(problem: Problem, ids_per_bag: list[int], rounds: int = 0) -> list[Result]:
    """All ways; measured if there are rounds."""
    results = []
    for way, place in WAYS.items():
        shards, world = place(problem), problem.setting.world_size
        costs = {shard: problem.seconds(shard) for shard in shards}
        totals = [sum(costs[shard].total for shard in shards if shard.rank == rank) for rank in range(world)]
        mean, longest = sum(totals) / world, max(cost.total for cost in costs.values())
        tables = measured = None
        if rounds:
            own = [[shard for shard in shards if shard.rank == rank] for rank in range(world)]
            tables = max(sum(costs[shard].lookup + costs[shard].update for shard in of_rank) for of_rank in own)
            measured = max(time_rank(problem, of_rank, rounds) for of_rank in own)
        where = (world, problem.dim, ids_per_bag, way, len(shards))
        results.append(Result(*where, max(totals), max(mean, longest), tables, measured))
    return results


def time_rank(problem: Problem, shards: Sequence[TableShard], rounds: int) -> float:
    """Median seconds of one rank's lookups and updates for the global batch."""
    if not shards:
        return 0.0
    setting = problem.setting
    sizes = [(shard.num_embeddings, shard.num_columns) for shard in shards]
    lookup = make_lookup(sizes, torch.device("cpu"), setting.optimizer, setting.table_dtype)
    lookup.set_learning_rate(0.01)
    for weight in lookup.split_embedding_weights():
        weight.fill_(0.01)  # memory that was never written isn't there yet
    counts = [int(problem.ids_per_bag[shard.name]) for shard in shards]
    lengths = torch.tensor(counts).repeat_interleave(setting.global_batch)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    seconds = []
    for _ in range(rounds + 1):  # the first is for warming up
        ids = torch.cat(
            [
                torch.randint(0, shard.num_embeddings, (count * setting.global_batch,))
                for shard, count in zip(shards, counts, strict=True)
            ]
        )
        start = time.perf_counter()
        pooled = lookup(ids, offsets)
        pooled.backward(pooled.detach())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def show(results: Sequence[Result]) -> None:
    """One row a placement; multiples of the best of its problem."""
    table = Table(box=None, pad_edge=False)
    for column in ("ranks", "dim", "ids", "placed by", "shards", "x bound", "predicted", "tables alone", "measured"):
        table.add_column(column, justify="left" if column == "placed by" else "right")
    for result in results:
        same = [r for r in results if (r.ranks, r.dim, r.ids_per_bag) == (result.ranks, result.dim, result.ids_per_bag)]

        def over_best(part: str, result: Result = result, same: list[Result] = same) -> str:
            values = [getattr(other, part) for other in same]
            return "-" if None in values else f"{getattr(result, part) / min(values):.2f}"

        ids = ",".join(map(str, result.ids_per_bag))
        table.add_row(
            str(result.ranks), str(result.dim), ids, result.way, str(result.shards),
            f"{result.predicted / result.lower_bound:.2f}",
            *(over_best(part) for part in ("predicted", "predicted_tables", "measured")),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print("x bound: over max(mean rank, longest shard) of that placement; the others: over the best of the four")


def parse_arguments() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 128], help="numbers of ranks to predict for")
    parser.add_argument("--measured_ranks", type=int, nargs="*", default=[4], help="numbers of ranks to measure")
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64], help="embedding dimensions")
    parser.add_argument("--ids_per_bag", type=int, nargs="+", default=[1, 3, 10, 20], help="of a table, in turn")
    parser.add_argument("--batch_size", type=int, default=4096, help="examples of a rank")
    parser.add_argument("--max_rows", type=int, default=1_000_000, help="cap of a measured table's rows")
    parser.add_argument("--costs", default="gpu", help="costs to predict with: gpu, cpu or a file")
    parser.add_argument("--measured_costs", default="cpu", help="costs to predict with what is measured here")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps")
    parser.add_argument("--output", default="runs/bench_placement.json", help="the file to write")
    return parser.parse_args()


def main() -> int:
    """Predict, measure, show."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    results = []
    for ids_per_bag in ([1], arguments.ids_per_bag):
        ids = {f"C{index}": float(ids_per_bag[index % len(ids_per_bag)]) for index in range(len(CRITEO_1TB))}
        for dim in arguments.dims:
            for world, costs, is_measured in (
                *((world, arguments.costs, False) for world in arguments.ranks),
                *((world, arguments.measured_costs, True) for world in arguments.measured_ranks),
            ):
                cap = arguments.max_rows if is_measured else max(CRITEO_1TB)
                tables = tuple(SparseFeature(f"C{i}", min(rows, cap)) for i, rows in enumerate(CRITEO_1TB))
                setting = StepSetting(world, min(world, LOCAL_SIZE), arguments.batch_size)
                problem = Problem(tables, dim, setting, read_costs(costs), ids)
                results += compare(problem, ids_per_bag, arguments.rounds if is_measured else 0)
    show(results)
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
