"""Features that share a table equal plain lookups in one shared torch table, whole or cut, on one rank or two."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import PlainTables, SparseIds, init_table
from dhen.model.sparse_feature import SparseFeature
from dhen.runtime.topology import Topology
from dhen.tables.placement.costs import StepSetting, read_costs, replicated_seconds, shard_seconds
from dhen.tables.placement.plan import PlacementOptions, place_tables
from dhen.tables.replicated import ReplicatedFeatures
from dhen.tables.row_uses import mean_row
from dhen.tables.sharded_tables import ShardedTables
from dhen.tables.storage import load_tables
from dhen.tables.updated_tables import TableUpdate
from tests.ranks import run_ranks
from tests.tables.saving import save_tables

DIM, RATE, STEPS, BATCH, EPSILON = 8, 0.3, 4, 6, 1e-8
FEATURES = (
    SparseFeature("item", 30),
    SparseFeature("other", 12),
    SparseFeature("history", 30, "mean", table="item"),
    SparseFeature("liked", 30, table="item"),
)
ENTRIES = [
    {"name": of.name, "num_embeddings": of.num_embeddings, "pooling": of.pooling, "table": of.table} for of in FEATURES
]
COSTS = read_costs("cpu")


def batch_of(step: int, rank: int) -> SparseIds:
    generator = torch.Generator().manual_seed(10 * step + rank)
    lengths_FB = torch.randint(0, 4, (len(FEATURES), BATCH + rank), generator=generator)
    most = [of.num_embeddings for of in FEATURES]
    ids = [
        torch.randint(0, rows, (int(n),), generator=generator) for rows, n in zip(most, lengths_FB.sum(1), strict=True)
    ]
    return SparseIds(torch.cat(ids), len(FEATURES), lengths_FB)


def target_of(step: int, rank: int) -> Tensor:
    return torch.randn(BATCH + rank, len(FEATURES), DIM, generator=torch.Generator().manual_seed(99 * step + rank))


def plain_lookup(weights: dict[str, Tensor], sparse: SparseIds) -> Tensor:
    bags = zip(FEATURES, sparse.ids.split(list(sparse.counts_F)), sparse.lengths_FB, strict=True)
    pooled = [embedding_bag(ids, weights[of.table], n.cumsum(0) - n, mode=of.pooling) for of, ids, n in bags]
    return torch.stack(pooled, 1)


def plain_training(optimizer: str, ranks: int, cuts: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The tables after all steps, and rank 0's embeddings in each step."""
    rows = {"item": 30, "other": 12}
    weights = {name: init_table(name, count, DIM, range(DIM), 0).requires_grad_(True) for name, count in rows.items()}
    sums, outputs = {name: torch.zeros(count, DIM) for name, count in rows.items()}, []
    for step in range(STEPS):
        found = [plain_lookup(weights, batch_of(step, rank)) for rank in range(ranks)]
        outputs.append(found[0].detach())
        sum((of_rank * target_of(step, rank)).sum() / ranks for rank, of_rank in enumerate(found)).backward()
        with torch.no_grad():
            for name, weight in weights.items():
                if optimizer == "sgd":
                    weight -= RATE * weight.grad
                else:
                    of_shards = weight.grad.square().unflatten(1, (cuts, -1)).mean(2, keepdim=True)
                    sums[name] += of_shards.expand(-1, -1, DIM // cuts).flatten(1)
                    weight -= RATE * weight.grad / (sums[name].sqrt() + EPSILON)
                weight.grad = None
    return {name: weight.detach() for name, weight in weights.items()}, outputs


def make_tables(topology: Topology, update: TableUpdate, cuts: int) -> ShardedTables:
    options = PlacementOptions(cuts=dict.fromkeys(("item", "other"), cuts))
    placement = place_tables(FEATURES, DIM, StepSetting(topology.world_size, 2, 6), COSTS, options=options)
    tables = ShardedTables(FEATURES, DIM, placement, topology, update=update)
    tables.set_learning_rate(RATE)
    return tables


def train(topology: Topology, update: TableUpdate, cuts: int, folder: Path | None = None) -> tuple:
    tables, outputs = make_tables(topology, update, cuts), []
    for step in range(STEPS):
        embeddings = tables(batch_of(step, topology.rank))
        outputs.append(embeddings.detach())
        (embeddings * target_of(step, topology.rank)).sum().backward()
    with torch.no_grad(), tables.watching_unseen(uses_means=True) as unseen:
        seen = tables(batch_of(STEPS, topology.rank))
    if folder is not None:
        save_tables(tables, folder, topology.rank)
        topology.barrier()
        other = make_tables(topology, update, 1)
        load_tables(other, folder, topology)
        with torch.no_grad():
            torch.testing.assert_close(other(batch_of(9, topology.rank)), tables(batch_of(9, topology.rank)))
    shards = [
        (of.name, of.first_column, kinds["weight"].clone(), kinds["uses"].clone())
        for of, kinds in tables.shard_tensors()
    ]
    return shards, outputs, seen, unseen.counts_3S


def joined(by_rank: list[tuple], name: str) -> tuple[Tensor, Tensor]:
    shards = sorted((of[1:] for found in by_rank for of in found[0] if of[0] == name), key=lambda of: of[0])
    return torch.cat([weight for _, weight, _ in shards], 1), shards[0][2]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("cuts", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "sgd by torch"])
