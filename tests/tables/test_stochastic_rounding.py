"""FP16 tables: small steps are kept on average, each rounding goes to a neighbour, and updates are the optimizers'."""

import math

import pytest
import torch
from torch import Tensor

from dhen.model.features import SparseIds, init_table
from dhen.model.sparse_feature import SparseFeature
from dhen.runtime.topology import Topology
from dhen.tables.placement.plan import Placement, TableShard
from dhen.tables.sharded_tables import ShardedTables
from dhen.tables.stochastic_rounding import round_stochastically
from dhen.tables.updated_tables import TableUpdate
from tests.ranks import run_ranks

ROWS, DIM = 64, 8


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The float16 numbers below and above x, as float64."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).double()
    every = every[every.isfinite()].unique()
    below = torch.searchsorted(every, x.double(), right=True) - 1
    exact = every[below] == x.double()
    return every[below], torch.where(exact, every[below], every[(below + 1).clamp(max=len(every) - 1)])


def test_every_number_goes_to_a_neighbour():
    generator = torch.Generator().manual_seed(0)
    exponents = torch.empty(20_000).uniform_(-30, 15.9, generator=generator)
    x = torch.randn(20_000, generator=generator).sign() * torch.exp2(exponents)
    x = torch.cat([x, torch.tensor([0.0, 1.0, 65504.0, -65504.0, 2.0**-24, 2.0**-25, 2.0**-14])]).clamp(-65504, 65504)
    below, above = neighbours(x)
    rounded = round_stochastically(x).double()
    assert ((rounded == below) | (rounded == above)).all()
    assert torch.equal(round_stochastically(x.half().float()), x.half()), "what float16 holds stays"
    assert round_stochastically(torch.tensor([1e9, -1e9])).tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("value", [1.0001, -3.3333, 0.1, 2.7e-6, 6.1e-5, 4321.7, -1e-8])
def test_the_mean_is_the_number_itself(value):
    count = 200_000
    rounded = round_stochastically(torch.full((count,), value)).double()
    below, above = (edge.item() for edge in neighbours(torch.tensor(value)))
    exact = torch.tensor(value).double().item()
    share = (exact - below) / (above - below)
    error = (above - below) * math.sqrt(share * (1 - share) / count)
    assert abs(rounded.mean().item() - exact) < 4 * error


def make_tables(topology: Topology, rounding: str, optimizer: str = "sgd", l2: float = 0.0) -> ShardedTables:
    shard = TableShard(0, "table", ROWS, 0, DIM, 0)
    table = SparseFeature("table", ROWS)
    return ShardedTables(
        (table,),
        DIM,
        Placement((shard,), 1),
        topology,
        update=TableUpdate(optimizer, l2=l2),
        table_dtype="fp16",
        table_rounding=rounding,
    )


def small_steps(topology: Topology) -> dict[str, Tensor]:
    """2,000 steps of 1e-4 down from 1.0 on each of the 512 weights."""
    ends = {}
    for rounding in ("stochastic", "nearest"):
        torch.manual_seed(0)
        tables = make_tables(topology, rounding)
        ((_, tensors),) = tables.shard_tensors()
        assert tensors["weight"].dtype == torch.float16
        tensors["weight"].fill_(1.0)
        tables.set_learning_rate(1e-4)
        sparse = SparseIds(torch.arange(ROWS, device=topology.device), 1)
        for _ in range(2000):
            tables(sparse).sum().backward()
        ends[rounding] = tables.shard_tensors()[0][1]["weight"].cpu().clone()
    return ends


def test_two_thousand_small_steps_move_the_mean_by_their_sum():
    assert_moved_by_the_sum(*run_ranks(1, small_steps))


