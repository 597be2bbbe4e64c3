"""An ordered bag pooled by attention equals a plain loop over the last ids of each bag."""

import pytest
import torch
from torch import Tensor

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


def plain(model: DhenForClickPrediction, sparse: SparseIds) -> Tensor:
    """embeddings_BFD of the three features, bag by bag."""
    item, place = (model.tables.get_submodule(name).weight for name in ("item", "place"))
    histories, places, items = sparse.ids.split([sum(LENGTHS), 5, 5])
    unit = model.model.features.sequences.by_feature.get_submodule("items").weight
    pooled = []
    for history, target in zip(histories.split(LENGTHS), item[items], strict=True):
        total = torch.zeros(4, dtype=item.dtype)
        for e in item[history[-3:]]:
            total = total + unit(torch.cat([e, target, e - target, e * target])[None])[0] * e
        pooled.append(total)
    return torch.stack([torch.stack(pooled), place[places], item[items]], 1)


def test_attention_equals_a_loop_over_the_last_ids():
    model = DhenForClickPrediction(DhenConfig(**CONFIG)).double()
    sparse, found = bags(), []
    model.model.features.register_forward_hook(lambda _, __, x_BMD: found.append(x_BMD))
    model(in_positions(sparse, [3, None, None])).logits.sum().backward()
    by_loop = plain(model, sparse)
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
        ({"pooling": "max"}, "Use 'sum', 'mean' or 'attention'"),
    ],
)
def test_what_an_ordered_bag_needs(change, message):
    with pytest.raises(ValueError, match=message):
        DhenConfig(**CONFIG | {"sparse_features": [ENTRIES[0] | change, *ENTRIES[1:]]})
