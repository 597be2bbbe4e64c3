"""Placement: every column of every table once, the same everywhere; near the best; cut where it helps."""

import itertools
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dhen.model.sparse_feature import SparseFeature
from dhen.tables.placement import packing as table_packing
from dhen.tables.placement.costs import StepSetting, read_costs, shard_seconds
from dhen.tables.placement.packing import Cut, CuttableTable, NoRoomError, Packer, longest_first
from dhen.tables.placement.plan import (
    PlacementError,
    PlacementOptions,
    place_tables,
)

CRITEO_1TB = (
    40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209, 11_938,
    155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36,
)  # fmt: skip
"""Rows of its 26 tables, as MLPerf trains them."""


def features(*rows: int) -> list[SparseFeature]:
    return [SparseFeature(f"C{index}", count) for index, count in enumerate(rows)]


def place(tables, dim, world_size, *, local_size=None, batch=4096, ids=None, **options):
    setting = StepSetting(world_size, local_size or world_size, batch)
    return place_tables(tables, dim, setting, read_costs("gpu"), ids, PlacementOptions(**options))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 10**7), min_size=0, max_size=20),
    dim=st.sampled_from([4, 8, 12, 64]),
    world_size=st.integers(1, 9),
)
def test_every_column_of_every_table_is_placed_once(rows, dim, world_size):
    tables = features(*rows)
    placement = place(tables, dim, world_size)
    columns = sorted(
        (shard.table, column) for shard in placement.shards for column in range(shard.first_column, shard.last_column)
    )
    assert columns == [(table, column) for table in range(len(tables)) for column in range(dim)]
    for shard in placement.shards:
        assert shard.num_columns % 4 == 0
        assert shard.first_column % shard.num_columns == 0, "shards of a table are equal"
        assert 0 <= shard.rank < world_size
    assert placement == place(tables, dim, world_size)


def test_longest_first_on_its_tight_case():
    # Graham 1969: 5,5,4,4,3,3,3 on 3 ranks is 11, the best is 9, and 11/9 is the bound 4/3 - 1/9.
    costs = [5, 5, 4, 4, 3, 3, 3]
    ranks = longest_first(costs, 3)
    assert max(sum(c for c, r in zip(costs, ranks, strict=True) if r == rank) for rank in range(3)) == 11
    assert math.isclose(11 / 9, 4 / 3 - 1 / 9)


@pytest.mark.parametrize("seed", range(25))
def test_longest_first_is_within_its_bound_of_the_best(seed):
    draw = random.Random(seed)
    num_ranks = draw.choice([2, 3])
    costs = [draw.uniform(0.1, 10) for _ in range(draw.randint(2, 8))]

    def makespan(ranks) -> float:
        return max(sum(c for c, r in zip(costs, ranks, strict=True) if r == rank) for rank in range(num_ranks))

    best = min(makespan(ranks) for ranks in itertools.product(range(num_ranks), repeat=len(costs)))
    found = makespan(longest_first(costs, num_ranks))
    assert found <= (4 / 3 - 1 / (3 * num_ranks)) * best * (1 + 1e-12)


def test_memory_is_never_exceeded_and_overrules_cost():
    costs, sizes = [9.0, 1.0, 1.0, 1.0], [1, 6, 6, 6]
    assert longest_first(costs, 2, sizes, limit=19) == [0, 1, 1, 1]
    ranks = longest_first(costs, 2, sizes, limit=13)
    used = [sum(s for s, r in zip(sizes, ranks, strict=True) if r == rank) for rank in range(2)]
    assert sorted(used) == [7, 12]
    with pytest.raises(NoRoomError) as caught:
        longest_first(costs, 2, sizes, limit=11)
    assert caught.value.item in (1, 2, 3)


