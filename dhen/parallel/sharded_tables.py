"""Embedding tables, model-parallel over all ranks on FBGEMM, and the bridge to the data-parallel batch (paper 3.2.1).

For its own examples each rank has ids of all features; of the tables it has a few, whole. So ids travel to the tables'
owners by all-to-all, each owner looks up its tables for the global batch, and the pooled embeddings travel back. In the
backward the gradients take the same way, and FBGEMM applies the tables' optimizer inside it.

With `overlap` none of the three is waited for at once: `send_ids` brings the next batch's ids while this one computes,
embeddings come while the dense features go through their MLP, and gradients go back under that MLP's backward.

Shapes: B examples of this rank, F sparse features, D embedding dimension, S table shards of this rank, W ranks.
"""

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
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
from dhen.parallel.background import in_background
from dhen.parallel.collectives import ColumnBlock, PooledExchange, PooledLayout, Wires, all_to_all
from dhen.parallel.placement import Placement, TableShard
from dhen.parallel.stochastic_rounding import RoundedTables, round_stochastically
from dhen.parallel.topology import Topology

TableOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd"]
TableDtype = Literal["fp32", "fp16"]
TableRounding = Literal["stochastic", "nearest"]
_DECAYED_ROWS = 1 << 16
"""At once, in float32."""

_FBGEMM_OPTIMIZERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
}
_FBGEMM_DTYPES = {"fp32": SparseType.FP32, "fp16": SparseType.FP16}
ADAGRAD_EPSILON = 1e-8


def make_lookup(
    sizes: Sequence[tuple[int, int]],
    device: torch.device,
    optimizer: TableOptimizer,
    table_dtype: TableDtype = "fp32",
    epsilon: float = ADAGRAD_EPSILON,
    *,
    rounds_stochastically: bool = False,
) -> SplitTableBatchedEmbeddingBagsCodegen:
    """FBGEMM's tables of (rows, columns) each, on `device`, summed over bags, with the optimizer in their backward.

    rounds_stochastically: fp16 updates; on the CPU FBGEMM ignores it, see `RoundedTables`.
    """
    on_gpu = device.type == "cuda"
    where = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if on_gpu else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, columns, *where) for rows, columns in sizes],
        weights_precision=_FBGEMM_DTYPES[table_dtype],
        output_dtype=SparseType.FP32,
        optimizer=_FBGEMM_OPTIMIZERS[optimizer],
        learning_rate=0.0,
        eps=epsilon,
        stochastic_rounding=rounds_stochastically,
        pooling_mode=PoolingMode.SUM,
        bounds_check_mode=BoundsCheckMode.NONE,  # ids are checked before they travel
        device=device,
    )


@dataclass(frozen=True)
class _BatchFacts:
    """What all ranks know of one another's batch after the first, small all-gather."""

    batch_sizes: list[int]
    id_counts: list[list[int]]  # [from rank][to rank]
    has_lengths: bool
    has_weights: bool

    @property
    def padded_batch(self) -> int:
        return max(self.batch_sizes)


@dataclass(frozen=True)
class _OwnIds:
    """A batch's ids where their tables are: FBGEMM's ids, offsets and weights for this rank's shards.

    batch_size: of this rank's own examples. on_device: when they have come, on CUDA.
    """

    batch_size: int
    ids: Tensor
    offsets: Tensor
    weights: Tensor | None
    padded_batch: int
    on_device: torch.cuda.Event | None = None


