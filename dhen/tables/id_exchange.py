"""Sends a batch's ids to the ranks that own their tables (paper 3.1, figure 4).

The exchange has its own thread and process group, so that the next batch's ids travel while this batch computes.

Shapes: B examples of this rank, F sparse features, S table shards of this rank, W ranks.
"""

from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from dhen.model.configuration_dhen import SparseFeature
from dhen.model.features import SparseIds
from dhen.runtime.background import in_background
from dhen.runtime.collectives import all_to_all
from dhen.runtime.topology import Topology
from dhen.tables.placement.plan import TableShard

IDS = "ids' all-to-all"
"""Name of the exchange in a profiler trace."""


@dataclass(frozen=True)
class OwnIds:
    """The ids that this rank's shards look up for the global batch, as FBGEMM's ids, offsets and weights.

    batch_size: of this rank's own examples. padded_batch: size of the largest batch of any rank. on_device: on CUDA,
    the event that marks their arrival.
    """

    batch_size: int
    ids: Tensor
    offsets: Tensor
    weights: Tensor | None
    padded_batch: int
    on_device: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Make the current stream wait for them."""
        if self.on_device is None:
            return
        stream = torch.cuda.current_stream()
        stream.wait_event(self.on_device)
        for tensor in (self.ids, self.offsets, self.weights):
            if tensor is not None:
                tensor.record_stream(stream)


SentIds = Future[OwnIds]
"""A batch whose ids are in transit to the tables."""


@dataclass(frozen=True)
class _BatchFacts:
    """What every rank knows about the other ranks' batches after a first, small all-gather."""

    batch_sizes: list[int]
    id_counts: list[list[int]]  # [from rank][to rank]
    has_lengths: bool
    has_weights: bool

    @property
    def padded_batch(self) -> int:
        return max(self.batch_sizes)


