"""The batch loader: every row once, the same order on any number of ranks, resumable, and bounded in memory."""

import itertools
import math
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dhen.data.loading import batches as batches_module
from dhen.data.loading.batches import READ_AHEAD_BATCHES, BatchLoader
from dhen.data.loading.lanes import choose_lanes
from dhen.data.loading.prepared_rows import RowGroup, read_row_group
from dhen.data.schema import SparseColumn, SplitCounts
from tests.data.prepared_folders import MIXED, SINGLE, rows_of, write_prepared

SHUFFLED = {"shuffle": True, "window_rows": 20}


def numbers(batches):
    return [row for batch in batches for row in batch.rows_B.tolist()]


def order(folder, epoch=0, first_step=0, **options):
    return numbers(BatchLoader(folder, "train", **({"batch_size": 5} | options)).epoch(epoch, first_step))


def pieces_by_step(folder, epoch=0, *, world_size, accumulation_steps, **options):
    """The batches of all ranks as [step][piece], in the order of the step's rows."""
    loaders = [
        BatchLoader(folder, "train", rank=rank, world_size=world_size, accumulation_steps=accumulation_steps, **options)
        for rank in range(world_size)
    ]
    by_rank = [list(loader.epoch(epoch)) for loader in loaders]
    assert {len(batches) for batches in by_rank} == {len(loaders[0]) * accumulation_steps}
    firsts = range(0, len(by_rank[0]), accumulation_steps)
    return [[batch for of_rank in by_rank for batch in of_rank[at : at + accumulation_steps]] for at in firsts]


@pytest.fixture
def prepared(tmp_path):
    return write_prepared(tmp_path / "prepared", 83)


@settings(max_examples=30, deadline=None)
@given(
    num_rows=st.integers(1, 70),
    group_rows=st.integers(1, 20),
    window_rows=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    world_size=st.integers(1, 4),
    accumulation_steps=st.integers(1, 3),
    sparse=st.sampled_from([MIXED, SINGLE, ()]),
    lanes=st.integers(1, 6),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**63),
)
def test_every_row_comes_once_an_epoch_with_its_own_values(num_rows, group_rows, sparse, lanes, **options):
    global_batch = options["batch_size"] * options["world_size"] * options["accumulation_steps"]
    options["lanes"] = math.gcd(lanes, global_batch)
    with tempfile.TemporaryDirectory() as folder:
        prepared = write_prepared(Path(folder) / "prepared", num_rows, sparse, group_rows=group_rows)
        steps = pieces_by_step(prepared.folder, **options)
    batches = [batch for pieces in steps for batch in pieces]
    assert sorted(numbers(batches)) == list(range(num_rows))
    for batch in batches:
        assert rows_of(batch, prepared.schema) == [prepared.rows[row] for row in batch.rows_B.tolist()]
    for pieces in steps:
        sizes = [len(batch.labels_B) for batch in pieces]
        assert {batch.global_rows for batch in pieces} == {sum(sizes)}
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= options["batch_size"]


@pytest.mark.parametrize("lanes", [1, 4, 12])
@pytest.mark.parametrize("shuffle", [False, True])
def test_steps_hold_the_same_rows_on_any_number_of_ranks_and_accumulation_steps(prepared, shuffle, lanes):
    options = {"shuffle": shuffle, "window_rows": 20, "seed": 3, "lanes": lanes}
    whole = [
        numbers(s)
        for s in pieces_by_step(prepared.folder, world_size=1, accumulation_steps=1, batch_size=12, **options)
    ]
    assert [len(step) for step in whole] == [12] * 6 + [11]
    for world_size, accumulation_steps in ((2, 1), (3, 1), (4, 1), (1, 4), (2, 3), (3, 2), (4, 3)):
        steps = pieces_by_step(
            prepared.folder,
            world_size=world_size,
            accumulation_steps=accumulation_steps,
            batch_size=12 // (world_size * accumulation_steps),
            **options,
        )
        assert [numbers(step) for step in steps] == whole


@pytest.mark.parametrize(
    "options",
    [
        {},
        SHUFFLED,
        {"drop_last": True},
        {"accumulation_steps": 2, **SHUFFLED},
        {"lanes": 3, **SHUFFLED},
        {"lanes": 5, **SHUFFLED},
        {"lanes": 15, "drop_last": True, **SHUFFLED},
    ],
)
def test_resuming_at_any_step_gives_the_rest_of_the_epoch(prepared, options):
    loader = BatchLoader(prepared.folder, "train", batch_size=5, rank=1, world_size=3, **options)
    whole = [(batch.rows_B.tolist(), rows_of(batch, loader.schema)) for batch in loader.epoch(4)]
    for step in range(len(loader) + 1):
        rest = [(batch.rows_B.tolist(), rows_of(batch, loader.schema)) for batch in loader.epoch(4, first_step=step)]
        assert rest == whole[step * loader.accumulation_steps :]


