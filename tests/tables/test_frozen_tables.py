"""Frozen tables keep every bit, under each optimizer, dtype, cut and grouping; the other tables train as they would."""

from typing import Any

import pytest
import torch

from dhen.runtime.topology import Topology
from tests.ranks import run_ranks
from tests.tables.test_replicas import make_tables
from tests.tables.test_sharded_tables import CUT, WHOLE, batch_of, columns_of, target_of

FROZEN = ("sums", "means")
OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")
CASES = {
    **{optimizer: (2, optimizer, WHOLE, {}) for optimizer in OPTIMIZERS},
    **{f"{optimizer}, fp16, cut": (2, optimizer, CUT, {"table_dtype": "fp16"}) for optimizer in OPTIMIZERS},
    "groups of one": (1, "adagrad", WHOLE, {}),
    "groups of one that exchange moves": (1, "adagrad", WHOLE, {"sync_steps": 2}),
    "groups of one that exchange moves later": (1, "rowwise_adagrad", WHOLE, {"sync_overlap": True}),
    "fp16 groups that exchange moves": (1, "sgd", WHOLE, {"sync_steps": 2, "table_dtype": "fp16"}),
}
"""Ranks of a table group, optimizer, column cuts, other options."""


def trained(topology: Topology, case: str, frozen: tuple[str, ...], averages: bool = False) -> tuple[dict, dict]:
    """This rank's tables before and after training. Gradients do not depend on the weights."""
    group, optimizer, cuts, options = CASES[case]
    tables = make_tables(topology, group, optimizer, cuts, **options)
    before = columns_of(tables)
    if optimizer == "adam":  # as if a checkpoint had a momentum
        for _, tensors in tables.shard_tensors():
            tensors["exp_avg"].fill_(1.0)
    tables.freeze(frozen)
    if averages:
        tables.start_average()
    torch.manual_seed(topology.rank)
    for step in range(1, 5):
        loss = tables(batch_of("weighted", step, topology.rank, 6)) * target_of(step, topology.rank, 6)
        loss.sum().backward()
        tables.end_step(step, average_decay=0.5)
    tables.synchronize()
    with tables.averaged():
        return before, columns_of(tables)


def train_all(topology: Topology) -> dict[Any, tuple[dict, dict]]:
    found = {(case, frozen): trained(topology, case, frozen) for case in CASES for frozen in (FROZEN, ())}
    return found | {("average", FROZEN): trained(topology, "adagrad", FROZEN, averages=True)}


@pytest.fixture(scope="module")
def by_rank() -> list[dict[Any, tuple[dict, dict]]]:
    return run_ranks(2, train_all)


@pytest.mark.parametrize("case", [*CASES, "average"])
def test_frozen_tables_keep_every_bit(by_rank, case):
    frozen, uses = 0, 0
    for of_rank in by_rank:
        before, after = of_rank[case, FROZEN]
        for (name, first), tensors in after.items():
            is_same = torch.equal(tensors["weight"], before[name, first]["weight"])
            assert is_same == (name in FROZEN), name
            frozen, uses = frozen + is_same, uses + int(tensors["uses"].sum())
    assert frozen
    assert uses, "training looked them up"


@pytest.mark.parametrize("case", CASES)
def test_the_other_tables_train_as_if_none_was_frozen(by_rank, case):
    for of_rank in by_rank:
        (_, after), (_, without) = of_rank[case, FROZEN], of_rank[case, ()]
        for key, tensors in after.items():
            if key[0] not in FROZEN and "fp16" not in case:  # rounded by other random numbers
                assert torch.equal(tensors["weight"], without[key]["weight"])