class IdExchange:
    """Sends every id to the rank that owns its table, one batch after another.

    tables: all tables of the model. shards_by_rank: each rank's shards in lookup order, the same on all ranks.
    overlap: send in a background thread; if False, `send` blocks until the ids have arrived.
    """

    def __init__(
        self,
        tables: Sequence[SparseFeature],
        shards_by_rank: Sequence[Sequence[TableShard]],
        topology: Topology,
        *,
        overlap: bool = True,
    ) -> None:
        """Communicates: all ranks must construct it together."""
        self._tables, self._overlap = tuple(tables), overlap
        self._device, self._rank, self._world_size = topology.device, topology.rank, topology.world_size
        # All ranks must call a group's collectives in the same order. The thread runs in no fixed order with the main
        # thread, so it needs its own group.
        self._group = dist.new_group(timeout=topology.timeout)
        self._last_sent: SentIds | None = None
        self._stream = torch.cuda.Stream(topology.device) if topology.device.type == "cuda" else None
        # On CUDA, FBGEMM's backward adds the rows of a rank's tables before an id to it, in the id's dtype.
        most = max((sum(shard.num_embeddings for shard in shards) for shards in shards_by_rank), default=0)
        self.wire_dtype = torch.int32 if most <= torch.iinfo(torch.int32).max else torch.int64
        self._num_shards = [len(shards) for shards in shards_by_rank]
        order = [shard.table for shards in shards_by_rank for shard in shards]
        owner = [rank for rank, shards in enumerate(shards_by_rank) for _ in shards]
        is_mean = [table.pooling == "mean" for table in tables]
        self._has_mean = any(is_mean)
        self._is_identity_order = order == list(range(len(tables)))
        self._order = torch.tensor(order, dtype=torch.int32, device=self._device)
        self._owner = torch.tensor(owner, dtype=torch.int64, device=self._device)
        self._num_embeddings_F = torch.tensor([table.num_embeddings for table in tables], device=self._device)
        self._is_mean_F = torch.tensor(is_mean, dtype=torch.bool, device=self._device)
        # Bags arrive grouped by rank, then by shard; FBGEMM needs them grouped by shard, then by rank.
        by_shard = torch.arange(self._world_size * self._own).view(self._world_size, self._own).t().reshape(-1)
        self._by_shard = by_shard.to(self._device, torch.int32)

    @property
    def _own(self) -> int:
        """Number of this rank's shards, S."""
        return self._num_shards[self._rank]

    def send(self, sparse: SparseIds) -> SentIds:
        """Start sending every id to its table's owner. Communicates over all ranks.

        The future raises IndexError if an id is outside its table (on CUDA, a device-side assertion).
        """
        # The thread must wait for the work that produces the ids, which is queued by now, but for nothing queued later.
        ready = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        if self._overlap:
            self._last_sent = in_background(self._send, sparse, ready, self._last_sent)
            return self._last_sent
        sent: SentIds = Future()
        sent.set_result(self._send(sparse, ready, None))
        return sent

    def settle(self) -> None:
        """Wait until no ids are in transit."""
        if self._last_sent is not None:
            wait([self._last_sent])

    def _send(self, sparse: SparseIds, ready: torch.cuda.Event | None, before: SentIds | None) -> OwnIds:
        if before is not None:
            wait([before])
        if not self._tables:
            raise ValueError("This model has no sparse features, so there is nothing to look up.")
        if self._stream is None:
            with record_function(IDS):
                return self._send_checked(sparse)
        torch.cuda.set_device(self._device)  # each thread has its own current device
        with torch.cuda.stream(self._stream), record_function(IDS):
            self._stream.wait_event(ready)
            for tensor in (sparse.ids, sparse.lengths_FB, sparse.weights):
                if tensor is not None:
                    tensor.record_stream(self._stream)
            own = self._send_checked(sparse)
            return replace(own, on_device=self._stream.record_event())

    def _send_checked(self, sparse: SparseIds) -> OwnIds:
        check_ids(sparse, self._num_embeddings_F, self._tables)
        weights = self._pooling_weights(sparse)
        facts = self._compare_batches(sparse, weights is not None)
        if facts.has_lengths:
            ids, offsets, weights = self._send_bags(sparse, weights, facts)
        else:
            (ids, offsets), weights = self._send_single_ids(sparse), None
        return OwnIds(sparse.batch_size, ids, offsets, weights, facts.padded_batch)

    def _pooling_weights(self, sparse: SparseIds) -> Tensor | None:
        """Per-id weights that turn the sum over a bag into each feature's pooling."""
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
        dist.all_gather_into_tensor(everyone, mine, group=self._group)
        rows = everyone.view(self._world_size, -1).tolist()
        batch_sizes = [row[0] for row in rows]
        return _BatchFacts(
            batch_sizes=batch_sizes,
            id_counts=[row[3:] for row in rows],
            # A padded batch is sent with its lengths, because the padding consists of empty bags.
            has_lengths=any(row[1] for row in rows) or len(set(batch_sizes)) > 1,
            has_weights=any(row[2] for row in rows),
        )

    def _send_single_ids(self, sparse: SparseIds) -> tuple[Tensor, Tensor]:
        """The fast path: every bag holds one id, and all batches have the same size."""
        batch, own, ranks = sparse.batch_size, self._own, self._world_size
        ids_FB = sparse.ids.to(self.wire_dtype).view(len(self._tables), batch)
        sent = ids_FB if self._is_identity_order else ids_FB[self._order]
        received = all_to_all(
            sent.reshape(-1), [n * batch for n in self._num_shards], [own * batch] * ranks, self._group
        )
        ids = received.view(ranks, own, batch).transpose(0, 1).reshape(-1)
        return ids, torch.arange(ids.numel() + 1, dtype=ids.dtype, device=self._device)

    def _send_bags(
        self, sparse: SparseIds, weights: Tensor | None, facts: _BatchFacts
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        batch, own, ranks = facts.padded_batch, self._own, self._world_size
        ids = sparse.ids.to(self.wire_dtype)
        if facts.has_weights and weights is None:
            weights = torch.ones_like(ids, dtype=torch.float32)
        lengths_FB = lengths_of(sparse).to(self.wire_dtype)
        if not self._is_identity_order:
            lengths_FB, ids, weights = torch.ops.fbgemm.permute_2D_sparse_data(self._order, lengths_FB, ids, weights)
        lengths = F.pad(lengths_FB, (0, batch - sparse.batch_size))

        send, receive = facts.id_counts[self._rank], [row[self._rank] for row in facts.id_counts]
        bags = [n * batch for n in self._num_shards]
        lengths = all_to_all(lengths.reshape(-1), bags, [own * batch] * ranks, self._group).view(ranks * own, batch)
        ids = all_to_all(ids, send, receive, self._group)
        if weights is not None:
            weights = all_to_all(weights, send, receive, self._group)
        if own and ranks > 1:
            lengths, ids, weights = torch.ops.fbgemm.permute_2D_sparse_data(self._by_shard, lengths, ids, weights)
        return ids, torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.reshape(-1)), weights


