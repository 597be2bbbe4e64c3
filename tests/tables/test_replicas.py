"""Tables in groups: replicas stay equal to the bit, and are what one group over all ranks would be."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dhen.model.features import SparseIds
from dhen.runtime.topology import Topology
from dhen.tables import replicas as replicas_module
from dhen.tables import row_uses
from dhen.tables.placement.costs import StepSetting, read_costs
from dhen.tables.placement.plan import PlacementOptions, place_tables
from dhen.tables.sharded_tables import ShardedTables
from dhen.tables.wire import Wire
from tests.ranks import run_ranks
from tests.tables.test_sharded_tables import (
    CUT,
    DIM,
    LEARNING_RATE,
    SEED,
    STEPS,
    TABLES,
    UPDATES,
    WHOLE,
    Reference,
    batch_of,
    rank_sizes,
    target_of,
)  # fmt: skip

DECAY = 0.8


def make_tables(topology: Topology, group: int, optimizer: str, cuts: dict[str, int], **options: Any) -> ShardedTables:
    groups = None if group == topology.world_size else topology.shard_groups(group)
    placed = PlacementOptions(cuts={table.name: cuts.get(table.name, 1) for table in TABLES})
    placement = place_tables(TABLES, DIM, StepSetting(group, group, 6), read_costs("cpu"), options=placed)
    options = {"update": UPDATES[optimizer], "seed": SEED, "groups": groups} | options
    tables = ShardedTables(TABLES, DIM, placement, topology, **options)
    tables.set_learning_rate(LEARNING_RATE)
    return tables


def in_own_rows(sparse: SparseIds, replica: int, replicas: int) -> SparseIds:
    """Ids that no other replica uses."""
    ids = list(sparse.ids.split(list(sparse.counts_F)))
    ids = [of - of % replicas + replica for of in ids]
    last = [(table.num_embeddings - 1) // replicas * replicas - replicas + replica for table in TABLES]
    ids = [of.clamp(max=most) for of, most in zip(ids, last, strict=True)]
    return SparseIds(torch.cat(ids), sparse.num_features, sparse.lengths_FB, sparse.weights)


def batch(kind: str, step: int, rank: int, world_size: int, group: int, disjoint: bool) -> tuple[SparseIds, Tensor]:
    size = rank_sizes(step, world_size)[rank]
    sparse = batch_of(kind, step, rank, size)
    if disjoint:
        sparse = in_own_rows(sparse, rank // group, world_size // group)
    return sparse, target_of(step, rank, size)


def train(
    topology: Topology,
    group: int,
    optimizer: str,
    kind: str = "bags",
    cuts: dict[str, int] = WHOLE,
    disjoint: bool = False,
    averages: bool = False,
    **options: Any,
) -> tuple[int, dict, int]:
    """This rank's replica, its tensors by table and column after STEPS steps, and the bytes that it sent.

    disjoint: no row is used by two groups of 2 ranks.
    """
    tables = make_tables(topology, group, optimizer, cuts, **options)
    if averages:
        tables.start_average()
    for step in range(STEPS):
        sparse, target = batch(kind, step, topology.rank, topology.world_size, 2, disjoint)
        (tables(sparse) * target).sum().backward()
        tables.end_step(step + 1, DECAY)
    tables.synchronize()
    with tables.averaged() if averages else torch.no_grad():
        tensors = {
            (shard.name, shard.first_column): {kind: tensor.clone() for kind, tensor in of.items()}
            for shard, of in tables.shard_tensors()
        }
    return tables.replica_index, tensors, tables.bytes_to_replicas


def replicas_of(results: list[tuple[int, dict, int]]) -> list[dict]:
    """All shards of each replica."""
    whole = [{} for _ in {replica for replica, _, _ in results}]
    for replica, tensors, _ in results:
        whole[replica] |= tensors
    return whole


def assert_equal_bits(replicas: list[dict]) -> dict:
    first, *others = replicas
    for other in others:
        assert other.keys() == first.keys()
        for key, tensors in first.items():
            for kind, tensor in tensors.items():
                torch.testing.assert_close(other[key][kind], tensor, rtol=0, atol=0, msg=f"{key} {kind}")
    return first


def reference(
    optimizer: str, kind: str, cuts: dict[str, int], disjoint: bool, steps: Sequence[int] = 4 * [STEPS]
) -> dict:
    """All tables after so many steps of each rank."""
    expected, world_size = Reference(cuts), len(steps)
    for step in range(max(steps)):
        batches = [batch(kind, step, rank, world_size, 2, disjoint) for rank in range(world_size) if step < steps[rank]]
        losses = [(expected.look_up(sparse) * target).sum() / world_size for sparse, target in batches if len(target)]
        if losses:
            sum(losses).backward()
            expected.update(optimizer)
    return {table.name: weight.detach() for table, weight in zip(TABLES, expected.weights, strict=True)}


def joined(replica: dict, kind: str = "weight") -> dict[str, Tensor]:
    return {t.name: torch.cat([replica[key][kind] for key in sorted(replica) if key[0] == t.name], -1) for t in TABLES}


@pytest.mark.parametrize(
    ("group", "optimizer", "kind", "cuts", "disjoint", "sync"),
    [
        (2, "sgd", "single", WHOLE, False, {}),
        (1, "adam", "bags", WHOLE, False, {}),
        (2, "adagrad", "bags", CUT, False, {}),
        (2, "rowwise_adagrad", "weighted", CUT, False, {}),
        (2, "sgd", "bags", CUT, False, {"sync_steps": 3}),  # the loss is linear, so late moves change no gradient
        (1, "sgd", "single", WHOLE, False, {"sync_steps": 2}),
        (2, "sgd", "bags", CUT, False, {"sync_overlap": True}),
        (2, "adagrad", "bags", CUT, True, {"sync_steps": 2}),
        (2, "rowwise_adagrad", "weighted", CUT, True, {"sync_steps": 3}),
        (2, "rowwise_adagrad", "weighted", CUT, True, {"sync_steps": 2, "sync_overlap": True}),
    ],
)
def test_replicas_are_one_group_over_all_ranks(group, optimizer, kind, cuts, disjoint, sync):
    results = run_ranks(4, partial(train, **sync), group, optimizer, kind, cuts, disjoint)
    replica = assert_equal_bits(replicas_of(results))
    expected = reference(optimizer, kind, cuts, disjoint)
    for name, weight in joined(replica).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    (one_group,) = replicas_of(run_ranks(4, train, 4, optimizer, kind, cuts, disjoint))
    assert all(one_group[key]["uses"].equal(replica[key]["uses"]) for key in one_group)


def weights_by_step(topology: Topology, **sync: Any) -> list[dict[str, Tensor]]:
    """The tables of a replica of one rank after each step."""
    tables, after = make_tables(topology, 1, "sgd", WHOLE, **sync), []
    for step in range(STEPS):
        sparse, target = batch("bags", step, topology.rank, topology.world_size, 1, disjoint=False)
        (tables(sparse) * target).sum().backward()
        tables.end_step(step + 1, DECAY)
        after.append({shard.name: of["weight"].clone() for shard, of in tables.shard_tensors()})
    return after


@pytest.mark.parametrize(("sync_steps", "sync_overlap"), [(3, False), (1, True), (2, True)])
def test_moves_arrive_when_they_should(sync_steps, sync_overlap):
    replicas = run_ranks(2, partial(weights_by_step, sync_steps=sync_steps, sync_overlap=sync_overlap))
    for step, (replica, by_step) in itertools.product(range(1, STEPS + 1), enumerate(replicas)):
        of_others = (step - sync_overlap) // sync_steps * sync_steps
        steps = [step if rank == replica else of_others for rank in range(2)]
        for name, weight in reference("sgd", "bags", WHOLE, False, steps).items():
            torch.testing.assert_close(by_step[step - 1][name], weight, rtol=1e-6, atol=1e-6, msg=f"{step} {name}")


@pytest.mark.parametrize(("sync", "tolerance"), [({}, 1e-6), ({"sync_steps": 2}, 0.1), ({"sync_overlap": True}, 0.1)])
def test_the_average_is_that_of_one_group(sync, tolerance):
    options = {"averages": True, **sync}
    grouped = assert_equal_bits(replicas_of(run_ranks(4, partial(train, **options), 2, "sgd")))
    (one_group,) = replicas_of(run_ranks(4, partial(train, averages=True), 4, "sgd"))
    for name, average in joined(grouped).items():
        torch.testing.assert_close(average, joined(one_group)[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("dtype", "wire", "sync"),
    [
        ("fp16", "fp32", {}),
        ("fp16", "int8", {"sync_steps": 2}),
        ("fp32", "bf16", {"sync_steps": 2}),
        ("fp16", "int8", {"sync_overlap": True}),
    ],
)
def test_replicas_are_equal_to_the_bit_whatever_is_lost(dtype, wire, sync):
    lossy = partial(train, sync_wire=Wire(wire), table_dtype=dtype, **sync)
    replica = assert_equal_bits(replicas_of(run_ranks(4, lossy, 2, "rowwise_adagrad")))
    exact_train = partial(train, **sync)
    exact = assert_equal_bits(replicas_of(run_ranks(4, exact_train, 2, "rowwise_adagrad")))
    for name, weight in joined(replica).items():
        difference = (weight.float() - joined(exact)[name]).norm() / joined(exact)[name].norm()
        assert 0 < difference < 0.02, name


@pytest.mark.parametrize(("sync_steps", "bytes_beside"), [(1, 4 + 4), (2, 4 + 4 + 4)])
def test_messages_have_the_rows_that_were_used(sync_steps, bytes_beside):
    """Row number, uses, and with moves the state; and one value per column."""
    results = run_ranks(4, partial(train, sync_steps=sync_steps), 2, "rowwise_adagrad", "single", CUT)
    expected = [0, 0]
    for first in range(0, STEPS, sync_steps):
        used = [{table.name: set() for table in TABLES} for _ in range(2)]
        for step, rank in itertools.product(range(first, first + sync_steps), range(4)):
            sparse, _ = batch("single", step, rank, 4, 2, disjoint=False)
            for table, ids in zip(TABLES, sparse.ids.view(len(TABLES), -1), strict=True):
                used[rank // 2][table.name] |= set(ids.tolist())
        for rank in range(2):
            row_bytes = [(name, bytes_beside + 4 * (4 if name in CUT else 8)) for name, _ in results[rank][1]]
            expected[rank] += max(sum(size * len(of[name]) for name, size in row_bytes) for of in used)
    assert [sent for _, _, sent in results[:2]] == expected


def train_with_seed(topology: Topology, seed: int, rounding: str) -> tuple[int, dict, int]:
    torch.manual_seed(seed)
    options = {"table_dtype": "fp16", "table_rounding": rounding, "sync_steps": 2}
    return train(topology, 1, "rowwise_adagrad", **options)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_moves_are_rounded_as_asked(rounding):
    first, second = (assert_equal_bits(replicas_of(run_ranks(2, train_with_seed, seed, rounding))) for seed in (1, 2))
    is_same = all(first[key]["weight"].equal(second[key]["weight"]) for key in first)
    assert is_same == (rounding == "nearest"), "only stochastic rounding draws numbers"


def train_without_ids(topology: Topology, sync: dict[str, Any]) -> Tensor:
    """The weights after a step in which all bags are empty, less those before."""
    tables = make_tables(topology, 1, "sgd", WHOLE, **sync)
    before = [of["weight"].clone() for _, of in tables.shard_tensors()]
    lengths_FB = torch.zeros(len(TABLES), 3, dtype=torch.int64)
    for step in range(2):
        tables(SparseIds(torch.empty(0, dtype=torch.int64), len(TABLES), lengths_FB)).sum().backward()
        tables.end_step(step + 1, DECAY)
    after = [of["weight"] for _, of in tables.shard_tensors()]
    return torch.stack([(new - old).abs().max() for new, old in zip(after, before, strict=True)]).max()


@pytest.mark.parametrize("sync", [{}, {"sync_steps": 2}, {"sync_overlap": True}])
def test_steps_without_ids_change_nothing(sync):
    assert run_ranks(2, train_without_ids, sync) == [0, 0]


def train_with_small_counts(topology: Topology, overlap: bool) -> tuple[int, dict, int]:
    row_uses.MOST_USES = replicas_module.MOST_USES = 8
    return train(topology, 1, "sgd", sync_overlap=overlap)


@pytest.mark.parametrize("overlap", [False, True])
def test_counts_that_are_too_large_are_halved_on_all_replicas(overlap):
    replica = assert_equal_bits(replicas_of(run_ranks(2, train_with_small_counts, overlap)))
    assert max(int(of["uses"].max()) for of in replica.values()) <= 8
