"""The same on a GPU: lookups, updates, a table behind a cache, rounding, parity. For a machine with one.

python -m pytest -m gpu; there the other tests want DS_ACCELERATOR=cpu.
"""

import functools

import pytest
import torch

from dhen.runtime.topology import Topology
from dhen.tables import sharded_tables
from tests.plain import global_batches, plain_losses
from tests.ranks import run_ranks
from tests.tables.test_sharded_tables import (
    CASES,
    assert_equal_to_formula,
    batch_of,
    columns_of,
    load_and_read,
    make_tables,
    save_after_training,
    target_of,
    train_all,
)
from tests.tables.test_stochastic_rounding import assert_moved_by_the_sum, small_steps
from tests.tiny_training import GLOBAL_BATCH, STEPS, difference, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and fbgemm-gpu's CUDA build"),
]
TOLERANCE = {"zero0": 1e-3, "zero2": 1e-3, "zero3": 1e-3, "zero2_bf16": 0.05}
"""TF32 and other orders of summing; bf16 keeps 8 bits."""
CACHED = [case for case in CASES if case[1] != "adam with l2"]  # which updates all rows, and refuses a cache


def behind_a_cache(topology: Topology, function, *args):
    """As if no shard fitted into the device's memory."""
    sharded_tables.beyond_device = lambda shards, _: frozenset(range(len(shards)))
    return function(topology, *args)


@functools.cache
def trained(where: str):
    arguments = (train_all,) if where == "device" else (behind_a_cache, train_all, CACHED)
    return run_ranks(1, *arguments, on_gpu=True)


@pytest.mark.parametrize(
    ("where", "case"), [*(("device", case) for case in CASES), *(("host, cached", case) for case in CACHED)], ids=str
)
def test_lookups_and_updates_equal_the_formula(where, case):
    assert_equal_to_formula(1, case, [of_rank[case] for of_rank in trained(where)])


def test_tables_behind_a_cache_are_saved_and_loaded_as_trained(tmp_path):
    run_ranks(1, behind_a_cache, save_after_training, tmp_path, "adagrad", on_gpu=True)
    (ours,) = run_ranks(1, behind_a_cache, load_and_read, tmp_path, "adagrad", on_gpu=True)
    (theirs,) = run_ranks(1, load_and_read, tmp_path, "adagrad", on_gpu=True)
    for key, tensors in theirs.items():
        for kind, tensor in tensors.items():
            assert torch.equal(ours[key][kind], tensor), (key, kind)


def decay_between_steps(topology: Topology) -> dict:
    tables = make_tables(topology, "sgd")
    for step in range(2):
        sparse = batch_of("bags", step, topology.rank, 6).to(topology.device)
        (tables(sparse) * target_of(step, topology.rank, 6).to(topology.device)).sum().backward()
        tables._decay_whole_tables(0.9, 0.9)
    return columns_of(tables)


def test_a_decay_reaches_what_the_cache_holds():
    (ours,) = run_ranks(1, behind_a_cache, decay_between_steps, on_gpu=True)
    (theirs,) = run_ranks(1, decay_between_steps, on_gpu=True)
    for key, tensors in theirs.items():
        torch.testing.assert_close(ours[key]["weight"], tensors["weight"], atol=1e-6, rtol=1e-6)


def test_fbgemm_rounds_stochastically():
    assert_moved_by_the_sum(*run_ranks(1, small_steps, on_gpu=True))


def train_each(topology: Topology) -> dict[str, list[float]]:
    return {name: train(topology, name)[0] for name in TOLERANCE}


@functools.cache
def losses_by_name():
    return run_ranks(1, train_each, on_gpu=True)[0]


@pytest.mark.parametrize("name", TOLERANCE)
def test_losses_equal_plain_torch(name):
    expected, _ = plain_losses(global_batches(STEPS, GLOBAL_BATCH))
    assert difference(losses_by_name()[name], expected) < TOLERANCE[name]
