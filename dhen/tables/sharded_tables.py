"""Embedding tables, model-parallel over all ranks on FBGEMM, and the bridge to the data-parallel batch (paper 3.2.1).

For its own examples each rank has ids of all features; of the tables it has a few, or some columns of them. So ids
travel to the tables' owners by all-to-all, each owner looks up its tables for the global batch, and the pooled
embeddings travel back. In the backward gradients take the same way, and FBGEMM applies the tables' optimizer inside it.

With `overlap` none of the three is waited for at once: `send_ids` brings the next batch's ids while this one computes,
embeddings come while the dense features go through their MLP, and gradients go back under that MLP's backward.

Shapes: B examples of this rank, F sparse features, D embedding dimension, S table shards of this rank, W ranks.
"""

import contextlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from dhen.config.dhen_section import TableDtype, TableOptimizer, TableRounding
from dhen.model.configuration_dhen import SparseFeature
from dhen.model.features import SparseIds, init_table
from dhen.runtime.topology import Topology
from dhen.tables.id_exchange import IdExchange, SentIds
from dhen.tables.lookup import (
    ADAGRAD_EPSILON,
    make_lookup,
)
from dhen.tables.placement.beyond_device import MEMORY_SHARE, beyond_device
from dhen.tables.placement.plan import Placement, TableShard
from dhen.tables.pooled_exchange import WAITING, ColumnBlock, PooledExchange, PooledLayout, Wires
from dhen.tables.stochastic_rounding import RoundedTables, round_stochastically

_DECAYED_ROWS = 1 << 16
"""At once, in float32."""


class PendingEmbeddings:
    """Looked-up embeddings on their way: call it for embeddings_BFD, as often as you like."""

    def __init__(self, exchange: PooledExchange, ticket: Tensor) -> None:
        self._exchange, self._ticket = exchange, ticket
        self._embeddings_BFD: Tensor | None = None

    def __call__(self) -> Tensor:
        """Wait for them, the first time."""
        if self._embeddings_BFD is None:
            self._embeddings_BFD = self._exchange.finish(self._ticket)
        return self._embeddings_BFD


