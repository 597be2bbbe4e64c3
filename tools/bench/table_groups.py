"""Compares tables over all ranks with table groups on a cluster: seconds, bytes between nodes (paper 3.1, figure 4).

    python tools/bench/table_groups.py --nodes 2 --ranks_per_node 2 --dims 16 64

It builds a cluster on this machine (tools/cluster.py). A step looks up Criteo's 26 tables, each with at most --max_rows
rows, and sends back a gradient of ones. In between, each rank sleeps for --dense_ms, as a host does while a GPU
computes the dense part; with 0, nothing overlaps. The ways take turns in each round; ratios are ratios of medians. A
round is --steps steps, so that an exchange every 16 steps is in it.

world: tables over all ranks. two hops: the same, with embeddings and gradients sent within each node, and then one
message to each other node. node: table groups of a node, gradients added up in each step. node, 16: moves added up
after 16 steps. node, overlap: moves added up in each step, which travel during the next one.

Ids are log-uniform, like those of click logs; with --uniform, uniform, which uses the most rows.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dhen.config.dhen_section import DhenSection
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import SparseIds
from dhen.model.sparse_feature import SparseFeature
from dhen.runtime.topology import Topology
from dhen.tables.placement.agreed import setting_of
from dhen.tables.placement.costs import read_costs
from dhen.tables.placement.plan import place_tables
from dhen.training.parallelize import shard_tables
from tools.bench import launch
from tools.bench.clock import in_turns, largest
from tools.bench.report import print_table
from tools.bench.sharding import ratios
from tools.bench.small_work import criteo_tables
from tools.cluster import add_arguments, bytes_sent

WAYS = {
    "world": DhenSection(),
    "two hops": DhenSection(all_to_all_hops=2),
    "node": DhenSection(table_group="node"),
    "node, 16": DhenSection(table_group="node", table_sync_steps=16),
    "node, overlap": DhenSection(table_group="node", table_sync_overlap=True),
}


@dataclass(frozen=True)
class Measured:
    """One way at one dimension. seconds: of a step, by round. bytes_sent: by node 0 per step. in_theory: what
    its ranks have to send, without the headers of packets.
    """

    way: str
    dim: int
    seconds: list[float]
    bytes_sent: float
    in_theory: float


def measure(topology: Topology, arguments: argparse.Namespace) -> list[Measured]:
    """Measure all ways at one dimension, in turns. Communicates; all ranks call it."""
    (dim,) = arguments.dims
    features = criteo_tables(arguments.max_rows)
    batches = [batch_of(features, arguments, seed) for seed in range(topology.rank, 1000 * arguments.steps, 1000)]
    dense = arguments.dense_ms / 1e3
    works = {name: Work(WAYS[name], features, dim, topology, batches, dense) for name in arguments.ways}
    for work in works.values():
        work.take_steps()  # warms up
        work.sent.clear()
    seconds = largest(
        topology, list(in_turns({n: w.take_steps for n, w in works.items()}, topology, arguments.rounds).values())
    )
    return [
        Measured(
            name,
            dim,
            [value / arguments.steps for value in of_way],
            statistics.median(work.sent) / arguments.steps,
            work.bytes_in_theory(),
        )
        for (name, work), of_way in zip(works.items(), seconds, strict=True)
    ]


def batch_of(features: Sequence[SparseFeature], arguments: argparse.Namespace, seed: int) -> SparseIds:
    """One id per bag: log-uniform, or uniform."""
    generator = torch.Generator().manual_seed(seed)

    def ids(rows: int) -> Tensor:
        draws = torch.rand(arguments.batch_size, generator=generator, dtype=torch.float64)
        spread = rows * draws if arguments.uniform else (rows + 1) ** draws - 1
        return spread.long().clamp(max=rows - 1)

    return SparseIds(torch.cat([ids(feature.num_embeddings) for feature in features]), len(features))


class Work:
    """The tables of one way, and their steps on this rank's batches. sent: bytes of this node, by round.

    dense: seconds between embeddings and gradients.
    """

    def __init__(
        self,
        section: DhenSection,
        features: Sequence[SparseFeature],
        dim: int,
        topology: Topology,
        batches: Sequence[SparseIds],
        dense: float,
    ) -> None:
        """Communicates; all ranks call it."""
        self._topology, self._batches, self._dense, self._step = topology, batches, dense, 0
        self.sent: list[int] = []
        size = topology.shard_size(section.table_group)
        setting = setting_of(section, topology.world_size, topology.local_size, batches[0].batch_size, size)
        placement = place_tables(features, dim, setting, read_costs("cpu"))
        self._placement = replace(placement, hops=section.all_to_all_hops)
        sparse = [{"name": feature.name, "num_embeddings": feature.num_embeddings} for feature in features]
        config = DhenConfig(sparse_features=sparse, embedding_dim=dim, num_dense_features=1)
        groups = None if size == topology.world_size else topology.shard_groups(size)
        self._tables = shard_tables(config, topology, self._placement, section, groups=groups)
        self._tables.set_learning_rate(0.01)

    def take_steps(self) -> None:
        """A step for each batch. Communicates; all ranks call it."""
        before = bytes_sent()
        for batch in self._batches:
            embeddings_BFD = self._tables(batch)
            time.sleep(self._dense)
            embeddings_BFD.sum().backward()
            self._step += 1
            self._tables.end_step(self._step, 0.0)
        self._topology.barrier()
        self.sent.append(bytes_sent() - before)

    def bytes_in_theory(self) -> float:
        """Per step of node 0, by the numbers of ids and rows of this run. Communicates; all ranks call it."""
        topology, batch = self._topology, self._batches[0].batch_size
        replicas = topology.world_size // self._placement.world_size
        if replicas > 1:
            sent = torch.tensor(self._tables.bytes_to_replicas / self._step, dtype=torch.float64)
            torch.distributed.all_reduce(sent)
            return (replicas - 1) * float(sent) / replicas
        others = [rank for rank in range(topology.world_size) if rank >= topology.local_size]
        elsewhere = sum(shard.num_columns for rank in others for shard in self._placement.of_rank(rank))
        here = sum(shard.num_columns for rank in range(topology.local_size) for shard in self._placement.of_rank(rank))
        shards = sum(len(self._placement.of_rank(rank)) for rank in others)
        # Ids and gradients leave for tables elsewhere, embeddings for examples elsewhere.
        of_own_examples = topology.local_size * batch * 4 * (shards + elsewhere)
        return of_own_examples + len(others) * batch * 4 * here


def show(results: Sequence[Measured], arguments: argparse.Namespace) -> None:
    """Print a row per dimension and way."""
    columns = ("d", "tables over", "ms/step", "x the first", "from-to", "MiB sent", "in theory", "off by")
    rows = []
    for result in results:
        base = next(each for each in results if each.dim == result.dim)
        rows.append([
            str(result.dim),
            result.way,
            f"{1e3 * statistics.median(result.seconds):.0f}",
            *ratios(base.seconds, result.seconds),
            f"{result.bytes_sent / 2**20:.2f}",
            f"{result.in_theory / 2**20:.2f}",
            f"{result.bytes_sent / result.in_theory - 1:+.1%}",
        ])  # fmt: skip
    print_table(columns, rows, left=["tables over"])
    print(f"{arguments.output} has {launch.RESULTS_FILE}")


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, which the ranks get too."""
    parser = launch.argument_parser(__doc__)
    add_arguments(parser)
    add = parser.add_argument
    add(
        "--ways", nargs="+", choices=WAYS, default=["world", "node", "node, 16"], help="the first is the base of ratios"
    )
    add("--dims", type=int, nargs="+", default=[16, 64], help="embedding dimensions")
    add("--batch_size", type=int, default=2048, help="examples per rank and step")
    add("--max_rows", type=int, default=100_000, help="most rows of a table")
    add("--uniform", action="store_true", help="ids are uniform instead of log-uniform")
    add("--dense_ms", type=float, default=0.0, help="milliseconds that the dense part takes")
    add("--steps", type=int, default=16, help="steps in a round")
    add("--rounds", type=int, default=5, help="measured rounds")
    add("--output", type=Path, default="runs/bench_table_groups", help=f"folder of {launch.RESULTS_FILE}")
    return parser.parse_args(command_line)


if __name__ == "__main__":
    sys.exit(launch.run(parse_arguments(), Measured, measure, show, over="dims"))
