"""The complete model with plain tensors as inputs and probabilities as output, to be exported as one graph.

All tables are joined to one, so that a single look-up serves all features.

Shapes: B batch, F lookups, D embedding dimension, N dense features, I ids of all bags, T further tasks.
"""

import copy
from itertools import accumulate

import torch
from torch import Tensor, nn

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import PlainTables, SparseIds
from dhen.model.gate import LayerGate
from dhen.model.mixture_of_experts import MixtureOfExperts
from dhen.model.modeling_dhen import DhenForClickPrediction


class JoinedTables(nn.Module):
    """Returns what `PlainTables` returns, from one table that has the rows of all.

    >>> config = DhenConfig(embedding_dim=4, sparse_features=[{"name": "site", "num_embeddings": 10}])
    >>> JoinedTables(PlainTables(config, seed=0), config)(torch.tensor([[3], [4]])).shape
    torch.Size([2, 1, 4])
    """

    def __init__(self, tables: PlainTables, config: DhenConfig) -> None:
        """tables: all of the same dtype."""
        super().__init__()
        parts = [tables.get_submodule(table.name) for table in config.tables]
        self.table = copy.deepcopy(parts[0])
        for name, tensor in [*self.table.named_parameters(), *self.table.named_buffers()]:
            tensor.data = torch.cat([getattr(part, name).data for part in parts])
        first_rows = accumulate((table.num_embeddings for table in config.tables), initial=0)
        first_row = dict(zip([table.name for table in config.tables], first_rows, strict=False))
        self.register_buffer("first_row_F", torch.tensor([first_row[feature.table] for feature in config.lookups]))
        self.register_buffer("is_mean_F", torch.tensor([feature.pooling == "mean" for feature in config.lookups]))

    def forward(self, ids: Tensor, lengths_FB: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """embeddings_BFD. ids: (B, F), or (I,) with lengths_FB, as in `SparseIds`. weights: (I,)."""
        if lengths_FB is None:
            return self.table.rows(ids + self.first_row_F)
        num_features, batch = lengths_FB.shape
        lengths = lengths_FB.flatten()
        # The number of bags that end at or before each id, which is the number of its bag.
        ends = torch.zeros(ids.shape[0] + 1, dtype=torch.int64).index_add(
            0, lengths.cumsum(0), torch.ones_like(lengths)
        )
        bag_I = ends.cumsum(0)[:-1]
        rows_ID = self.table.rows(ids + self.first_row_F[bag_I // batch])
        if weights is not None:
            rows_ID = rows_ID * weights.unsqueeze(1)
        sums = torch.zeros(num_features * batch, rows_ID.shape[1]).index_add(0, bag_I, rows_ID)
        counts_FB = torch.where(self.is_mean_F.unsqueeze(1), lengths_FB.clamp(min=1), 1)
        return (sums.view(num_features, batch, -1) / counts_FB.unsqueeze(2)).transpose(0, 1)


class ScoringGraph(nn.Module):
    """(dense (B, N), ids (B, F) or (I,), lengths (F, B), weights (I,)) -> probabilities (B, 1 + T), the label's first.

    An input that the data does not have is left out. No id is checked.

    >>> model = DhenForClickPrediction(DhenConfig(num_dense_features=3, interactions=["linear"]))
    >>> ScoringGraph(model, model)(torch.ones(5, 3)).shape
    torch.Size([5, 1])
    """

    def __init__(self, model: DhenForClickPrediction, trunk: DhenForClickPrediction) -> None:
        """model: with all tables. trunk: the same without tables. Raises ValueError for a mixture of experts."""
        super().__init__()
        self.tables = (
            None if model.tables is None or not model.config.tables else JoinedTables(model.tables, model.config)
        )
        self.trunk = trunk
        for module in trunk.modules():
            if isinstance(module, LayerGate):
                module.skips = False
            if isinstance(module, MixtureOfExperts):
                raise ValueError(
                    "the model has a mixture of experts, which computes other rows for each batch. No graph can hold "
                    "that: use --format safetensors."
                )

    def forward(
        self,
        dense: Tensor | None = None,
        ids: Tensor | None = None,
        lengths: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return probabilities (B, 1 + T), float32."""
        embeddings_BFD = None if self.tables is None else self.tables(ids, lengths, weights)
        return self.trunk(dense=dense, inputs_embeds=embeddings_BFD).probabilities


def graph_inputs(sparse: SparseIds | None, dense_BN: Tensor) -> dict[str, Tensor]:
    """The inputs of a `ScoringGraph`, by name."""
    inputs = {"dense": dense_BN} if dense_BN.shape[1] else {}
    if sparse is None:
        return inputs
    if sparse.lengths_FB is None:
        return inputs | {"ids": sparse.ids.view(sparse.num_features, -1).t().contiguous()}
    weights = {} if sparse.weights is None else {"weights": sparse.weights}
    return inputs | {"ids": sparse.ids, "lengths": sparse.lengths_FB} | weights