def assert_moved_by_the_sum(ends: dict[str, Tensor]):
    assert (ends["nearest"] == 1.0).all(), "rounded to nearest, each of the steps is lost"
    moved = 1.0 - ends["stochastic"].double()
    # Between 0.5 and 1 float16's numbers are 2^-11 apart: a step's variance is p (1 - p) 2^-22 with p = 1e-4 2^11.
    share = 1e-4 * 2**11
    deviation = math.sqrt(2000 * share * (1 - share)) * 2**-11
    standard_error = deviation / math.sqrt(moved.numel())
    assert abs(moved.mean().item() - 0.2) < 3 * standard_error
    assert moved.std().item() == pytest.approx(deviation, rel=0.15)


def updates(topology: Topology, optimizer: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Three steps with bags, weights and rows that stand in several bags; the table before, after, and its state."""
    tables = make_tables(topology, "stochastic", optimizer)
    ((_, tensors),) = tables.shard_tensors()
    before = tensors["weight"].clone()
    tables.set_learning_rate(0.1)
    for step in range(3):
        tables(bags(step)).mul(targets(step)).sum().backward()
    return before, tensors["weight"].clone(), {kind: tensor.clone() for kind, tensor in tensors.items()}


def bags(step: int) -> SparseIds:
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(0, 4, (1, 20), generator=generator)
    count = int(lengths.sum())
    return SparseIds(
        torch.randint(0, ROWS // 4, (count,), generator=generator), 1, lengths, torch.rand(count, generator=generator)
    )


def targets(step: int) -> Tensor:
    return torch.randn(20, 1, DIM, generator=torch.Generator().manual_seed(50 + step))


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_updates_are_the_optimizers_within_one_rounding_a_step(optimizer):
    ((before, after, tensors),) = run_ranks(1, updates, optimizer)
    assert torch.equal(before, init_table("table", ROWS, DIM, range(DIM), 0).half())
    weight, total = before.double(), torch.zeros(ROWS, DIM, dtype=torch.float64)
    mean = torch.zeros_like(total)
    touched = torch.zeros(ROWS, dtype=torch.bool)
    for step in range(3):
        sparse, grad = bags(step), torch.zeros(ROWS, DIM, dtype=torch.float64)
        bag_of_id = torch.arange(20).repeat_interleave(sparse.lengths_FB[0])
        for position, row in enumerate(sparse.ids.tolist()):
            grad[row] += sparse.weights[position].double() * targets(step)[bag_of_id[position], 0].double()
            touched[row] = True
        if optimizer == "sgd":
            weight -= 0.1 * grad
        elif optimizer == "adam":
            rows = grad.abs().sum(1) > 0
            mean[rows] = 0.9 * mean[rows] + 0.1 * grad[rows]
            total[rows] = 0.999 * total[rows] + 0.001 * grad[rows].square()
            scale = (total[rows] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            weight[rows] -= 0.1 * mean[rows] / (1 - 0.9 ** (step + 1)) / scale
        else:
            total += grad.square() if optimizer == "adagrad" else grad.square().mean(1, keepdim=True)
            weight -= 0.1 * grad / (total.sqrt() + 1e-8)
    # One unit in the last place for each of three steps, of weights below 1.
    assert (after.double() - weight).abs().max() < 3 * 2**-11
    assert torch.equal(after[~touched], before[~touched])
    assert (after[touched] != before[touched]).any()
    if "adagrad" in optimizer:
        expected = total if optimizer == "adagrad" else total[:, 0]
        torch.testing.assert_close(tensors["sum"].double(), expected, rtol=1e-5, atol=1e-6)


def whole_decay(topology: Topology) -> Tensor:
    tables = make_tables(topology, "nearest", l2=1e-2)
    ((_, tensors),) = tables.shard_tensors()
    tensors["weight"].fill_(1.0)
    for _ in range(200):
        tables.set_learning_rate(1e-2)
        tables.end_step(1, average_decay=0.0)
    return tensors["weight"].clone()


def test_an_l2_on_whole_tables_is_not_lost():
    (weight,) = run_ranks(1, whole_decay)
    assert weight.double().mean().item() == pytest.approx(math.exp(-0.02), abs=1e-3)
