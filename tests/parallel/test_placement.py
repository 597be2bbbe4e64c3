"""Placement: every column of every table once, the same everywhere, large tables apart."""

import pytest

from dhen.model.configuration_dhen import SparseFeature
from dhen.parallel.placement import place_tables


def features(*rows: int) -> list[SparseFeature]:
    return [SparseFeature(f"C{index}", count) for index, count in enumerate(rows)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_table_is_placed_once(world_size):
    tables = features(5, 100, 7, 7, 2000, 1)
    placement = place_tables(tables, 16, world_size)
    assert sorted(shard.table for shard in placement.shards) == list(range(6))
    assert all((shard.first_column, shard.last_column) == (0, 16) for shard in placement.shards)
    assert {shard.rank for shard in placement.shards} <= set(range(world_size))


def test_the_largest_tables_are_apart():
    placement = place_tables(features(10, 1000, 10, 900, 10), 8, 2)
    (big,) = [shard.rank for shard in placement.shards if shard.num_embeddings == 1000]
    (second,) = [shard.rank for shard in placement.shards if shard.num_embeddings == 900]
    assert big != second


def test_longest_first_is_within_its_bound():
    # Graham 1969: LPT's makespan is at most 4/3 - 1/(3 m) of the best; 5,5,4,4,3,3,3 on 3 ranks is the tight case.
    placement = place_tables(features(5, 5, 4, 4, 3, 3, 3), 4, 3, bytes_per_weight=1)
    assert max(placement.bytes_of_rank(rank) for rank in range(3)) == 11 * 4
    assert 9 * 11 == 9 * 9 * 4 // 3 - 9  # 11 = 9 (4/3 - 1/9), in whole numbers


def test_more_ranks_than_tables_leaves_ranks_without():
    placement = place_tables(features(4, 4), 8, 4)
    assert [len(placement.of_rank(rank)) for rank in range(4)] == [1, 1, 0, 0]


def test_the_printed_table_names_every_rank_and_table():
    text = place_tables(features(4, 8, 16), 8, 2).as_table()
    assert text.count("\n") == 2
    for name in ("C0", "C1", "C2"):
        assert name in text
