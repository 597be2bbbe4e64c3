"""Table groups: the model with replicas of its tables trains like torch alone, under each ZeRO stage and with HSDP."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dhen.runtime.topology import Topology
from dhen.tables.replicas import ReplicaGroup
from dhen.training.parallel_model import ParallelDhen
from dhen.training.saved.checkpoint import TrainerState, start_save
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
TWO_MICRO_STEPS = {"dhen": GROUPS, "accumulation": 2, "max_grad_norm": 0.05}


def end_step(step: int, model: ParallelDhen) -> None:
    if step:
        model.end_step(step)


def train_all(topology: Topology) -> dict[str, list[float]]:
    losses = {name: train(topology, name, before_step=end_step, **options)[0] for name, options in RUNS.items()}
    losses["two micro steps"] = train(topology, "zero2", before_step=end_step, **TWO_MICRO_STEPS)[0]
    every_4_steps = GROUPS | {"table_sync_steps": 4}
    losses["every 4 steps"] = train(topology, "zero0", before_step=end_step, dhen=every_4_steps)[0]
    overlapped = GROUPS | {"table_sync_overlap": True}
    losses["overlapped"] = train(topology, "hsdp", before_step=end_step, dhen=overlapped | {"shard_group": 2})[0]
    return losses


def checkpoint_and_scores(
    topology: Topology, folder: Path, moment: str, sync: dict[str, Any]
) -> list[dict[tuple[str, int], Tensor]]:
    """This rank's tables before and after an evaluation or a save, two steps after an exchange."""
    found = []

    def look(step: int, model: ParallelDhen) -> None:
        end_step(step, model)
        if step == 6:
            found.append(weights(model))
            if moment == "evaluation":
                with model.evaluating():
                    found.append(weights(model))
            else:
                state = TrainerState(step=step)
                start_save(model, folder, state).finish(model.topology)
                found.append(weights(model))

    train(topology, "zero0", dhen=GROUPS | sync, before_step=look, steps=7)
    return found


def weights(model: ParallelDhen) -> dict[tuple[str, int], Tensor]:
    return {(s.name, s.first_column): of["weight"].clone() for s, of in model.tables.shard_tensors()}


@pytest.mark.parametrize("sync", [{"table_sync_steps": 4}, {"table_sync_overlap": True}])
@pytest.mark.parametrize("moment", ["evaluation", "save"])
def test_replicas_are_equal_when_they_are_read(tmp_path, moment, sync):
    ranks = run_ranks(4, checkpoint_and_scores, tmp_path, moment, sync, local_size=2)
    for first, second in ((0, 2), (1, 3)):
        (before, after), (others_before, others_after) = ranks[first], ranks[second]
        assert any(not before[key].equal(others_before[key]) for key in before), "they did not differ"
        assert all(after[key].equal(others_after[key]) for key in after)


def train_without_the_others(topology: Topology) -> list[float]:
    received = ReplicaGroup.received
    ReplicaGroup.received = lambda self: [[parts_R[0]] for parts_R in received(self)]
    return train(topology, "zero0", before_step=end_step, dhen=GROUPS)[0]


@pytest.fixture(scope="module")
def losses() -> dict[str, list[float]]:
    return run_ranks(4, train_all, local_size=2)[0]


@pytest.mark.parametrize("name", RUNS)
def test_losses_equal_plain_torch(losses, name):
    expected, _ = plain_losses(global_batches(STEPS, GLOBAL_BATCH))
    assert difference(losses[name], expected) < 1e-5


def test_losses_of_two_micro_steps_equal_plain_torch(losses):
    expected, _ = plain_losses(global_batches(STEPS, GLOBAL_BATCH), 2, 0.05)
    assert difference(losses["two micro steps"], expected) < 1e-5


@pytest.mark.parametrize("name", ["every 4 steps", "overlapped"])
def test_late_exchanges_change_losses_little(losses, name):
    assert 0 < difference(losses[name], losses["zero0"]) < 0.03


def test_lost_rows_are_caught():
    expected, _ = plain_losses(global_batches(STEPS, GLOBAL_BATCH))
    assert difference(run_ranks(4, train_without_the_others, local_size=2)[0], expected) > 1e-3
