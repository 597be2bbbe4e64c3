"""Embedding tables, model-parallel over all ranks on FBGEMM, and the bridge to the data-parallel batch (paper 3.2.1).

For its own examples each rank has ids of all features; of the tables it has a few, whole. So ids travel to the tables'
owners by all-to-all, each owner looks up its tables for the global batch, and the pooled embeddings travel back. In the
backward the gradients take the same way, and FBGEMM applies the tables' optimizer inside it.

Shapes: B examples of this rank, F sparse features, D embedding dimension, S table shards of this rank, W ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    BoundsCheckMode,
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

from dhen.model.configuration_dhen import SparseFeature
from dhen.model.features import SparseIds, init_table
from dhen.parallel.collectives import ColumnBlock, PooledExchange, PooledLayout, all_to_all
from dhen.parallel.placement import Placement, TableShard
from dhen.parallel.topology import Topology

TableOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd"]

_FBGEMM_OPTIMIZERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
}
ADAGRAD_EPSILON = 1e-8


@dataclass(frozen=True)
class _Exchange:
    """What all ranks know of one another's batch after the first, small all-gather."""

    batch_sizes: list[int]
    id_counts: list[list[int]]  # [from rank][to rank]
    has_lengths: bool
    has_weights: bool

    @property
    def padded_batch(self) -> int:
        return max(self.batch_sizes)


