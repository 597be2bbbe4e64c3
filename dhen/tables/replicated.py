"""Replicated tables: small tables that every rank holds in full, in its dense part (paper 3.1)."""

import contextlib
from collections.abc import Collection, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import SparseIds
from dhen.runtime.topology import Topology
from dhen.tables.id_exchange import check_ids, lengths_of
from dhen.tables.row_uses import RowUses, UnseenIds


class ReplicatedFeatures:
    """Splits a batch's ids between replicated tables, which are in the dense part of every rank, and sharded tables.

    uses: how often training used each row, on any rank, up to the last `gather_uses`.
    """

    def __init__(self, config: DhenConfig, names: Collection[str], topology: Topology) -> None:
        """names: the tables that are replicated."""
        features, device = config.lookups, topology.device
        self._own = [place for place, feature in enumerate(features) if feature.table in names]
        self._others = [place for place, feature in enumerate(features) if feature.table not in names]
        self.features = [features[place] for place in self._own]
        self.tables = [table for table in config.tables if table.name in names]
        self._num_embeddings_F = torch.tensor([feature.num_embeddings for feature in self.features], device=device)
        self._is_mean_F = torch.tensor([feature.pooling == "mean" for feature in self.features], device=device)
        rows, index = [table.num_embeddings for table in self.tables], [table.name for table in self.tables]
        table_of_lookup = [index.index(feature.table) for feature in self.features]
        self._group = topology.world
        self.uses = RowUses(rows, device, table_of_lookup)
        self._new_uses = RowUses(rows, device, table_of_lookup)
        self._unseen: UnseenIds | None = None
        self._missing_FB: Tensor | None = None

    def own(self, sparse: SparseIds | None) -> SparseIds | None:
        """Ids for the replicated tables; None if there are none. Raises IndexError for an id outside its table."""
        if not self._own:
            return None
        own = sparse.select(self._own)
        check_ids(own, self._num_embeddings_F, self.features)
        if torch.is_grad_enabled():
            self._new_uses.add(own.ids, lengths_of(own).sum(1))
        elif self._unseen is not None:
            lengths_FB = lengths_of(own)
            weights, self._missing_FB = self._unseen.split(own.ids, lengths_FB, own.weights)
            if self._missing_FB is not None:
                own = SparseIds(own.ids, own.num_features, lengths_FB, weights, own.counts_F)
                self._missing_FB = self._missing_FB / lengths_FB.clamp(min=1).where(self._is_mean_F[:, None], 1)
        return own

    def others(self, sparse: SparseIds) -> SparseIds:
        """Ids for the sharded tables."""
        return sparse.select(self._others) if self._own else sparse

    def add_means(self, tables: nn.Module, inputs: tuple, embeddings_BFD: Tensor) -> Tensor:
        """Forward hook of the replicated tables: add the mean row where `own` left out an unused one."""
        if self._missing_FB is None:
            return embeddings_BFD
        return embeddings_BFD + self._unseen.mean_parts(self._missing_FB).view_as(embeddings_BFD)

    @contextlib.contextmanager
    def watched_by(self, unseen: UnseenIds) -> Iterator[None]:
        """Let `unseen` count the ids and replace unused rows, inside this context, where gradients must be off."""
        self._unseen = unseen
        try:
            yield
        finally:
            self._unseen = self._missing_FB = None

    def gather_uses(self) -> None:
        """Bring `uses` up to date. Communicates over all ranks."""
        if self._own:
            total = self._new_uses.counts.long()
            dist.all_reduce(total, group=self._group)
            total += self.uses.counts
            while total.max() > torch.iinfo(torch.int32).max:
                total = (total + 1) // 2
            self.uses.counts.copy_(total)
            self.uses.halve()
            self._new_uses.counts.zero_()

    def uses_by_name(self) -> dict[str, Tensor]:
        """`uses` by table."""
        return {table.name: self.uses.of(index) for index, table in enumerate(self.tables)}

    def load_uses(self, saved: Mapping[str, Tensor]) -> None:
        """Continue from `uses_by_name` of a checkpoint."""
        self._new_uses.counts.zero_()
        for name, uses in self.uses_by_name().items():
            uses.copy_(saved[name])
        self.uses.halve()
