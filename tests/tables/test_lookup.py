"""Where FBGEMM's tables live, in which order a rank has its shards, and how many bytes an id takes on its way."""

from dataclasses import replace

import torch

from dhen.model.features import SparseIds
from dhen.model.sparse_feature import SparseFeature
from dhen.runtime.topology import Topology
from dhen.tables.id_exchange import IdExchange
from dhen.tables.placement.beyond_device import beyond_device
from dhen.tables.placement.costs import StepSetting
from dhen.tables.placement.plan import Placement, TableShard
from dhen.tables.pooled_exchange import PooledLayout
from dhen.tables.sharded_tables import ShardedTables
from tests.ranks import run_ranks


def shards_of(*num_bytes: int) -> list[TableShard]:
    """Of so many bytes, a fifth of which a cache takes."""
    return [TableShard(0, "table", 1, 0, 4, 0, size, cached_bytes=size // 5) for size in num_bytes]


def test_tables_leave_the_device_only_where_they_do_not_fit():
    assert beyond_device(shards_of(10, 20, 30), 60) == frozenset()
    assert beyond_device(shards_of(10, 20, 30), 59) == {2}
    assert beyond_device(shards_of(10, 30, 30), 30) == {1, 2}, "of two equal ones the first"
    assert beyond_device(shards_of(100), 10) == {0}
    assert beyond_device([], 0) == frozenset()
    assert beyond_device(shards_of(10, 20, 30), 10 + 20 + 6) == {2}, "the cache of what left counts"
    assert beyond_device(shards_of(10, 20, 30), 10 + 20 + 5) == {1, 2}
    narrow = TableShard(0, "narrow", 1, 0, 4, 0, num_bytes=40, cached_bytes=41)
    assert beyond_device([*shards_of(10, 20), narrow], 69) == {1}, "what would take more in the cache stays"


def test_what_a_cached_table_leaves_on_the_device():
    """Row-wise Adagrad, the uses and FBGEMM's map, a number per row each; a fifth of the rows, each with 16 bytes."""
    setting = StepSetting(4, 2, 64, optimizer="rowwise_adagrad", table_dtype="fp16")
    assert setting.cached_bytes(1000, 16) == 1000 * (4 + 4 + 4) + 200 * (16 + 32)
    assert replace(setting, optimizer="adagrad").cached_bytes(1000, 16) == 1000 * (4 + 4) + 200 * (16 + 32)


def test_embeddings_are_joined_in_feature_order_and_gradients_split_by_rank():
    first, second, third = (TableShard(table, "", 10, 0, 4, rank=int(table == 0)) for table in range(3))
    layout = PooledLayout(((second, third), (first,)), num_features=3, embedding_dim=4, rank=0)
    parts = [torch.arange(16.0).view(2, 8), torch.arange(100.0, 108.0).view(2, 4)]
    flat = torch.cat([part.flatten() for part in parts])
    joined = layout.join(flat, 2, 2)
    assert joined[0].flatten().tolist() == [100, 101, 102, 103, *range(8)]
    assert torch.equal(layout.split(joined, 2, 1.0), flat)


ROWS = {"small": [50], "large": [2**31 + 10], "large together": [2**30, 2**30 + 10]}


def send_last_ids(topology: Topology) -> dict[str, tuple]:
    """The last id of each table of a rank."""
    result = {}
    for case, sizes in ROWS.items():
        names = [f"{case} {number}" for number in range(len(sizes))]
        tables = [SparseFeature(name, rows) for name, rows in zip(names, sizes, strict=True)]
        shards = [TableShard(number, table.name, table.num_embeddings, 0, 4, 0) for number, table in enumerate(tables)]
        exchange = IdExchange(tables, [shards], topology)
        own = exchange.receive(exchange.send(SparseIds(torch.tensor([rows - 1 for rows in sizes]), len(sizes))))
        result[case] = (own.ids.dtype, own.offsets.dtype, own.ids.tolist())
    return result


def test_ids_travel_in_32_bits_where_no_rank_has_more_rows():
    """FBGEMM adds the rows of a rank's tables before it to an id."""
    (sent,) = run_ranks(1, send_last_ids)
    assert sent["small"] == (torch.int32, torch.int32, [49])
    assert sent["large"] == (torch.int64, torch.int64, [2**31 + 9])
    assert sent["large together"] == (torch.int64, torch.int64, [2**30 - 1, 2**30 + 9])


def widths_of_own_shards(topology: Topology) -> list[int]:
    shards = (TableShard(0, "a", 5, 0, 8, 0), TableShard(1, "b", 5, 0, 4, 0), TableShard(1, "b", 5, 4, 8, 0))
    shards = (*shards, TableShard(2, "c", 5, 0, 8, 0))
    features = tuple(SparseFeature(name, 5) for name in "abc")
    tables = ShardedTables(features, 8, Placement(shards, 1), topology, table_dtype="fp16", table_rounding="stochastic")
    return [shard.num_columns for shard in tables.shards]


def test_shards_of_one_width_are_neighbours():
    assert run_ranks(1, widths_of_own_shards) == [[4, 4, 8, 8]]