def lengths_of(sparse: SparseIds) -> Tensor:
    """Number of ids in each bag, (F, B), also where every bag holds one id."""
    if sparse.lengths_FB is not None:
        return sparse.lengths_FB
    return torch.ones(sparse.num_features, sparse.batch_size, dtype=torch.int64, device=sparse.ids.device)


def check_ids(sparse: SparseIds, num_embeddings_F: Tensor, tables: Sequence[SparseFeature]) -> None:
    """Raise IndexError if an id is outside its table; FBGEMM would train row 0 instead, or read out of bounds."""
    if sparse.num_features != len(tables):
        raise ValueError(
            f"The batch has {sparse.num_features} sparse features, but the model has {len(tables)}. Prepare the data "
            "with the model's schema."
        )
    if not sparse.ids.numel():
        return
    if sparse.lengths_FB is None:
        least_F, most_F = torch.aminmax(sparse.ids.view(len(tables), -1), dim=1)
        all_inside = ((least_F >= 0) & (most_F < num_embeddings_F)).all()
    elif sparse.ids.device.type == "cuda":  # the host does not have to wait for the counts
        all_inside = _is_inside(sparse, num_embeddings_F).all()
    else:
        of_tables = zip(sparse.ids.split(sparse.lengths_FB.sum(1).tolist()), tables, strict=True)
        ends = [(*ids.aminmax(), table.num_embeddings) for ids, table in of_tables if len(ids)]
        all_inside = all(least >= 0 and most < rows for least, most, rows in ends)
    if sparse.ids.device.type == "cuda":
        torch._assert_async(all_inside)
    elif not all_inside:
        raise IndexError(_first_outside(sparse, num_embeddings_F, tables))


def _is_inside(sparse: SparseIds, num_embeddings_F: Tensor) -> Tensor:
    """For each id, whether it is inside its table."""
    counts_F = sparse.batch_size if sparse.lengths_FB is None else sparse.lengths_FB.sum(1)
    limit = num_embeddings_F.repeat_interleave(counts_F, output_size=sparse.ids.numel())
    return (sparse.ids >= 0) & (sparse.ids < limit)


def _first_outside(sparse: SparseIds, num_embeddings_F: Tensor, tables: Sequence[SparseFeature]) -> str:
    """The error message about the first id that is outside its table."""
    position = int((~_is_inside(sparse, num_embeddings_F)).nonzero()[0])
    if sparse.lengths_FB is None:
        bag = position
    else:
        bag = int(torch.searchsorted(sparse.lengths_FB.flatten().cumsum(0), torch.tensor(position), right=True))
    table = tables[bag // sparse.batch_size]
    return (
        f"Feature {table.name!r}, row {bag % sparse.batch_size} of the batch: id {int(sparse.ids[position])} is "
        f"outside its table, which has ids 0 to {table.num_embeddings - 1}. Prepare the data with the model's schema."
    )
