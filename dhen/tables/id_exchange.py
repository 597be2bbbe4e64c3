"""Sends a batch's ids to the ranks that own their tables (paper 3.1, figure 4).

The next batch's ids travel while this batch computes. NCCL needs one order of all collectives on all ranks, across all
groups, so a thread must not start any. Instead, the hosts tell each other the numbers of ids over gloo, and the caller
says at which point of a step the ids leave.

Shapes: B examples of this rank, F sparse features, S lookups of this rank, W ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from dhen.model.features import SparseIds
from dhen.model.sparse_feature import SparseFeature
from dhen.runtime.collectives import all_to_all
from dhen.runtime.topology import Topology
from dhen.tables.placement.plan import TableShard

IDS = "ids' all-to-all"
"""Name of the exchange in a profiler trace."""


@dataclass(frozen=True)
class OwnIds:
    """The ids that this rank's shards look up for the global batch, as FBGEMM's ids, offsets and weights.

    batch_size: of this rank's own examples. padded_batch: size of the largest batch of any rank.
    """

    batch_size: int
    ids: Tensor
    offsets: Tensor
    weights: Tensor | None
    padded_batch: int


@dataclass(eq=False)
class SentIds:
    """A batch on its way to the tables.

    ids_to: number of ids for each rank. sizes: waits for what the other ranks have sent, (W * 4,), on the host: size of
    the batch, whether it has lengths and weights, number of ids for this rank. arrive: waits for the ids, once they
    have left.
    """

    sparse: SparseIds
    ids_to: list[int]
    sizes: Callable[[], Tensor]
    arrive: Callable[[], OwnIds] | None = None


class IdExchange:
    """Sends every id to the rank that owns its table, one batch after another.

    `send` announces a batch, `depart` lets its ids leave, and `receive` waits for them. All ranks must make these calls
    in the same order.

    features: all of the sharded tables. lookups_by_rank: for each rank, its shards, once for each feature that looks
    them up, with the feature's number as `table`. The same on all ranks.
    overlap: if False, `send` blocks until the ids have arrived.
    """

    def __init__(
        self,
        features: Sequence[SparseFeature],
        lookups_by_rank: Sequence[Sequence[TableShard]],
        topology: Topology,
        *,
        overlap: bool = True,
    ) -> None:
        """Communicates: all ranks must construct it together."""
        self._features, self._overlap = tuple(features), overlap
        self._device, self._rank, self._world_size = topology.device, topology.rank, topology.world_size
        # In the tables' group, the ids of the next batch would queue behind this batch's gradients.
        self._group = self._hosts = topology.another_group()
        if topology.device.type == "cuda":
            self._hosts = topology.another_group("gloo")
        self._sent: list[SentIds] = []
        # On CUDA, FBGEMM's backward adds the rows of a rank's tables before an id to it, in the id's dtype.
        of_shards = [{(of.name, of.first_column): of.num_embeddings for of in each} for each in lookups_by_rank]
        most = max((sum(shards.values()) for shards in of_shards), default=0)
        self.wire_dtype = torch.int32 if most <= torch.iinfo(torch.int32).max else torch.int64
        self._num_lookups = [len(lookups) for lookups in lookups_by_rank]
        self._features_by_rank = [[lookup.table for lookup in lookups] for lookups in lookups_by_rank]
        order = [feature for features_of_rank in self._features_by_rank for feature in features_of_rank]
        is_mean = [feature.pooling == "mean" for feature in features]
        self._has_mean = any(is_mean)
        self._is_identity_order = order == list(range(len(features)))
        self._order = torch.tensor(order, dtype=torch.int32, device=self._device)
        self._num_embeddings_F = torch.tensor([feature.num_embeddings for feature in features], device=self._device)
        self._is_mean_F = torch.tensor(is_mean, dtype=torch.bool, device=self._device)
        # Bags arrive grouped by rank, then by lookup; FBGEMM needs them grouped by lookup, then by rank.
        by_lookup = torch.arange(self._world_size * self._own).view(self._world_size, self._own).t().reshape(-1)
        self._by_lookup = by_lookup.to(self._device, torch.int32)

    @property
    def _own(self) -> int:
        """Number of this rank's lookups, S."""
        return self._num_lookups[self._rank]

    def send(self, sparse: SparseIds) -> SentIds:
        """Check a batch's ids, and start telling each rank how many it will get. Communicates over all ranks.

        Raises IndexError if an id is outside its table (on CUDA, a device-side assertion).
        """
        if not self._features:
            raise ValueError("This model has no sparse features, so there is nothing to look up.")
        check_ids(sparse, self._num_embeddings_F, self._features)
        has_weights = sparse.weights is not None or (self._has_mean and sparse.lengths_FB is not None)
        facts = (sparse.batch_size, sparse.lengths_FB is not None or has_weights, has_weights)
        ids_to = [sum(sparse.counts_F[feature] for feature in features) for features in self._features_by_rank]
        mine = torch.tensor([(*facts, count) for count in ids_to], dtype=torch.int64).flatten()
        each = [4] * self._world_size
        sent = SentIds(sparse, ids_to, all_to_all(mine, each, each, self._hosts))
        self._sent.append(sent)
        if not self._overlap:
            own = self.receive(sent)
            sent.arrive = lambda: own
        return sent

    def depart(self) -> None:
        """Let the ids leave of all batches that were sent. Communicates over all ranks."""
        for sent in self._sent:
            self._depart(sent)

    def receive(self, sent: SentIds) -> OwnIds:
        """Wait for the ids of a batch. Communicates over all ranks if they have not left yet."""
        if sent in self._sent:
            for each in self._sent[: self._sent.index(sent) + 1]:
                self._depart(each)
            self._sent.remove(sent)
        return sent.arrive()

    def settle(self) -> None:
        """Wait for the batches in transit, which will not be looked up. Communicates over all ranks."""
        for sent in self._sent:
            self._depart(sent)
            sent.arrive()
        self._sent.clear()

    def _depart(self, sent: SentIds) -> None:
        if sent.arrive is not None:
            return
        batch_sizes, has_lengths, has_weights, ids_from = sent.sizes().view(self._world_size, 4).t().tolist()
        with record_function(IDS):
            # A padded batch is sent with its lengths, because the padding consists of empty bags.
            if any(has_lengths) or len(set(batch_sizes)) > 1:
                sent.arrive = self._send_bags(sent, max(batch_sizes), any(has_weights), ids_from)
            else:
                sent.arrive = self._send_single_ids(sent.sparse)

    def _pooling_weights(self, sparse: SparseIds) -> Tensor | None:
        """Per-id weights that turn the sum over a bag into each feature's pooling."""
        if not self._has_mean or sparse.lengths_FB is None:
            return sparse.weights
        scale_FB = torch.where(self._is_mean_F[:, None], 1.0 / sparse.lengths_FB.clamp(min=1), 1.0)
        scale = scale_FB.flatten().repeat_interleave(sparse.lengths_FB.flatten(), output_size=sparse.ids.numel())
        return scale if sparse.weights is None else scale * sparse.weights

    def _send_single_ids(self, sparse: SparseIds) -> Callable[[], OwnIds]:
        """The fast path: every bag holds one id, and all batches have the same size."""
        batch, own, ranks = sparse.batch_size, self._own, self._world_size
        ids_FB = sparse.ids.to(self.wire_dtype).view(len(self._features), batch)
        leaving = ids_FB if self._is_identity_order else ids_FB.index_select(0, self._order)
        arrived = all_to_all(
            leaving.reshape(-1), [n * batch for n in self._num_lookups], [own * batch] * ranks, self._group
        )

        def arrive() -> OwnIds:
            ids = arrived().view(ranks, own, batch).transpose(0, 1).reshape(-1)
            offsets = torch.arange(ids.numel() + 1, dtype=ids.dtype, device=self._device)
            return OwnIds(batch, ids, offsets, None, batch)

        return arrive

    def _send_bags(self, sent: SentIds, batch: int, has_weights: bool, ids_from: Sequence[int]) -> Callable[[], OwnIds]:
        """batch: size of the largest one. ids_from: number of ids from each rank."""
        sparse, own, ranks = sent.sparse, self._own, self._world_size
        ids, weights = sparse.ids.to(self.wire_dtype), self._pooling_weights(sparse)
        if has_weights and weights is None:
            weights = torch.ones_like(ids, dtype=torch.float32)
        lengths_FB = lengths_of(sparse).to(self.wire_dtype)
        if not self._is_identity_order:
            # Without the sum of the lengths, FBGEMM would read it from the GPU.
            lengths_FB, ids, weights = torch.ops.fbgemm.permute_2D_sparse_data(
                self._order, lengths_FB, ids, weights, sum(sent.ids_to)
            )
        lengths = F.pad(lengths_FB, (0, batch - sparse.batch_size)).reshape(-1)
        all_lengths = all_to_all(lengths, [n * batch for n in self._num_lookups], [own * batch] * ranks, self._group)
        all_ids = all_to_all(ids, sent.ids_to, ids_from, self._group)
        all_weights = None if weights is None else all_to_all(weights, sent.ids_to, ids_from, self._group)

        def arrive() -> OwnIds:
            lengths, ids = all_lengths().view(ranks * own, batch), all_ids()
            weights = None if all_weights is None else all_weights()
            if own and ranks > 1:
                lengths, ids, weights = torch.ops.fbgemm.permute_2D_sparse_data(
                    self._by_lookup, lengths, ids, weights, sum(ids_from)
                )
            offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.reshape(-1))
            return OwnIds(sparse.batch_size, ids, offsets, weights, batch)

        return arrive


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
    elif sparse.ids.device.type != "cpu":
        all_inside = _is_inside(sparse, num_embeddings_F).all()
    else:
        of_tables = zip(sparse.ids.split(list(sparse.counts_F)), tables, strict=True)
        ends = [(*ids.aminmax(), table.num_embeddings) for ids, table in of_tables if len(ids)]
        all_inside = all(least >= 0 and most < rows for least, most, rows in ends)
    if sparse.ids.device.type != "cpu":  # the host does not wait
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
