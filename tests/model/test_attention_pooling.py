"""An ordered bag pooled by attention equals a plain loop over the last ids of each bag."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import SparseIds, in_positions
from dhen.model.modeling_dhen import DhenForClickPrediction

ENTRIES = [
    {"name": "items", "num_embeddings": 20, "pooling": "attention", "table": "item", "target": "item", "max_length": 3},
    {"name": "place", "num_embeddings": 5},
    {"name": "item", "num_embeddings": 20},
]
CONFIG = {"embedding_dim": 4, "num_layers": 1, "num_embeddings_out": 4, "sparse_features": ENTRIES}
LENGTHS = [0, 2, 7, 3, 1]
"""Empty, ragged, and longer than 3."""


def bags() -> SparseIds:
    torch.manual_seed(1)
    ids = [torch.randint(0, 20, (sum(LENGTHS),)), torch.randint(0, 5, (5,)), torch.randint(0, 20, (5,))]
    return SparseIds(torch.cat(ids), 3, torch.tensor([LENGTHS, [1] * 5, [1] * 5]))


def by_unit(pooling: nn.Module, items: Tensor, target: Tensor) -> Tensor:
    total = torch.zeros_like(target)
    for e in items:
        total = total + pooling.weight(torch.cat([e, target, e - target, e * target])[None])[0] * e
    return total


def by_transformer(pooling: nn.Module, items: Tensor, target: Tensor) -> Tensor:
    """Of the bag alone, so without empty positions: the last item has place 0."""
    count = len(items)
    x = torch.cat([items + pooling.places[:count].flip(0), target[None] + pooling.places[-1]])
    query, key, value = pooling.attention.query_key_value(pooling.attention_norm(x)).chunk(3, 1)
    x = x + pooling.attention.output((query @ key.T / query.shape[1] ** 0.5).softmax(1) @ value)
    return (x + pooling.feedforward(pooling.feedforward_norm(x)))[:count].sum(0)


def plain(
    model: DhenForClickPrediction, sparse: SparseIds, pool: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> Tensor:
    """embeddings_BFD of the three features, bag by bag."""
    item, place = (model.tables.get_submodule(name).weight for name in ("item", "place"))
    histories, places, items = sparse.ids.split([sum(LENGTHS), 5, 5])
    pooling = model.model.features.sequences.by_feature.get_submodule("items")
    bags_and_targets = zip(histories.split(LENGTHS), item[items], strict=True)
    pooled = [pool(pooling, item[history[-3:]], target) for history, target in bags_and_targets]
    return torch.stack([torch.stack(pooled), place[places], item[items]], 1)


@pytest.mark.parametrize(("kind", "pool"), [("attention", by_unit), ("transformer", by_transformer)])
def test_pooling_equals_a_loop_over_the_last_ids(kind, pool):
    entries = [ENTRIES[0] | {"pooling": kind}, *ENTRIES[1:]]
    model = DhenForClickPrediction(DhenConfig(**CONFIG | {"sparse_features": entries})).double()
    for name, weight in model.named_parameters():
        if name.endswith("places"):
            nn.init.normal_(weight)
    sparse, found = bags(), []
    model.model.features.register_forward_hook(lambda _, __, x_BMD: found.append(x_BMD))
    model(in_positions(sparse, [3, None, None])).logits.sum().backward()
    by_loop = plain(model, sparse, pool)
    torch.testing.assert_close(found[0], by_loop, atol=1e-12, rtol=0)
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model.head(model.model.layers[0](by_loop, by_loop.new_empty(5, 0)).flatten(1)).sum().backward()
    for name in gradients:
        torch.testing.assert_close(gradients[name], model.get_parameter(name).grad, atol=1e-12, rtol=0)


def test_positions_hold_the_last_ids_in_order():
    sparse = bags()
    positions = in_positions(sparse, [3, None, None])
    assert positions.num_features == 5
    assert positions.lengths_FB[:3].sum(0).tolist() == [0, 2, 3, 3, 1]
    ids = positions.ids.split(list(positions.counts_F))
    seventh = sparse.ids[2:9]
    assert [ids[0][1], ids[1][1], ids[2][0]] == seventh[-3:].tolist(), "of the bag with seven"
    assert torch.equal(positions.ids[-10:], sparse.ids[-10:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "plice"}, "'items' has the target 'plice', which is no feature"),
        ({"target": None}, "give target and max_length with pooling 'attention'"),
        ({"pooling": "mean"}, "give target and max_length with pooling 'attention'"),
        ({"pooling": "max"}, "Use one of sum, mean, attention, transformer"),
    ],
)
def test_what_an_ordered_bag_needs(change, message):
    with pytest.raises(ValueError, match=message):
        DhenConfig(**CONFIG | {"sparse_features": [ENTRIES[0] | change, *ENTRIES[1:]]})
