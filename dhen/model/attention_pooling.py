"""Pools an ordered bag by attention to a target: the activation unit of DIN (Zhou et al. 2018, section 4.3).

Shapes: B batch, F' lookups, F sparse features, K positions, D embedding dimension.
"""

import torch
from torch import Tensor, nn

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.mlp import MLP, Activation

_HIDDEN = (36,)
"""Hidden sizes of the unit, as in DIN."""


class AttentionPooling(nn.Module):
    """The sum of w_k e_k over the positions, where an MLP makes w_k of [e_k, e_t, e_k - e_t, e_k * e_t].

    As in DIN, no softmax makes the weights sum to 1, so a long history may weigh more than a short one. An empty
    position has e_k = 0: it adds nothing to the sum or to a gradient. So the bags' lengths are not needed.

    >>> AttentionPooling(embedding_dim=4)(torch.ones(2, 5, 4), torch.ones(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(self, embedding_dim: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.weight = MLP(4 * embedding_dim, _HIDDEN, 1, activation)

    def forward(self, items_BKD: Tensor, target_BD: Tensor) -> Tensor:
        """Returns (B, D)."""
        target_BKD = target_BD.unsqueeze(1).expand_as(items_BKD)
        pairs = torch.cat([items_BKD, target_BKD, items_BKD - target_BKD, items_BKD * target_BKD], dim=2)
        return (self.weight(pairs) * items_BKD).sum(1)


class SequencePooling(nn.Module):
    """Pools the lookups that are positions of ordered bags, and leaves the others: (B, F', D) -> (B, F, D).

    >>> item = {"name": "item", "num_embeddings": 9}
    >>> last = item | {"name": "last", "table": "item", "pooling": "attention", "target": "item", "max_length": 5}
    >>> SequencePooling(DhenConfig(embedding_dim=4, sparse_features=[item, last]))(torch.ones(2, 6, 4)).shape
    torch.Size([2, 2, 4])
    """

    def __init__(self, config: DhenConfig) -> None:
        super().__init__()
        self._sizes = [feature.num_lookups for feature in config.features]
        names = [feature.name for feature in config.features]
        self._places = [(at, names.index(of.target)) for at, of in enumerate(config.features) if of.target]
        self.by_feature = nn.Module()  # a ModuleDict has no room for a feature called `items`
        for feature in config.features:
            if feature.target:
                self.by_feature.add_module(feature.name, AttentionPooling(config.embedding_dim, config.activation))

    def forward(self, lookups_BFD: Tensor) -> Tensor:
        """Returns embeddings_BFD of the features."""
        parts = list(lookups_BFD.split(self._sizes, dim=1))
        for (place, target), pooling in zip(self._places, self.by_feature.children(), strict=True):
            parts[place] = pooling(parts[place], parts[target].squeeze(1)).unsqueeze(1)
        return torch.cat(parts, dim=1)
