"""Table groups: the model with replicas of its tables trains like torch alone, under each ZeRO stage and with HSDP."""

import pytest

from dhen.runtime.topology import Topology
from dhen.tables.replicas import ReplicaGroup
from dhen.training.parallel_model import ParallelDhen
from tests.plain import global_batches, plain_losses
from tests.ranks import run_ranks
from tests.tiny_training import GLOBAL_BATCH, STEPS, difference, train

GROUPS = {"table_group": 2}
RUNS = {
    "zero0": {"dhen": GROUPS},
    "zero1": {"dhen": GROUPS},
    "zero2": {"dhen": {"table_group": "node"}},
    "zero3": {"dhen": GROUPS | {"overlap_tables": False}},
    "hsdp": {"dhen": GROUPS | {"shard_group": 2}},
}


def end_step(step: int, model: ParallelDhen) -> None:
    if step:
        model.end_step(step)


def train_all(topology: Topology) -> dict[str, list[float]]:
    losses = {name: train(topology, name, before_step=end_step, **options)[0] for name, options in RUNS.items()}
    every_4_steps = GROUPS | {"table_sync_steps": 4}
    losses["every 4 steps"] = train(topology, "zero0", before_step=end_step, dhen=every_4_steps)[0]
    return losses


def train_without_the_others(topology: Topology) -> list[float]:
    all_gather = ReplicaGroup.all_gather
    ReplicaGroup.all_gather = lambda self, *own: [[parts_R[0]] for parts_R in all_gather(self, *own)]
    return train(topology, "zero0", before_step=end_step, dhen=GROUPS)[0]


@pytest.fixture(scope="module")
def losses() -> dict[str, list[float]]:
    return run_ranks(4, train_all, local_size=2)[0]


@pytest.mark.parametrize("name", RUNS)
def test_losses_equal_plain_torch(losses, name):
    expected, _ = plain_losses(global_batches(STEPS, GLOBAL_BATCH))
    assert difference(losses[name], expected) < 1e-5


def test_late_exchanges_change_losses_little(losses):
    assert 0 < difference(losses["every 4 steps"], losses["zero0"]) < 0.02


def test_lost_rows_are_caught():
    expected, _ = plain_losses(global_batches(STEPS, GLOBAL_BATCH))
    assert difference(run_ranks(4, train_without_the_others, local_size=2)[0], expected) > 1e-3
