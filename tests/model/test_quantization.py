"""Rows in int8 and int4 are as close as their levels allow, and joined tables look up what the tables do."""

import pytest
import torch

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import PlainTables, SparseIds
from dhen.model.quantization import SCALE_DTYPES, dequantize, quantize
from dhen.model.scoring_graph import JoinedTables, graph_inputs

D = 6


@pytest.mark.parametrize(("dtype", "levels"), [("int8", 255), ("int4", 15)])
def test_a_value_is_off_by_half_a_level_at_most(dtype, levels):
    rows = torch.randn(50, D, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    rows[7] = 0.25
    stored = quantize(rows, dtype)
    found = dequantize(stored, dtype)
    step = (rows.amax(1) - rows.amin(1)) / levels
    rounding = 2e-3 * rows.abs().amax(1) if dtype == "int4" else 1e-6 * rows.abs().amax(1)  # of scale and bias
    assert ((found - rows).abs().amax(1) <= step / 2 + rounding).all()
    assert ((found - rows).abs().amax(1) > step / 8)[:5].all()  # rounded at all
    assert torch.equal(found[7], rows[7])
    assert stored.values.nbytes + stored.scale_bias.nbytes == 50 * (D + 8 if dtype == "int8" else D // 2 + 4)


def tables_of(dtype: str) -> tuple[DhenConfig, PlainTables]:
    features = [
        {"name": "item", "num_embeddings": 7},
        {"name": "seen", "num_embeddings": 7, "table": "item", "pooling": "mean"},
        {"name": "user", "num_embeddings": 5},
        {"name": "last", "num_embeddings": 5, "table": "user", "pooling": "attention", "target": "user",
         "max_length": 2},
    ]  # fmt: skip
    config = DhenConfig(embedding_dim=D, sparse_features=[each | {"dtype": dtype} for each in features])
    tables, draw = PlainTables(config, seed=0), torch.Generator().manual_seed(1)
    if dtype in SCALE_DTYPES:
        for table in tables.children():
            table.weight, table.scale_bias = quantize(
                torch.randn(table.feature.num_embeddings, D, generator=draw), dtype
            )
    return config, tables


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_joined_tables_look_up_what_the_tables_do(dtype):
    config, tables = tables_of(dtype)
    joined, draw = JoinedTables(tables, config), torch.Generator().manual_seed(2)
    lengths = torch.tensor([[1, 1, 1], [0, 3, 1], [1, 1, 1], [0, 1, 1], [1, 0, 0]])
    counts = lengths.sum(1).tolist()
    sizes = [feature.num_embeddings for feature in config.lookups]
    ids = [torch.randint(size, (count,), generator=draw) for size, count in zip(sizes, counts, strict=True)]
    for weights in (None, torch.rand(sum(counts), generator=draw)):
        bags = SparseIds(torch.cat(ids), 5, lengths, weights)
        inputs = graph_inputs(bags, torch.empty(3, 0))
        torch.testing.assert_close(joined(*inputs.values()), tables(bags), rtol=1e-6, atol=1e-6)
    single = SparseIds(torch.cat([torch.arange(3)] * 5), 5)
    assert torch.equal(joined(**graph_inputs(single, torch.empty(3, 0))), tables(single))
    nothing = SparseIds(torch.empty(0, dtype=torch.int64), 5, torch.zeros(5, 2, dtype=torch.int64))
    assert torch.equal(joined(nothing.ids, nothing.lengths_FB), torch.zeros(2, 5, D))