SentIds = Future[_OwnIds]
"""A batch whose ids are on their way to the tables."""


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
        self._group = topology.world
        # Ids travel in a thread of their own, and a group's collectives must be called in one order by all ranks.
        self._ids_group = dist.new_group()
        self._last_sent: SentIds | None = None
        self._ids_stream = torch.cuda.Stream(topology.device) if topology.device.type == "cuda" else None
        self._device = topology.device
        self._world_size = topology.world_size
        self.shards = placement.of_rank(topology.rank)
        self._layout = _layout(placement, len(self.tables), embedding_dim, topology.rank)
        sizes = [(shard.num_embeddings, shard.num_columns) for shard in self.shards]
        rounds = table_dtype == "fp16" and table_rounding == "stochastic"
        self._lookup = None
        if sizes:
            self._lookup = make_lookup(
                sizes, self._device, optimizer, table_dtype, epsilon, rounds_stochastically=rounds
            )
        self._rounded = None
        if sizes and rounds and self._device.type == "cpu":
            self._rounded = RoundedTables(self._lookup, [columns for _, columns in sizes], optimizer, epsilon)
        self._register_feature_order()
        for shard, weight in zip(self.shards, self._weights(), strict=True):
            columns = range(shard.first_column, shard.last_column)
            weight.copy_(init_table(shard.name, shard.num_embeddings, embedding_dim, columns, seed, init_std))

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

    def forward(self, sparse: SparseIds | SentIds) -> Tensor:
        """Look up and pool: SparseIds of this rank's B examples -> embeddings_BFD.

        Raises IndexError for an id outside its table (on CUDA a device-side assertion).
        """
        return self.look_up(sparse)()

    def look_up(self, sparse: SparseIds | SentIds) -> PendingEmbeddings:
        """`forward`, without waiting for the others' embeddings."""
        with torch.no_grad() if self.is_frozen else contextlib.nullcontext():
            own = (self.send_ids(sparse) if isinstance(sparse, SparseIds) else sparse).result()
            if own.on_device is not None:
                own.on_device.wait()
                for tensor in (own.ids, own.offsets, own.weights):
                    if tensor is not None:
                        tensor.record_stream(torch.cuda.current_stream())
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
        if self._overlap:
            self._last_sent = in_background(self._send_ids, sparse, self._last_sent)
            return self._last_sent
        sent: SentIds = Future()
        sent.set_result(self._send_ids(sparse, None))
        return sent

    def settle(self) -> None:
        """Wait until no ids are on their way."""
        if self._last_sent is not None:
            wait([self._last_sent])

    def _send_ids(self, sparse: SparseIds, before: SentIds | None) -> _OwnIds:
        if before is not None:
            wait([before])
        if not self.tables:
            raise ValueError("This model has no sparse features, so there is nothing to look up.")
        if self._ids_stream is None:
            return self._send_checked_ids(sparse)
        torch.cuda.set_device(self._device)  # a thread has its own
        with torch.cuda.stream(self._ids_stream):
            self._ids_stream.wait_stream(torch.cuda.default_stream())
            own = self._send_checked_ids(sparse)
            return replace(own, on_device=self._ids_stream.record_event())

    def _send_checked_ids(self, sparse: SparseIds) -> _OwnIds:
        check_ids(sparse, self._num_embeddings_F, self.tables)
        weights = self._pooling_weights(sparse)
        facts = self._compare_batches(sparse, weights is not None)
        own = self._send_bags(sparse, weights, facts) if facts.has_lengths else (*self._send_single_ids(sparse), None)
        return _OwnIds(sparse.batch_size, *own, facts.padded_batch)

    def _pooling_weights(self, sparse: SparseIds) -> Tensor | None:
        """Per-id weights under which a sum is the pooling that each feature asks for."""
        if not self._has_mean or sparse.lengths_FB is None:
            return sparse.weights
        scale_FB = torch.where(self._is_mean_F[:, None], 1.0 / sparse.lengths_FB.clamp(min=1), 1.0)
        scale = scale_FB.flatten().repeat_interleave(sparse.lengths_FB.flatten(), output_size=sparse.ids.numel())
        return scale if sparse.weights is None else scale * sparse.weights

    def _compare_batches(self, sparse: SparseIds, has_weights: bool) -> _BatchFacts:
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
        dist.all_gather_into_tensor(everyone, mine, group=self._ids_group)
        rows = everyone.view(self._world_size, -1).tolist()
        batch_sizes = [row[0] for row in rows]
        return _BatchFacts(
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
            sent.reshape(-1), [n * batch for n in self._shards_by_rank], [own * batch] * ranks, self._ids_group
        )
        ids = received.view(ranks, own, batch).transpose(0, 1).reshape(-1)
        return ids, torch.arange(ids.numel() + 1, device=self._device)

    def _send_bags(
        self, sparse: SparseIds, weights: Tensor | None, facts: _BatchFacts
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        batch, own, ranks = facts.padded_batch, len(self.shards), self._world_size
        if facts.has_weights and weights is None:
            weights = torch.ones_like(sparse.ids, dtype=torch.float32)
        lengths_FB = sparse.lengths_FB
        if lengths_FB is None:
            lengths_FB = sparse.ids.new_ones(len(self.tables), sparse.batch_size)
        lengths, ids, weights = torch.ops.fbgemm.permute_2D_sparse_data(self._order, lengths_FB, sparse.ids, weights)
        lengths = F.pad(lengths, (0, batch - sparse.batch_size))

        send, receive = facts.id_counts[self._layout.rank], [row[self._layout.rank] for row in facts.id_counts]
        bags = [n * batch for n in self._shards_by_rank]
        lengths = all_to_all(lengths.reshape(-1), bags, [own * batch] * ranks, self._ids_group).view(ranks * own, batch)
        ids = all_to_all(ids, send, receive, self._ids_group)
        if weights is not None:
            weights = all_to_all(weights, send, receive, self._ids_group)
        if own and ranks > 1:
            lengths, ids, weights = torch.ops.fbgemm.permute_2D_sparse_data(self._by_shard, lengths, ids, weights)
        return ids, torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.reshape(-1)), weights

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
        return self._lookup.split_embedding_weights() if self._lookup is not None else []