def test_a_table_larger_than_a_rank_is_cut_because_it_must():
    (table,) = features(1_000_000)
    whole = 1_000_000 * (16 * 4 + 4 + 4)
    placement = place([table], 16, 4, memory_bytes=whole * 2 // 5)
    assert len(placement.shards) == 4
    assert all(placement.bytes_of_rank(rank) <= whole * 2 // 5 for rank in range(4))
    with pytest.raises(PlacementError) as caught:
        place([table], 16, 2, memory_bytes=whole * 2 // 5)
    for words in ("'C0' does not fit", "need", "have", "Possible solutions", "memory_gib", "fp16"):
        assert words in str(caught.value)


def test_a_plan_in_hand_is_kept_where_a_cut_for_cost_fits_no_more():
    """Whole, each table has a rank; three of their halves would leave no room for the fourth."""
    tables = features(302_480, 418_788)
    placement = place(tables, 64, 3, ids={"C0": 100.0}, memory_bytes=88_493_268, max_column_shards=2)
    assert all(placement.bytes_of_rank(rank) <= 88_493_268 for rank in range(3))


def test_shards_that_fit_only_by_size_are_placed_by_size():
    costs, sizes = [1.0, 1.0, 9.0, 8.0], [4, 2, 3, 3]
    with pytest.raises(NoRoomError):
        longest_first(costs, 2, sizes, limit=6)
    tables = [CuttableTable((Cut(1, cost, size),)) for cost, size in zip(costs, sizes, strict=True)]
    assert Packer(tables, 2, limit=6).pack().ranks == ((0,), (0,), (1,), (1,))


def test_tables_are_cut_only_while_that_brings_the_longest_rank_down():
    even = place(features(*[1000] * 8), 64, 4)
    assert set(even.cuts().values()) == {1}, "an even placement needs no cut"
    heavy = place(features(10**7, *[1000] * 7), 64, 4, ids={"C0": 50.0})
    assert heavy.cuts()["C0"] > 1
    whole = place(features(10**7, *[1000] * 7), 64, 4, ids={"C0": 50.0}, max_column_shards=1)
    assert set(whole.cuts().values()) == {1}
    assert heavy.makespan < 0.7 * whole.makespan


def test_tables_go_where_the_user_puts_them():
    tables = features(100, 5000, 70)
    placement = place(tables, 16, 4, by_hand={"C1": [3], "C2": [0, 2]})
    at = {(shard.name, shard.first_column): shard.rank for shard in placement.shards}
    assert at["C1", 0] == 3
    assert (at["C2", 0], at["C2", 8]) == (0, 2)
    for wrong, words in (
        ({"C9": [0]}, "'C9'"),
        ({"C1": [4]}, "names rank 4, but this job has ranks 0 to 3"),
        ({"C1": [0, 1, 2]}, "can only be cut into 1, 2, 4"),
    ):
        with pytest.raises(PlacementError, match=words):
            place(tables, 16, 4, by_hand=wrong)


def test_what_is_placed_by_hand_must_fit_its_rank():
    tables = features(1000, 5000, 70)
    size = 6000 * (16 * 4 + 4 + 4)
    by_hand = {"C0": [1], "C1": [1]}
    assert place(tables, 16, 2, by_hand=by_hand, memory_bytes=size).bytes_of_rank(1) == size
    with pytest.raises(PlacementError, match=r"dhen\.placement\.tables puts C0, C1 on rank 1"):
        place(tables, 16, 2, by_hand=by_hand, memory_bytes=size - 1)


def test_a_table_that_the_checkpoint_replicates_cannot_be_placed_by_hand():
    with pytest.raises(PlacementError, match=r"dhen\.placement\.tables\.C1: the checkpoint has this table replicated"):
        place(features(100, 50), 16, 2, by_hand={"C1": [0]}, replicated=["C1"])


def test_replicated_tables_take_memory_of_every_rank():
    tables = features(100_000, 1_000)
    replicated, sharded = 1_000 * 16 * 16, 100_000 * (16 * 4 + 4 + 4)
    plan = place(tables, 16, 1, replicated=["C1"], memory_bytes=sharded + replicated)
    assert plan.replicated == ("C1",)
    with pytest.raises(PlacementError, match="of replicated tables"):
        place(tables, 16, 1, replicated=["C1"], memory_bytes=sharded + replicated - 1)


def test_tables_are_not_replicated_for_speed_where_the_others_need_the_memory():
    tables, smallest_shard = features(40_000_000, *[50] * 10), 40_000_000 * (4 * 4 + 4 + 4)
    assert place(tables, 16, 16, replicate_below_rows=100).replicated
    plan = place(tables, 16, 16, replicate_below_rows=100, memory_bytes=smallest_shard)
    assert plan.replicated == ()
    assert all(plan.bytes_of_rank(rank) <= smallest_shard for rank in range(16))


def test_the_lower_bound_takes_no_shard_that_could_still_be_cut():
    plan = place(features(10**7, *[1000] * 7), 64, 4, ids={"C0": 50.0})
    whole = place(features(10**7, *[1000] * 7), 64, 4, ids={"C0": 50.0}, max_column_shards=1)
    smallest = shard_seconds(read_costs("gpu"), StepSetting(4, 4, 4096), 10**7, 4, 50.0).total
    assert plan.unsliceable == pytest.approx(smallest)
    assert plan.unsliceable < min(shard.seconds for shard in plan.shards if shard.name == "C0")
    assert whole.lower_bound == max(shard.seconds for shard in whole.shards), "uncuttable by the user's word"


def test_cuts_of_a_checkpoint_are_kept():
    tables = features(10**7, 50, 60)
    for cut in (1, 2, 4):
        placement = place(tables, 16, 2, cuts={"C0": cut, "C1": 1, "C2": 1}, ids={"C0": 50.0})
        assert placement.cuts() == {"C0": cut, "C1": 1, "C2": 1}


BAGS = {"1": (1.0,), "20": (20.0,), "1, 3, 10, 20": (1.0, 3.0, 10.0, 20.0)}
"""Mean ids of the tables' bags, in turn."""
ABOVE_FIVE_PERCENT = {
    ("gpu", "1", 16, 16): 1.061,
    ("gpu", "1", 64, 128): 1.143,
    ("gpu", "1", 128, 128): 1.065,
    ("gpu", "20", 16, 16): 1.064,
    ("gpu", "20", 64, 128): 1.086,
    ("gpu", "20", 128, 128): 1.120,
    ("gpu", "1, 3, 10, 20", 64, 128): 1.116,
    ("gpu", "1, 3, 10, 20", 128, 128): 1.053,
    ("cpu", "1", 64, 128): 1.218,
    ("cpu", "20", 16, 16): 1.340,
    ("cpu", "20", 64, 16): 1.080,
    ("cpu", "20", 128, 128): 1.108,
}
"""Costs, bags, dimension, ranks: what is reached. Equal shards of a multiple of 4 columns are powers of two in number
here, so tables of nearly one cost can't always be dealt evenly; more cuts would only add work, to all ranks."""


def place_criteo(costs, bags, dim, world_size):
    tables = features(*CRITEO_1TB)
    ids = {table.name: BAGS[bags][index % len(BAGS[bags])] for index, table in enumerate(tables)}
    return place_tables(tables, dim, StepSetting(world_size, 8, 4096), read_costs(costs), ids)


@pytest.mark.parametrize("bags", BAGS)
@pytest.mark.parametrize("costs", ["gpu", "cpu"])
def test_criteo_1tb_is_within_five_percent_of_the_lower_bound(costs, bags):
    for dim, world_size in itertools.product((16, 64, 128), (8, 16, 128)):
        placement = place_criteo(costs, bags, dim, world_size)
        case = (costs, bags, dim, world_size)
        assert placement.makespan <= ABOVE_FIVE_PERCENT.get(case, 1.05) * placement.lower_bound, case


@pytest.mark.parametrize("case", [("cpu", "20", 16, 16), ("cpu", "20", 64, 16), ("gpu", "20", 16, 16)], ids=str)
def test_above_five_percent_no_longer_search_and_no_more_cuts_shorten_the_longest_rank(case, monkeypatch):
    placement = place_criteo(*case)
    monkeypatch.setattr(table_packing, "_TRIES", 20_000)
    monkeypatch.setattr(table_packing, "_TRIED_SHARDS", 4_000_000)
    assert place_criteo(*case).makespan > 0.99 * placement.makespan


@pytest.mark.parametrize("world_size", [8, 16, 128])
def test_cost_beats_size_and_round_robin_on_multi_valued_features(world_size):
    tables = features(*CRITEO_1TB)
    ids = {table.name: (1.0, 3.0, 10.0, 20.0)[index % 4] for index, table in enumerate(tables)}
    setting = StepSetting(world_size, 8, 4096)
    seconds = [shard_seconds(read_costs("gpu"), setting, t.num_embeddings, 64, ids[t.name]).total for t in tables]

    def makespan(ranks) -> float:
        return max(sum(s for s, r in zip(seconds, ranks, strict=True) if r == rank) for rank in range(world_size))

    by_size = makespan(longest_first([table.num_embeddings for table in tables], world_size))
    round_robin = makespan([index % world_size for index in range(len(tables))])
    ours = place(tables, 64, world_size, local_size=8, ids=ids).makespan
    assert ours < by_size
    assert ours < round_robin


def test_a_thousand_tables_on_128_ranks_take_under_two_seconds():
    draw = random.Random(0)
    tables = features(*(int(10 ** draw.uniform(1, 8)) for _ in range(1000)))
    ids = {table.name: draw.choice([1.0, 1.0, 5.0, 20.0, 100.0]) for table in tables}
    start = time.process_time()
    placement = place(tables, 128, 128, local_size=8, ids=ids, memory_bytes=60 * 2**30)
    assert time.process_time() - start < 2
    assert placement.makespan <= 1.05 * placement.lower_bound


def test_the_printed_table_names_every_rank_and_table():
    text = place(features(4, 8, 16), 8, 2, by_hand={"C1": [0, 1]}).as_table()
    assert text.count("\n") == 3
    for name in ("C0", "C1[0:4]", "C1[4:8]", "C2", "lower bound"):
        assert name in text


def test_more_ranks_than_tables_leaves_ranks_without():
    placement = place(features(4, 4), 8, 4, max_column_shards=1)
    assert [len(placement.of_rank(rank)) for rank in range(4)] == [1, 1, 0, 0]


def test_small_tables_are_replicated_where_their_all_reduce_is_cheaper_than_their_all_to_all():
    tables = features(*CRITEO_1TB)
    assert place(tables, 16, 16).replicated == ()
    plan = place(tables, 16, 16, replicate_below_rows=2_000)
    small = {table.name for table in tables if table.num_embeddings < 2_000}
    assert set(plan.replicated) == small
    assert small.isdisjoint(shard.name for shard in plan.shards)
    assert plan.makespan < place(tables, 16, 16).makespan
    everything = place(tables, 16, 16, replicate_below_rows=10**9).replicated
    assert small < set(everything) < {table.name for table in tables}, "large ones aren't worth it"
    by_hand = place(tables, 16, 16, replicate_below_rows=2_000, by_hand={"C5": [3]})
    assert set(by_hand.replicated) == small - {"C5"}
