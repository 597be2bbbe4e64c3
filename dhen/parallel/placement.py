"""Which rank holds which part of which embedding table (paper 3.1): longest processing time first. Pure Python."""

import heapq
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dhen.model.configuration_dhen import SparseFeature


@dataclass(frozen=True)
class TableShard:
    """Columns [first_column, last_column) of table number `table`, all rows of it, on `rank`."""

    table: int
    name: str
    num_embeddings: int
    first_column: int
    last_column: int
    rank: int

    @property
    def num_columns(self) -> int:
        """Width of the shard."""
        return self.last_column - self.first_column

    @property
    def num_weights(self) -> int:
        """Rows times columns."""
        return self.num_embeddings * self.num_columns


@dataclass(frozen=True)
class Placement:
    """Every shard of every table, by rank and then by table. The same on all ranks."""

    shards: tuple[TableShard, ...]
    world_size: int
    bytes_per_weight: int = 4

    def of_rank(self, rank: int) -> tuple[TableShard, ...]:
        """The shards that `rank` holds."""
        return tuple(shard for shard in self.shards if shard.rank == rank)

    def bytes_of_rank(self, rank: int) -> int:
        """Bytes of weights on `rank`, optimizer state not counted."""
        return sum(shard.num_weights for shard in self.of_rank(rank)) * self.bytes_per_weight

    def as_dict(self) -> dict[str, Any]:
        """For placement.json in the run folder."""
        return asdict(self)

    def as_table(self) -> str:
        """The placement for a reader: one line a rank, with its tables and MiB."""
        lines = ["rank       MiB  tables"]
        for rank in range(self.world_size):
            names = ", ".join(shard.name for shard in self.of_rank(rank)) or "-"
            lines.append(f"{rank:>4} {self.bytes_of_rank(rank) / 2**20:>9.2f}  {names}")
        return "\n".join(lines)


def place_tables(
    tables: Sequence[SparseFeature], embedding_dim: int, world_size: int, bytes_per_weight: int = 4
) -> Placement:
    """Place whole tables: the largest first, each on the rank that holds the fewest weights so far (LPT)."""
    loads = [(0, rank) for rank in range(world_size)]
    shards = []
    by_size = sorted(range(len(tables)), key=lambda index: (-tables[index].num_embeddings, index))
    for index in by_size:
        load, rank = heapq.heappop(loads)
        rows = tables[index].num_embeddings
        shards.append(TableShard(index, tables[index].name, rows, 0, embedding_dim, rank))
        heapq.heappush(loads, (load + rows * embedding_dim, rank))
    shards.sort(key=lambda shard: (shard.rank, shard.table, shard.first_column))
    return Placement(tuple(shards), world_size, bytes_per_weight)
