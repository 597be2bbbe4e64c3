"""Pools an ordered bag, given a target: by DIN's activation unit (Zhou et al. 2018, section 4.3) or a transformer.

Shapes: B batch, F' lookups, F sparse features, K positions, D embedding dimension.
"""

import torch
from torch import Tensor, nn

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.interactions.attention import MultiHeadAttention
from dhen.model.mlp import MLP, Activation

_HIDDEN = (36,)
"""Hidden sizes of the unit, as in DIN."""
_PLACES_STD = 0.02


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


class TransformerPooling(nn.Module):
    """The sum of the items' outputs of one transformer encoder layer over the target and the items.

    As in the Behavior Sequence Transformer (Chen et al. 2019, section 2.2), the places have embeddings: those of the
    items, counted from the last one, and that of the target. The norms come first (H = X + A(Norm(X)), then
    H + FF(Norm(H))), which learns faster here. No item sees an empty position, which has e_k = 0 and no output, so a
    bag without items gives 0.

    >>> TransformerPooling(embedding_dim=4, max_length=5)(torch.ones(2, 5, 4), torch.ones(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(self, embedding_dim: int, max_length: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.places = nn.Parameter(torch.empty(max_length + 1, embedding_dim))
        self.attention = MultiHeadAttention(embedding_dim, num_heads=1)
        self.feedforward = MLP(embedding_dim, (4 * embedding_dim,), embedding_dim, activation)
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(embedding_dim), nn.LayerNorm(embedding_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the places be nearly alike."""
        nn.init.normal_(self.places, std=_PLACES_STD)

    def forward(self, items_BKD: Tensor, target_BD: Tensor) -> Tensor:
        """Returns (B, D)."""
        is_item_BK = items_BKD.ne(0).any(2)
        after_BK = is_item_BK.sum(1, keepdim=True) - is_item_BK.cumsum(1)  # 0 for the last item, and after it
        x_BKD = torch.cat([items_BKD + self.places[after_BK], (target_BD + self.places[-1]).unsqueeze(1)], dim=1)
        is_seen_BK = nn.functional.pad(is_item_BK, (0, 1), value=True)
        x_BKD = x_BKD + self.attention(self.attention_norm(x_BKD), is_seen_BK)
        x_BKD = x_BKD + self.feedforward(self.feedforward_norm(x_BKD))
        return (x_BKD[:, :-1] * is_item_BK.unsqueeze(2)).sum(1)


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
                dim, activation = config.embedding_dim, config.activation
                is_transformer = feature.pooling == "transformer"
                self.by_feature.add_module(
                    feature.name,
                    TransformerPooling(dim, feature.max_length, activation)
                    if is_transformer
                    else AttentionPooling(dim, activation),
                )

    def forward(self, lookups_BFD: Tensor) -> Tensor:
        """Returns embeddings_BFD of the features."""
        parts = list(lookups_BFD.split(self._sizes, dim=1))
        for (place, target), pooling in zip(self._places, self.by_feature.children(), strict=True):
            parts[place] = pooling(parts[place], parts[target].squeeze(1)).unsqueeze(1)
        return torch.cat(parts, dim=1)