class ShardedTables(nn.Module):
    """All embedding tables of the model, of which this rank holds the shards that `placement` gives it.

    Called like `PlainTables`: SparseIds of this rank's examples -> embeddings_BFD, float32. Every forward that is
    followed by a backward updates the tables with the learning rate set before it. Forward and backward communicate
    over `topology.world`; all ranks call them in step, and may bring batches of different sizes.

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
        epsilon: float = ADAGRAD_EPSILON,
        seed: int = 0,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        self.tables = tuple(tables)
        self.embedding_dim = embedding_dim
        self.placement = placement
        self.optimizer = optimizer
        self.is_frozen = False
        self._group = topology.world
        self._device = topology.device
        self._world_size = topology.world_size
        self.shards = placement.of_rank(topology.rank)
        self._layout = _layout(placement, len(self.tables), embedding_dim, topology.rank)
        self._lookup = self._make_lookup(optimizer, epsilon)
        self._register_feature_order()
        for shard, weight in zip(self.shards, self._weights(), strict=True):
            columns = range(shard.first_column, shard.last_column)
            weight.copy_(init_table(shard.name, shard.num_embeddings, embedding_dim, columns, seed, init_std))

    def _make_lookup(self, optimizer: TableOptimizer, epsilon: float) -> SplitTableBatchedEmbeddingBagsCodegen | None:
        if not self.shards:
            return None
        on_gpu = self._device.type == "cuda"
        where = (
            (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if on_gpu else (EmbeddingLocation.HOST, ComputeDevice.CPU)
        )
        return SplitTableBatchedEmbeddingBagsCodegen(
            [(shard.num_embeddings, shard.num_columns, *where) for shard in self.shards],
            weights_precision=SparseType.FP32,
            output_dtype=SparseType.FP32,
            optimizer=_FBGEMM_OPTIMIZERS[optimizer],
            learning_rate=0.0,
            eps=epsilon,
            stochastic_rounding=False,
            pooling_mode=PoolingMode.SUM,
            bounds_check_mode=BoundsCheckMode.NONE,  # ids are checked in `forward`, before they travel
            device=self._device,
        )

    def _register_feature_order(self) -> None:
        """Buffers that say in which order features are sent: by owner, and by shard within an owner."""
        order = [shard.table for shard in self.placement.shards]
        shards_by_rank = [len(self.placement.of_rank(rank)) for rank in range(self._world_size)]
        owner = [shard.rank for shard in self.placement.shards]
        sizes = [table.num_embeddings for table in self.tables]
        is_mean = [table.pooling == "mean" for table in self.tables]
        # Received bags come rank by rank and shard by shard; FBGEMM wants them shard by shard and rank by rank.
        own, ranks = len(self.shards), self._world_size
        by_shard = torch.arange(ranks * own).view(ranks, own).t().reshape(-1)
        self._shards_by_rank = shards_by_rank
        self._has_mean = any(is_mean)
        self._is_identity_order = order == list(range(len(self.tables)))

        def buffer(name: str, values: list | Tensor, dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.as_tensor(values, dtype=dtype, device=self._device), persistent=False)

        buffer("_order", order, torch.int32)
        buffer("_owner", owner, torch.int64)
        buffer("_num_embeddings_F", sizes, torch.int64)
        buffer("_is_mean_F", is_mean, torch.bool)
        buffer("_by_shard", by_shard, torch.int32)

    def forward(self, sparse: SparseIds) -> Tensor:
        """Look up and pool: SparseIds of this rank's B examples -> embeddings_BFD.

        Raises IndexError for an id outside its table (on CUDA a device-side assertion).
        """
        if not self.tables:
            raise ValueError("This model has no sparse features, so there is nothing to look up.")
        _check_ids(sparse, self._num_embeddings_F, self.tables)
        if self.is_frozen:
            with torch.no_grad():
                return self._look_up(sparse)
        return self._look_up(sparse)

    def _look_up(self, sparse: SparseIds) -> Tensor:
        ids, offsets, weights, exchange = self._send_ids(sparse)
        if self._lookup is None:
            rows = self._world_size * exchange.padded_batch
            pooled = torch.empty(rows, 0, device=self._device, requires_grad=torch.is_grad_enabled())
        else:
            pooled = self._lookup(ids, offsets, per_sample_weights=weights)
        return PooledExchange.apply(pooled, self._layout, sparse.batch_size, exchange.padded_batch, self._group)

    def _send_ids(self, sparse: SparseIds) -> tuple[Tensor, Tensor, Tensor | None, _Exchange]:
        """Bring every id to its table's owner. Returns FBGEMM's ids, offsets and weights for this rank's shards."""
        weights = self._pooling_weights(sparse)
        exchange = self._compare_batches(sparse, weights is not None)
        if not exchange.has_lengths:
            return *self._send_single_ids(sparse), None, exchange
        return *self._send_bags(sparse, weights, exchange), exchange

    def _pooling_weights(self, sparse: SparseIds) -> Tensor | None:
        """Per-id weights under which a sum is the pooling that each feature asks for."""
        if not self._has_mean or sparse.lengths_FB is None:
            return sparse.weights
        scale_FB = torch.where(self._is_mean_F[:, None], 1.0 / sparse.lengths_FB.clamp(min=1), 1.0)
        scale = scale_FB.flatten().repeat_interleave(sparse.lengths_FB.flatten(), output_size=sparse.ids.numel())
        return scale if sparse.weights is None else scale * sparse.weights

    def _compare_batches(self, sparse: SparseIds, has_weights: bool) -> _Exchange:
        has_lengths = sparse.lengths_FB is not None or has_weights
        if sparse.lengths_FB is None:
            counts = torch.full_like(self._owner, sparse.batch_size)
        else:
            counts = sparse.lengths_FB.sum(1)[self._order]
        to_rank = torch.zeros(self._world_size, dtype=torch.int64, device=self._device).index_add_(
            0, self._owner, counts
        )
        mine = torch.cat([to_rank.new_tensor([sparse.batch_size, has_lengths, has_weights]), to_rank])
        everyone = mine.new_empty(self._world_size * mine.numel())
        dist.all_gather_into_tensor(everyone, mine, group=self._group)
        rows = everyone.view(self._world_size, -1).tolist()
        batch_sizes = [row[0] for row in rows]
        return _Exchange(
            batch_sizes=batch_sizes,
            id_counts=[row[3:] for row in rows],
            # A batch that must be padded is sent with its lengths: the padding is empty bags.
            has_lengths=any(row[1] for row in rows) or len(set(batch_sizes)) > 1,
            has_weights=any(row[2] for row in rows),
        )

    def _send_single_ids(self, sparse: SparseIds) -> tuple[Tensor, Tensor]:
        """The short way where every bag holds one id and all batches are of one size."""
        batch, own, ranks = sparse.batch_size, len(self.shards), self._world_size
        ids_FB = sparse.ids.view(len(self.tables), batch)
        sent = ids_FB if self._is_identity_order else ids_FB[self._order]
        received = all_to_all(
            sent.reshape(-1), [n * batch for n in self._shards_by_rank], [own * batch] * ranks, self._group
        )
        ids = received.view(ranks, own, batch).transpose(0, 1).reshape(-1)
        return ids, torch.arange(ids.numel() + 1, device=self._device)

    def _send_bags(
        self, sparse: SparseIds, weights: Tensor | None, exchange: _Exchange
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        batch, own, ranks = exchange.padded_batch, len(self.shards), self._world_size
        if exchange.has_weights and weights is None:
            weights = torch.ones_like(sparse.ids, dtype=torch.float32)
        lengths_FB = sparse.lengths_FB
        if lengths_FB is None:
            lengths_FB = sparse.ids.new_ones(len(self.tables), sparse.batch_size)
        lengths, ids, weights = torch.ops.fbgemm.permute_2D_sparse_data(self._order, lengths_FB, sparse.ids, weights)
        lengths = F.pad(lengths, (0, batch - sparse.batch_size))

        send, receive = exchange.id_counts[self._layout.rank], [row[self._layout.rank] for row in exchange.id_counts]
        bags = [n * batch for n in self._shards_by_rank]
        lengths = all_to_all(lengths.reshape(-1), bags, [own * batch] * ranks, self._group).view(ranks * own, batch)
        ids = all_to_all(ids, send, receive, self._group)
        if weights is not None:
            weights = all_to_all(weights, send, receive, self._group)
        if own and ranks > 1:
            lengths, ids, weights = torch.ops.fbgemm.permute_2D_sparse_data(self._by_shard, lengths, ids, weights)
        return ids, torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.reshape(-1)), weights

    def set_learning_rate(self, learning_rate: float) -> None:
        """Learning rate of the updates to come. Set it before the forward: FBGEMM's backward uses the forward's."""
        if self._lookup is not None:
            self._lookup.set_learning_rate(learning_rate)

    @torch.no_grad()
    def decay_whole_tables(self, rate: float) -> None:
        """Shrink every weight of every table by `rate` (learning rate times L2). Touches all rows: for small tables."""
        for weight in self._weights():
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
        return self._lookup.split_embedding_weights() if self._lookup is not None else []