def test_features_on_one_table_equal_a_shared_plain_table(optimizer, cuts, ranks, tmp_path):
    # new rows have the rate of old ones here, but are updated by UpdatedTables instead of FBGEMM
    update = TableUpdate(optimizer.split()[0], has_new_rows=" " in optimizer)
    by_rank = run_ranks(ranks, train, update, cuts, tmp_path if optimizer == "sgd" else None)
    weights, outputs = plain_training(update.optimizer, ranks, cuts)
    for found, expected in zip(by_rank[0][1], outputs, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    trained = {name: joined(by_rank, name) for name in weights}
    for name, weight in weights.items():
        torch.testing.assert_close(trained[name][0], weight, atol=1e-6, rtol=1e-5)
    batches = [batch_of(step, rank) for step in range(STEPS) for rank in range(ranks)]
    used = torch.cat([ids for b in batches for f, ids in enumerate(b.ids.split(list(b.counts_F))) if f != 1])
    assert torch.equal(trained["item"][1].long(), used.bincount(minlength=30)), (
        "each use of a row counts, by any feature"
    )
    filled = {name: weight.clone() for name, weight in weights.items()}
    for name, weight in filled.items():
        uses = trained[name][1]
        weight[uses == 0] = mean_row(weight, uses)
    torch.testing.assert_close(by_rank[0][2], plain_lookup(filled, batch_of(STEPS, 0)), atol=1e-6, rtol=1e-5)


def test_the_cost_of_a_shared_table_is_that_of_one_table_and_of_all_its_lookups():
    setting = StepSetting(2, 2, 100)
    ids = {"item": 1.0, "history": 5.0, "liked": 3.0}
    placement = place_tables(FEATURES, DIM, setting, COSTS, ids)
    assert {shard.name for shard in placement.shards} == {"item", "other"}
    (shard,) = (shard for shard in placement.shards if shard.name == "item")
    assert shard.num_bytes == setting.shard_bytes(30, DIM)
    assert (shard.ids_per_bag, shard.num_features) == (3.0, 3)
    assert shard.seconds == shard_seconds(COSTS, setting, 30, DIM, 3.0, 3).total
    three, one = (shard_seconds(COSTS, setting, 30, DIM, 3.0, count) for count in (3, 1))
    assert three.exchange == pytest.approx(3 * one.exchange)
    assert one.lookup < three.lookup < 3 * one.lookup + 1e-12
    assert replicated_seconds(COSTS, setting, 30, DIM, 3.0, 3) > replicated_seconds(COSTS, setting, 30, DIM, 3.0)


def replicated(topology: Topology) -> tuple[list, Tensor, Tensor]:
    features = ReplicatedFeatures(DhenConfig(embedding_dim=DIM, sparse_features=ENTRIES), ["item"], topology)
    own = features.own(batch_of(0, 0))
    features.gather_uses()
    return [table.name for table in features.tables], own.lengths_FB, features.uses_by_name()["item"]


def test_plain_and_replicated_tables_are_shared_too():
    config, sparse = DhenConfig(embedding_dim=DIM, sparse_features=ENTRIES), batch_of(0, 0)
    assert [table.name for table in config.tables] == ["item", "other"]
    tables = PlainTables(config, seed=0)
    weights = tables.state_dict()
    assert set(weights) == {"item.weight", "other.weight"}
    expected = plain_lookup({name: weights[f"{name}.weight"] for name in ("item", "other")}, sparse)
    torch.testing.assert_close(tables(sparse), expected)
    ((names, lengths_FB, uses),) = run_ranks(1, replicated)
    assert names == ["item"]
    assert torch.equal(lengths_FB, sparse.lengths_FB[[0, 2, 3]])
    assert uses.sum() == lengths_FB.sum()


def test_features_on_one_table_must_have_as_many_rows():
    entries = [*ENTRIES, {"name": "short", "num_embeddings": 29, "table": "item"}]
    with pytest.raises(ValueError, match="'short' shares the table 'item', but not its num_embeddings"):
        DhenConfig(sparse_features=entries)