class ShardedTables(nn.Module):
    """All embedding tables of the model, of which this rank holds the shards that `placement` gives it.

    Called like `PlainTables`: SparseIds of this rank's examples -> embeddings_BFD, float32. Every forward that is
    followed by a backward updates the tables with the learning rate set before it. Forward and backward communicate
    over `topology.world`; all ranks call them in step, and may bring batches of different sizes.

    `look_up` gives the same, not waited for; `send_ids` begins a lookup to come.

    table_rounding: of fp16 tables. wires: dtypes of the all-to-all. overlap: whether communication runs under
    computation; the numbers are the same.
    epsilon: Adagrad's: an update is learning rate * g / (sqrt(sum of g^2) + epsilon). A larger one makes the first
    updates of a row small, so rows that are rarely seen stay near their start.

    Never hand this module to DeepSpeed, which would broadcast rank 0's shards over everyone's.
    """

    def __init__(
        self,
        tables: Sequence[SparseFeature],
        embedding_dim: int,
        placement: Placement,
        topology: Topology,
        *,
        optimizer: TableOptimizer = "rowwise_adagrad",
        table_dtype: TableDtype = "fp32",
        table_rounding: TableRounding = "stochastic",
        epsilon: float = ADAGRAD_EPSILON,
        seed: int = 0,
        init_std: float | None = None,
        wires: Wires | None = None,
        overlap: bool = True,
    ) -> None:
        """Communicates: all ranks make theirs together."""
        super().__init__()
        self.tables = tuple(tables)
        self.embedding_dim = embedding_dim
        self.placement = placement
        self.optimizer, self.table_dtype = optimizer, table_dtype
        self.is_frozen = False
        self._wires, self._overlap = wires or Wires(), overlap
        self._device, self._world_size = topology.device, topology.world_size
        # NCCL has a stream for each group: under ZeRO-3, whose is the world's, embeddings would wait for its weights.
        on_gpu = self._device.type == "cuda"
        self._group = dist.new_group(timeout=topology.timeout) if on_gpu else topology.world
        by_rank = [_in_order(placement.of_rank(rank)) for rank in range(topology.world_size)]
        self.shards = by_rank[topology.rank]
        self._layout = _layout(by_rank, len(self.tables), embedding_dim, topology.rank)
        self._ids = IdExchange(self.tables, by_rank, topology, overlap=overlap)
        self._lookup, self._rounded = None, None
        if self.shards:
            self._make_lookup(epsilon, rounds=table_dtype == "fp16" and table_rounding == "stochastic")
        for shard, weight in zip(self.shards, self._weights(), strict=True):
            columns = range(shard.first_column, shard.last_column)
            weight.copy_(init_table(shard.name, shard.num_embeddings, embedding_dim, columns, seed, init_std))

    def _make_lookup(self, epsilon: float, *, rounds: bool) -> None:
        cached: frozenset[int] = frozenset()
        if self._device.type == "cuda":
            memory = torch.cuda.get_device_properties(self._device).total_memory
            cached = beyond_device(self.shards, MEMORY_SHARE * memory)
        self._lookup = make_lookup(
            [(shard.num_embeddings, shard.num_columns) for shard in self.shards],
            self._device,
            self.optimizer,
            self.table_dtype,
            epsilon,
            rounds_stochastically=rounds,
            cached=cached,
        )
        if rounds and self._device.type == "cpu":
            self._rounded = RoundedTables(self._lookup, self.optimizer, epsilon)

    def forward(self, sparse: SparseIds | SentIds) -> Tensor:
        """Look up and pool: SparseIds of this rank's B examples -> embeddings_BFD.

        Raises IndexError for an id outside its table (on CUDA a device-side assertion).
        """
        return self.look_up(sparse)()

    def look_up(self, sparse: SparseIds | SentIds) -> PendingEmbeddings:
        """`forward`, without waiting for the others' embeddings."""
        with torch.no_grad() if self.is_frozen else contextlib.nullcontext():
            sent = self.send_ids(sparse) if isinstance(sparse, SparseIds) else sparse
            with record_function(WAITING):
                own = sent.result()
            own.wait()
            if self._lookup is None:
                rows = self._world_size * own.padded_batch
                pooled = torch.empty(rows, 0, device=self._device, requires_grad=torch.is_grad_enabled())
            else:
                look_up = self._rounded or self._lookup
                pooled = look_up(own.ids, own.offsets, per_sample_weights=own.weights)
            exchange = PooledExchange(
                self._layout, own.batch_size, own.padded_batch, self._group, self._wires, overlap=self._overlap
            )
            return PendingEmbeddings(exchange, exchange.start(pooled))

    def send_ids(self, sparse: SparseIds) -> SentIds:
        """Begin to bring every id to its table's owner, after the batches before. Communicates over all ranks."""
        return self._ids.send(sparse)

    def settle(self) -> None:
        """Wait until no ids are on their way."""
        self._ids.settle()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Learning rate of the updates to come. Set it before the forward: FBGEMM's backward uses the forward's."""
        if self._lookup is not None:
            self._lookup.set_learning_rate(learning_rate)
        if self._rounded is not None:
            self._rounded.learning_rate = learning_rate

    @torch.no_grad()
    def decay_whole_tables(self, rate: float) -> None:
        """Shrink every weight of every table by `rate` (learning rate times L2). Touches all rows: for small tables.

        fp16 ones are rounded stochastically: to nearest, most would never move.
        """
        for weight in self._weights():
            if weight.dtype == torch.float16:
                for rows in weight.split(_DECAYED_ROWS):
                    rows.copy_(round_stochastically(rows.float() * (1.0 - rate)))
            else:
                weight.mul_(1.0 - rate)

    def shard_tensors(self) -> list[tuple[TableShard, dict[str, Tensor]]]:
        """This rank's shards with their tensors, to read or to copy into.

        "weight" is (rows, columns); the Adagrad optimizers have "sum" too, (rows, columns) or for row-wise (rows,).
        """
        if self._lookup is None:
            return []
        tensors = [{"weight": weight} for weight in self._weights()]
        if self.optimizer != "sgd":
            for of_shard, (total,) in zip(tensors, self._lookup.split_optimizer_states(), strict=True):
                of_shard["sum"] = total
        return list(zip(self.shards, tensors, strict=True))

    def _weights(self) -> list[Tensor]:
        """Every shard's weight, to read or to write: a GPU's cache is written back to the host's memory and emptied."""
        if self._lookup is None:
            return []
        self._lookup.flush()
        self._lookup.reset_cache_states()
        return self._lookup.split_embedding_weights()


def _in_order(shards: Sequence[TableShard]) -> tuple[TableShard, ...]:
    """Of a rank's shards, those of one width side by side."""
    return tuple(sorted(shards, key=lambda shard: shard.num_columns))


def _layout(
    shards_by_rank: Sequence[Sequence[TableShard]], num_features: int, embedding_dim: int, rank: int
) -> PooledLayout:
    blocks_by_rank = tuple(
        tuple(ColumnBlock(shard.table, shard.first_column, shard.last_column) for shard in shards)
        for shards in shards_by_rank
    )
    return PooledLayout(blocks_by_rank, num_features, embedding_dim, rank)