def _layout(placement: Placement, num_features: int, embedding_dim: int, rank: int) -> PooledLayout:
    blocks_by_rank = tuple(
        tuple(ColumnBlock(shard.table, shard.first_column, shard.last_column) for shard in placement.of_rank(owner))
        for owner in range(placement.world_size)
    )
    return PooledLayout(blocks_by_rank, num_features, embedding_dim, rank)


def _check_ids(sparse: SparseIds, num_embeddings_F: Tensor, tables: Sequence[SparseFeature]) -> None:
    """Raise IndexError for an id outside its table: FBGEMM would train row 0 in its stead, or read foreign memory."""
    if sparse.num_features != len(tables):
        raise ValueError(f"The batch has {sparse.num_features} sparse features, the model {len(tables)}.")
    if sparse.lengths_FB is None:
        limit = num_embeddings_F.repeat_interleave(sparse.batch_size, output_size=sparse.ids.numel())
    else:
        limit = num_embeddings_F.repeat_interleave(sparse.lengths_FB.sum(1), output_size=sparse.ids.numel())
    is_inside = (sparse.ids >= 0) & (sparse.ids < limit)
    if sparse.ids.device.type == "cuda":
        torch._assert_async(is_inside.all())
    elif not is_inside.all():
        position = int((~is_inside).nonzero()[0])
        if sparse.lengths_FB is None:
            bag = position
        else:
            ends = sparse.lengths_FB.flatten().cumsum(0)
            bag = int(torch.searchsorted(ends, torch.tensor(position), right=True))
        table = tables[bag // sparse.batch_size]
        raise IndexError(
            f"Feature {table.name!r}, row {bag % sparse.batch_size} of the batch: id {int(sparse.ids[position])} is "
            f"outside its table, which has ids 0 to {table.num_embeddings - 1}. Prepare the data by the model's schema."
        )