def _layout(placement: Placement, num_features: int, embedding_dim: int, rank: int) -> PooledLayout:
    blocks_by_rank = tuple(
        tuple(ColumnBlock(shard.table, shard.first_column, shard.last_column) for shard in placement.of_rank(owner))
        for owner in range(placement.world_size)
    )
    return PooledLayout(blocks_by_rank, num_features, embedding_dim, rank)


def check_ids(sparse: SparseIds, num_embeddings_F: Tensor, tables: Sequence[SparseFeature]) -> None:
    """Raise IndexError for an id outside its table: FBGEMM would train row 0 in its stead, or read foreign memory."""
    if sparse.num_features != len(tables):
        raise ValueError(f"The batch has {sparse.num_features} sparse features, the model {len(tables)}.")
    if not sparse.ids.numel():
        return
    if sparse.lengths_FB is None:
        least_F, most_F = torch.aminmax(sparse.ids.view(len(tables), -1), dim=1)
        all_inside = ((least_F >= 0) & (most_F < num_embeddings_F)).all()
    else:
        all_inside = _is_inside(sparse, num_embeddings_F).all()
    if sparse.ids.device.type == "cuda":
        torch._assert_async(all_inside)
    elif not all_inside:
        raise IndexError(_first_outside(sparse, num_embeddings_F, tables))


def _is_inside(sparse: SparseIds, num_embeddings_F: Tensor) -> Tensor:
    """For each id, whether it is a row of its table."""
    counts_F = sparse.batch_size if sparse.lengths_FB is None else sparse.lengths_FB.sum(1)
    limit = num_embeddings_F.repeat_interleave(counts_F, output_size=sparse.ids.numel())
    return (sparse.ids >= 0) & (sparse.ids < limit)


def _first_outside(sparse: SparseIds, num_embeddings_F: Tensor, tables: Sequence[SparseFeature]) -> str:
    """Which id isn't a row of its table, in words."""
    position = int((~_is_inside(sparse, num_embeddings_F)).nonzero()[0])
    if sparse.lengths_FB is None:
        bag = position
    else:
        bag = int(torch.searchsorted(sparse.lengths_FB.flatten().cumsum(0), torch.tensor(position), right=True))
    table = tables[bag // sparse.batch_size]
    return (
        f"Feature {table.name!r}, row {bag % sparse.batch_size} of the batch: id {int(sparse.ids[position])} is "
        f"outside its table, which has ids 0 to {table.num_embeddings - 1}. Prepare the data by the model's schema."
    )