def read_by_rank(prepared, monkeypatch, **options):
    """First rows of the row groups that a rank reads in an epoch."""
    read = []

    def note(group, schema):
        read.append(group.first_row)
        return read_row_group(group, schema)

    monkeypatch.setattr(batches_module, "read_row_group", note)
    list(BatchLoader(prepared.folder, "train", shuffle=True, window_rows=1, **options).epoch(0))
    return read


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_rank_reads_its_own_lanes_alone(tmp_path, monkeypatch, world_size):
    prepared = write_prepared(tmp_path / "p", 1600, SINGLE, group_rows=10)
    options = {"batch_size": 80 // world_size, "world_size": world_size, "lanes": 8}
    of_ranks = [read_by_rank(prepared, monkeypatch, rank=rank, **options) for rank in range(world_size)]
    assert sorted(group for read in of_ranks for group in read) == [10 * number for number in range(160)]


def test_ranks_share_a_lane_if_there_are_fewer_lanes_than_ranks(tmp_path, monkeypatch):
    prepared = write_prepared(tmp_path / "p", 1600, SINGLE, group_rows=100)
    options = {"batch_size": 20, "world_size": 4, "lanes": 2}
    read = [read_by_rank(prepared, monkeypatch, rank=rank, **options) for rank in range(4)]
    assert [len(groups) for groups in read] == [8] * 4
    assert read[0] == read[1] != read[2] == read[3]


def test_a_step_draws_on_all_lanes(tmp_path):
    prepared = write_prepared(tmp_path / "p", 1600, SINGLE, group_rows=10)
    batches = list(BatchLoader(prepared.folder, "train", shuffle=True, window_rows=1, batch_size=80, lanes=16).epoch(0))
    assert {len(batch.rows_B // 10) for batch in batches} == {80}
    assert {len(set((batch.rows_B // 10).tolist())) for batch in batches} == {16}


@pytest.mark.parametrize(
    ("groups", "group_rows", "global_batch", "lanes"),
    [
        (15, 10, 64, 1),  # less than eight row groups per lane
        (16, 10, 64, 2),
        (10_000, 10, 64, 64),
        (10_000, 10, 96, 32),
        (10_000, 10, 99, 1),
        (10_000, 10, 1 << 20, 256),
        (10_000, 1 << 20, 1 << 20, 8),  # one row group of each lane in memory
    ],
)
def test_the_number_of_lanes(groups, group_rows, global_batch, lanes):
    found = [RowGroup(Path("p"), index, index * group_rows, group_rows) for index in range(groups)]
    assert choose_lanes(found, global_batch) == lanes


def test_lanes_that_do_not_divide_the_batch_are_refused(prepared):
    with pytest.raises(ValueError, match=r"lanes is 3\. Use a divisor of the global batch, 10"):
        BatchLoader(prepared.folder, "train", batch_size=5, world_size=2, lanes=3)


def test_the_order_depends_on_seed_and_epoch_alone(prepared):
    first = order(prepared.folder, seed=1, **SHUFFLED)
    assert order(prepared.folder, seed=1, **SHUFFLED) == first
    assert order(prepared.folder, seed=1, batch_size=31, **SHUFFLED) == first
    others = [order(prepared.folder, 1, seed=1, **SHUFFLED), order(prepared.folder, 0, seed=2, **SHUFFLED)]
    assert len({tuple(rows) for rows in (first, *others)}) == 3


def test_unshuffled_rows_come_in_the_order_of_the_files(prepared):
    for epoch, window_rows, batch_size in itertools.product((0, 1), (1, 20, 1000), (1, 10, 100)):
        rows = order(prepared.folder, epoch, window_rows=window_rows, batch_size=batch_size, seed=5)
        assert rows == list(range(83))


def test_batches_may_span_many_windows(prepared):
    loader = BatchLoader(prepared.folder, "train", batch_size=60, shuffle=True, window_rows=1)
    batches = list(loader.epoch(0))
    assert [len(batch.labels_B) for batch in batches] == [60, 23]
    assert numbers(batches) == order(prepared.folder, batch_size=1, shuffle=True, window_rows=1)
    for batch in batches:
        assert rows_of(batch, loader.schema) == [prepared.rows[row] for row in batch.rows_B.tolist()]


def test_shuffling_mixes_row_groups_and_the_rows_of_a_window(tmp_path):
    write_prepared(tmp_path / "p", 4000, SINGLE, group_rows=100)
    one_window = np.array(order(tmp_path / "p", batch_size=500, shuffle=True, window_rows=4000))
    assert abs(np.corrcoef(one_window, np.arange(4000))[0, 1]) < 0.08  # five standard deviations of a random order
    windows = np.array(order(tmp_path / "p", batch_size=400, shuffle=True, window_rows=400)).reshape(10, 400)
    groups = [np.unique(window // 100) for window in windows]
    assert all(len(of_window) == 4 for of_window in groups)
    assert any(np.ptp(of_window) > 3 for of_window in groups)
    assert np.mean(np.diff(windows, axis=1) == 1) < 0.02


def test_iterators_of_one_loader_do_not_disturb_each_other(prepared):
    loader = BatchLoader(prepared.folder, "train", batch_size=5, **SHUFFLED)
    expected = [numbers(loader.epoch(epoch)) for epoch in (0, 1)]
    together = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    assert [numbers(batches) for batches in zip(*together, strict=True)] == expected


def test_only_bags_carry_lengths_and_only_weighted_features_weights(tmp_path):
    multi = (SINGLE[0], SparseColumn("tags", 30, is_multi_valued=True))
    kinds = {}
    for name, sparse in (("single", SINGLE), ("multi", multi), ("weighted", MIXED)):
        prepared = write_prepared(tmp_path / name, 10, sparse)
        (batch,) = BatchLoader(prepared.folder, "train", batch_size=10).epoch(0)
        kinds[name] = (batch.sparse.lengths_FB is not None, batch.sparse.weights is not None)
        assert batch.sparse.batch_size == 10
        assert (batch.sparse.ids.dtype, batch.labels_B.dtype, batch.dense_BN.dtype) == (
            torch.int64,
            torch.float32,
            torch.float32,
        )
    assert kinds == {"single": (False, False), "multi": (True, False), "weighted": (True, True)}


def test_data_without_dense_features(tmp_path):
    prepared = write_prepared(tmp_path / "p", 9, SINGLE, dense=())
    batches = list(BatchLoader(prepared.folder, "train", batch_size=4, world_size=2).epoch(0))
    assert [batch.dense_BN.shape for batch in batches] == [(4, 0), (0, 0)]


def test_the_schema_says_the_order_of_the_features(prepared):
    schema = replace(prepared.schema, dense=prepared.schema.dense[::-1], sparse=MIXED[::-1])
    loader = BatchLoader(prepared.folder, "train", batch_size=83, schema=schema)
    (batch,) = loader.epoch(0)
    assert loader.schema == schema
    assert rows_of(batch, schema) == prepared.rows
    assert batch.dense_BN[:, 1].tolist() == [row["I1"] for row in prepared.rows]
    assert batch.sparse.ids[:83].tolist() == [row["zone"] for row in prepared.rows]


def test_missing_labels_stay_nan(tmp_path):
    prepared = write_prepared(tmp_path / "p", 4, SINGLE)
    path = prepared.folder / "train" / "part-00000.parquet"
    unlabelled = pq.read_table(path).set_column(0, "label", pa.array(np.full(4, np.nan, np.float32)))
    pq.write_table(unlabelled, path)
    replace(prepared.schema, splits={"train": SplitCounts(4, 0, unlabelled=4)}).save(prepared.folder)
    (batch,) = BatchLoader(prepared.folder, "train", batch_size=4).epoch(0)
    assert batch.labels_B.isnan().all()


@pytest.mark.parametrize(("num_rows", "sizes"), [(24, [[4, 4, 4], [4, 4, 4]]), (14, [[4, 4, 4], [0, 1, 1]])])
def test_the_last_step_is_shared_out_evenly_and_pieces_may_be_empty(tmp_path, num_rows, sizes):
    prepared = write_prepared(tmp_path / "p", num_rows)
    steps = pieces_by_step(prepared.folder, batch_size=4, world_size=3, accumulation_steps=1)
    assert [[len(batch.labels_B) for batch in pieces] for pieces in steps] == sizes
    for batch in itertools.chain(*steps):
        count = len(batch.labels_B)
        assert batch.dense_BN.shape == (count, 2)
        assert batch.sparse.lengths_FB.shape == (4, count)
        assert batch.sparse.batch_size == count
        assert batch.sparse.counts_F == batch.sparse.lengths_FB.sum(1).tolist()


def test_drop_last_leaves_out_the_smaller_step(prepared):
    loader = BatchLoader(prepared.folder, "train", batch_size=10, world_size=2, drop_last=True, **SHUFFLED)
    assert len(loader) == 4
    assert [batch.global_rows for batch in loader.epoch(0)] == [20] * 4
    whole = order(prepared.folder, **SHUFFLED)
    assert numbers(loader.epoch(0)) == [row for first in range(0, 80, 20) for row in whole[first : first + 10]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 84, "drop_last": True}, "the split has 83 rows, but a step needs 84, and drop_last"),
        ({"batch_size": 42, "world_size": 2, "drop_last": True}, "Use a smaller batch"),
        ({"batch_size": 0}, "batch_size is 0. Use 1 or more."),
        ({"batch_size": 5, "seed": -1}, "seed is -1. Use 0 or more."),
        ({"batch_size": 5, "world_size": 0}, "world_size is 0. Use 1 or more."),
        ({"batch_size": 5, "accumulation_steps": 0}, "accumulation_steps is 0. Use 1 or more."),
        ({"batch_size": 5, "window_rows": 0}, "window_rows is 0. Use 1 or more."),
        # With accumulation, this rank would take other ranks' pieces, and their rows would come twice.
        ({"batch_size": 5, "rank": 2, "world_size": 2, "accumulation_steps": 2}, "rank is 2, but world_size is 2. Use"),
        ({"batch_size": 5, "rank": -1, "world_size": 2}, "rank is -1, but world_size is 2. Use 0 to 1."),
    ],
)
def test_options_that_give_no_batches_or_wrong_ones_are_refused(prepared, options, message):
    with pytest.raises(ValueError, match=message):
        BatchLoader(prepared.folder, "train", **options)


@pytest.mark.parametrize("first_step", [-1, 18])
def test_a_step_outside_the_epoch_is_refused(prepared, first_step):
    loader = BatchLoader(prepared.folder, "train", batch_size=5)
    assert (len(loader), list(loader.epoch(0, first_step=17))) == (17, [])
    with pytest.raises(ValueError, match=f"first_step is {first_step}, but an epoch of train has 17 steps"):
        loader.epoch(0, first_step=first_step)
    with pytest.raises(ValueError, match=r"epoch is -1\. Use 0 or more"):
        loader.epoch(-1)


def test_batches_move_to_a_device(prepared):
    (batch,) = BatchLoader(prepared.folder, "train", batch_size=83).epoch(0)
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    tensors = (moved.labels_B, moved.dense_BN, moved.sparse.ids, moved.sparse.lengths_FB, moved.sparse.weights)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.rows_B.tolist() == list(range(83))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_reach_the_gpu_unchanged(prepared):
    loader = BatchLoader(prepared.folder, "train", batch_size=40, rank=1, world_size=42, pin_memory=True)
    batches = list(loader.epoch(0))
    batches += BatchLoader(prepared.folder, "train", batch_size=1, rank=0, world_size=84, pin_memory=True).epoch(0)
    assert 0 in [len(batch.labels_B) for batch in batches]
    for batch in batches:
        assert batch.sparse.ids.is_pinned() or not len(batch.sparse.ids)
        moved = batch.to(torch.device("cuda"))
        moved = replace(
            moved, labels_B=moved.labels_B.cpu(), dense_BN=moved.dense_BN.cpu(), sparse=moved.sparse.to("cpu")
        )
        assert rows_of(moved, loader.schema) == [prepared.rows[row] for row in batch.rows_B.tolist()]


WINDOW, BATCH = 20_000, 100
ROW_BYTES = 8 + 4 + 2 * 4 + 2 * 4
POOLS = []
"""They outlive the memory that they counted."""


def peak_in_windows(folder, **options):
    """The most memory that Arrow held at once during an epoch, as a multiple of a window, and the peak of NumPy."""
    loader = BatchLoader(folder, "train", batch_size=BATCH, shuffle=True, window_rows=WINDOW, **options)
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    POOLS.append(pool)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        rows = sum(len(batch.labels_B) for batch in loader.epoch(0))
        return rows, pool.max_memory() / (WINDOW * ROW_BYTES), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(pa.default_memory_pool())


def write_windows(folder, count):
    write_prepared(folder, WINDOW * count, SINGLE, group_rows=1000, groups_per_file=100)
    return folder


def test_memory_is_bounded_whatever_the_size(tmp_path):
    for count in (3, 12):
        folder = write_windows(tmp_path / str(count), count)
        rows, windows, arrays = peak_in_windows(folder)
        assert rows == WINDOW * count
        assert 2 < windows < 3.3, "the rows in use, the next window, and its rows in their order"
        assert arrays < 10 * 8 * WINDOW + (READ_AHEAD_BATCHES + 3) * BATCH * 100 + 150_000
        rows, windows, _ = peak_in_windows(folder, world_size=4, rank=1)
        assert rows == WINDOW * count / 4
        assert 0.6 < windows < 1.2, "the same of a window of one lane of four"
        rows, windows, _ = peak_in_windows(folder, world_size=4, rank=1, lanes=1)
        assert rows == WINDOW * count / 4
        assert 1 < windows < 1.8, "one window, and a quarter of two"


def test_the_count_of_windows_would_see_more(tmp_path, monkeypatch):
    """Negative control."""
    kept, own_rows = [], BatchLoader._own_rows

    def keep(*arguments):
        for window in own_rows(*arguments):
            kept.append(window)
            yield window

    monkeypatch.setattr(BatchLoader, "_own_rows", keep)
    assert peak_in_windows(write_windows(tmp_path, 12))[1] > 12
