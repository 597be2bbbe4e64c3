"""A step whose loss or gradient is not finite ends on all ranks at once, and the part where that began is named."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dhen.data.loading.batches import Batch
from dhen.data.schema import DenseColumn, Schema
from dhen.runtime.topology import Topology
from dhen.training.divergence import KeptMicroStep, where_it_began
from dhen.training.parallel_model import ParallelDhen
from tests.plain import global_batches
from tests.ranks import run_ranks
from tests.tiny_training import train

BROKEN_STEP, RANKS = 2, 4
SCHEMA = Schema(tuple(DenseColumn(name) for name in ("age", "price", "visits")), (), {}, {})
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
SET_UPS: dict[str, dict[str, Any]] = {
    "zero0": {},
    "zero0 autocast": {"others": AUTOCAST},
    "zero1": {},
    "zero1_bf16": {"others": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "zero2_bf16": {"accumulation": 2},
    "zero2_offload": {},
    "zero3": {},
    "zero3_bf16": {"accumulation": 2},
    "zero1 hsdp": {"dhen": {"shard_group": 2}},
    "zero2 hsdp": {"dhen": {"shard_group": 2}},
    "hsdp_bf16": {"dhen": {"shard_group": 2, "all_reduce_dtype": "bf16"}},
}


@dataclass(frozen=True)
class Ended:
    """How a run ended on a rank. changed: whether the broken step changed the dense part."""

    step: int
    changed: bool
    message: str


def ended(topology: Topology, name: str, what: str) -> Ended:
    seen: dict[str, Any] = {}

    def before_step(step: int, model: ParallelDhen) -> None:
        seen.update(step=step, model=model)
        if step == BROKEN_STEP:
            seen["weights"] = local_weights(model)
            if topology.rank == 1:
                break_it(model, what)

    try:
        train(topology, name.split()[0], before_step=before_step, **SET_UPS[name], steps=4)
        message = ""
    except FloatingPointError as error:
        message = str(error)
    return Ended(seen["step"], not torch.equal(seen["weights"], local_weights(seen["model"])), message)


def local_weights(model: ParallelDhen) -> Tensor:
    weights = [getattr(weight, "ds_tensor", weight) for weight in model.engine.module.parameters()]
    # ZeRO stage 3 pads shards with memory that it does not initialize.
    return torch.cat([weight.detach().float().flatten() for weight in weights]).nan_to_num()


def break_it(model: ParallelDhen, what: str) -> None:
    """gradient: of a weight. loss: infinite, with finite gradients."""
    dense = model.engine.module
    if what == "gradient":
        next(dense.model.layers[1].parameters()).register_hook(lambda gradient: gradient * math.inf)
    else:
        dense.head.register_forward_hook(lambda module, inputs, logits: logits + math.inf)


def all_ended(topology: Topology) -> dict[tuple[str, str], Ended]:
    return {(name, what): ended(topology, name, what) for name in SET_UPS for what in ("gradient", "loss")}


def test_an_infinite_gradient_or_loss_of_one_rank_ends_the_step_on_all_and_leaves_the_dense_part():
    for rank, by_case in enumerate(run_ranks(RANKS, all_ended)):
        for case, found in by_case.items():
            assert found == Ended(BROKEN_STEP, False, "the loss or its gradient is not finite"), (rank, case)


def sentences(topology: Topology, name: str) -> tuple[list[str], tuple[bool, bool]]:
    """What is said for each place to break on rank 1, and whether tables are finite before and after."""
    _, model = train(topology, name, steps=1)
    (rows,) = global_batches(1, 6)
    sparse, dense_BN, labels_B = rows.rows(0, 6)
    embeddings_BFD, first = model.look_up(sparse)().detach(), topology.rank * 6
    said = []

    def search(dense_BN: Tensor, embeddings_BFD: Tensor, loss: float) -> None:
        batch = Batch(labels_B, dense_BN, sparse, torch.arange(first, first + 6), 24)
        kept = KeptMicroStep(batch, lambda: embeddings_BFD, torch.tensor(loss if topology.rank == 1 else 0.5))
        said.append(where_it_began(model, kept, SCHEMA))

    is_here = topology.rank == 1
    for value in (1e30, math.nan) if is_here else (0.0, 0.0):
        broken_BN = dense_BN.clone()
        broken_BN[4, 1] = value
        search(broken_BN, embeddings_BFD, math.nan)
    broken_BFD = embeddings_BFD.clone()
    broken_BFD[:, 2] = math.inf if is_here else 0.0
    search(dense_BN, broken_BFD, math.nan)
    search(dense_BN, embeddings_BFD, math.nan)
    search(dense_BN, embeddings_BFD, 0.5)
    if is_here:
        model.engine.module.model.layers[1].register_forward_hook(lambda module, inputs, x_BMD: x_BMD / 0)
    search(dense_BN, embeddings_BFD, math.inf)
    before = model.tables_are_finite()
    if is_here:
        with torch.no_grad():
            next(iter(model.tables.shard_tensors()))[1]["weight"][-1, -1] = math.nan
    return said, (before, model.tables_are_finite())


@pytest.mark.parametrize("name", ["zero0", "zero3"])
def test_all_ranks_name_the_part_that_broke_on_one(name):
    by_rank = run_ranks(2, sentences, name)
    assert by_rank[0] == by_rank[1]
    said, are_finite = by_rank[0]
    assert are_finite == (True, False)
    parts = [
        "the dense input: feature 'price' of row 10 of the training data is 1e+30. Correct",
        "the dense input: feature 'price' of row 10 of the training data is nan. Correct",
        "the embeddings of feature 'C2': an earlier step made its table infinite or NaN. Lower table_learning_rate",
        "the loss, although the logits are finite. Lower",
        "the gradient, although the loss is finite. Lower",
        "layer 1: its output is not finite, although its input is. Lower learning_rate or table_learning_rate, add",
    ]
    for sentence, part in zip(said, parts, strict=True):
        assert sentence.startswith(f"It began in {part}")
