"""HSDP trains like ZeRO-3 over the world and like plain torch, whatever it is combined with; replicas stay bit-equal.

Guards the private names of DeepSpeed 0.19.8 that dhen/parallel/hsdp.py relies on: every row runs through them.
"""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from dhen.parallel import hsdp
from dhen.parallel.hsdp import ReplicaReduction, saturate
from dhen.parallel.parallelize import ParallelDhen
from dhen.parallel.topology import Topology, shard_size
from tests.parallel.plain import global_batches, plain_losses
from tests.parallel.training import STEPS, difference, train
from tests.ranks import run_ranks

GLOBAL_BATCH = 48
TOLERANCE = 1e-5
SHAPES = [(2, 2), (3, 2), (2, 3), (1, 4)]
"""Nodes and ranks on each."""
SMALL_BUCKETS = {"reduce_bucket_size": 500}
"""So that a backward has several all-reduces under way, and some weights are larger than a bucket."""
MICRO = {"accumulation": 2, "max_grad_norm": 0.05}


def freeze_a_layer(model: nn.Module) -> None:
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)


COMBINATIONS: dict[str, dict[str, Any]] = {
    "zero3": {},
    "zero3 small buckets": {"zero": SMALL_BUCKETS},
    "zero3 overlap_comm": {"zero": SMALL_BUCKETS | {"overlap_comm": True}},
    "zero3 no overlap_comm": {"zero": SMALL_BUCKETS | {"overlap_comm": False}},
    "zero3 clipped, 2 micro steps": MICRO | {"zero": SMALL_BUCKETS},
    "zero3 SGD": {"accumulation": 2, "optimizer": "SGD"},
    "zero3 checkpointed": {"dhen": {"activation_checkpointing": "all"}},
    "zero3 gathered parameters small": {"zero": {"stage3_param_persistence_threshold": 0}},
    "zero3_offload": {"zero": SMALL_BUCKETS},
    "zero3_offload clipped, 2 micro steps": MICRO | {"zero": SMALL_BUCKETS},
    "zero2": {"zero": SMALL_BUCKETS},
    "zero2 overlap_comm": {"zero": SMALL_BUCKETS | {"overlap_comm": True}},
    "zero2 clipped, 2 micro steps": MICRO | {"zero": SMALL_BUCKETS},
    "zero2 SGD": {"optimizer": "SGD"},
    "zero2_offload": {"zero": SMALL_BUCKETS},
    "zero2_offload clipped, 2 micro steps": MICRO | {"zero": SMALL_BUCKETS},
    "zero1": {"zero": SMALL_BUCKETS},
    "zero1 clipped, 2 micro steps": MICRO | {"zero": SMALL_BUCKETS},
    "zero1 SGD": {"accumulation": 2, "optimizer": "SGD"},
}
"""What is trained in fp32: ds_config and what is done to it."""
ROUNDED = {
    "zero3_bf16": 0.05,
    "zero3_offload_bf16": 0.05,
    "zero2_bf16": 0.05,
    "zero2_bf16 clipped, 2 micro steps": 0.1,  # ZeRO's own over the world is 0.08
    "zero0_bf16 as zero3": 0.05,
    "zero3 bf16 across nodes": 0.02,
    "zero3 fp16 across nodes": 0.005,
    "zero2 bf16 across nodes": 0.02,
    "paper": 0.05,
}
"""What is rounded somewhere, and the relative difference of a loss that is allowed."""
ROUNDED_CHANGES: dict[str, dict[str, Any]] = {
    "zero2_bf16 clipped, 2 micro steps": MICRO | {"zero": SMALL_BUCKETS},
    "zero0_bf16 as zero3": {"zero": {"stage": 3}},  # torch autocast
    "zero3 bf16 across nodes": {"dhen": {"all_reduce_dtype": "bf16"}},
    "zero3 fp16 across nodes": {"dhen": {"all_reduce_dtype": "fp16"}},
    "zero2 bf16 across nodes": {"dhen": {"all_reduce_dtype": "bf16"}},
}


@dataclass(frozen=True)
class Trained:
    """What a rank ends with. shard: a hash of the fp32 weights that it holds."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    shard: str


def train_hsdp(topology: Topology, name: str, changes: dict[str, Any], shard_group: str | int) -> Trained:
    changes = changes | {"dhen": {"shard_group": shard_group} | changes.get("dhen", {})}
    losses, model = train(topology, name.split()[0], global_batch=GLOBAL_BATCH, **changes)
    return Trained(losses, model.dense_state_dict(), hash_of_shard(model))


def hash_of_shard(model: ParallelDhen) -> str:
    optimizer = model.engine.optimizer
    flat = getattr(optimizer, "fp32_partitioned_groups_flat", None) or optimizer.single_partition_of_fp32_groups
    return hashlib.sha256(b"".join(tensor.detach().float().numpy().tobytes() for tensor in flat)).hexdigest()


def train_all(topology: Topology, combinations: dict[str, dict[str, Any]]) -> dict[str, Trained]:
    return {name: train_hsdp(topology, name, changes, "node") for name, changes in combinations.items()}


@functools.cache
def trained(nodes: int, local_size: int) -> list[dict[str, Trained]]:
    """By rank: every combination on 2x2, and those that show the cut on the other shapes."""
    names = list(COMBINATIONS) if (nodes, local_size) == (2, 2) else ["zero3 clipped, 2 micro steps", "zero2", "zero1"]
    combinations = {name: COMBINATIONS[name] for name in names}
    if (nodes, local_size) == (2, 2):
        combinations |= {name: ROUNDED_CHANGES.get(name, {}) for name in ROUNDED}
    return run_ranks(nodes * local_size, train_all, combinations, local_size=local_size)


@functools.cache
def reference(accumulation: int = 1, max_grad_norm: float = 0.0, optimizer: str = "AdamW") -> tuple[list[float], dict]:
    return plain_losses(global_batches(STEPS, GLOBAL_BATCH), accumulation, max_grad_norm, optimizer)


def reference_of(changes: dict[str, Any]) -> tuple[list[float], dict]:
    return reference(**{key: changes[key] for key in ("accumulation", "max_grad_norm", "optimizer") if key in changes})


@pytest.mark.parametrize("name", COMBINATIONS)
def test_losses_and_weights_equal_plain_torch(name):
    ours = trained(2, 2)[0][name]
    losses, weights = reference_of(COMBINATIONS[name])
    assert difference(ours.losses, losses) < TOLERANCE
    assert set(ours.weights) == {key for key in weights if not key.startswith("tables.")}
    for key, tensor in ours.weights.items():
        torch.testing.assert_close(tensor, weights[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("name", ["zero3 clipped, 2 micro steps", "zero2", "zero1"])
def test_any_number_of_nodes_and_ranks_equals_plain_torch(shape, name):
    losses, _ = reference_of(COMBINATIONS[name])
    assert difference(trained(*shape)[0][name].losses, losses) < TOLERANCE


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_training_stays_near_plain_torch(name):
    losses, _ = reference_of(ROUNDED_CHANGES.get(name, {}))
    assert difference(trained(2, 2)[0][name].losses, losses) < ROUNDED[name]


@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_replicas_stay_bit_equal(shape):
    nodes, local_size = shape
    by_rank = trained(*shape)
    for name in by_rank[0]:
        shards = [[by_rank[node * local_size + i][name].shard for node in range(nodes)] for i in range(local_size)]
        assert all(len(set(of_replicas)) == 1 for of_replicas in shards), name
        assert len({of_replicas[0] for of_replicas in shards}) == local_size, "all hold the same: nothing is sharded"


def test_half_a_node_and_two_nodes_may_be_a_shard_group():
    changes = COMBINATIONS["zero3 clipped, 2 micro steps"]
    losses, _ = reference_of(changes)
    half = run_ranks(4, train_hsdp, "zero3", changes, 2)
    two_nodes = run_ranks(4, train_hsdp, "zero3", changes, 2, local_size=1)
    assert max(difference(rank.losses, losses) for rank in half + two_nodes) < TOLERANCE


def test_a_frozen_layer_stays_as_it_is():
    by_rank = run_ranks(4, train_frozen, "node", local_size=2), run_ranks(4, train_frozen, "world", local_size=2)
    (ours, start), (theirs, _) = by_rank[0][0], by_rank[1][0]
    assert difference(ours.losses, theirs.losses) < TOLERANCE
    frozen = [key for key in start if key.startswith("model.layers.0.")]
    assert frozen
    for key in frozen:
        assert torch.equal(ours.weights[key], start[key])
    trained_key = "model.layers.1.interactions.0.mix.weight"
    assert not torch.equal(ours.weights[trained_key], start[trained_key])


def train_frozen(topology: Topology, shard_group: str) -> tuple[Trained, dict[str, torch.Tensor]]:
    from dhen.parallel import parallelize

    build = parallelize._dense_part

    def frozen(*arguments):
        model = build(*arguments)
        freeze_a_layer(model)
        return model

    parallelize._dense_part = frozen
    start = train_nothing(topology, shard_group)
    return train_hsdp(topology, "zero3", {}, shard_group), start


def train_nothing(topology: Topology, shard_group: str) -> dict[str, torch.Tensor]:
    """The weights that training starts from."""
    from tests.parallel import training

    steps, training.STEPS = training.STEPS, 0
    _, model = train(topology, "zero3", global_batch=GLOBAL_BATCH, dhen={"shard_group": shard_group})
    training.STEPS = steps
    return model.dense_state_dict()


# What is communicated, and when.


def count_messages(topology: Topology, accumulation: int) -> int:
    """All-reduces across nodes in STEPS updates."""
    messages = []
    start = ReplicaReduction.start

    def counted(self, shards, put_away):
        messages.append(len(shards))
        start(self, shards, put_away)

    ReplicaReduction.start = counted
    train(topology, "zero3", accumulation, global_batch=GLOBAL_BATCH, dhen={"shard_group": "node"}, zero=SMALL_BUCKETS)
    ReplicaReduction.start = start
    return len(messages)


def test_only_the_last_micro_step_crosses_nodes_bucket_by_bucket():
    (once, *_), (thrice, *_) = (run_ranks(4, count_messages, k, local_size=2) for k in (1, 3))
    assert once == thrice
    assert once > 2 * STEPS, "one bucket a step shows nothing"
    assert once % STEPS == 0


# Negative controls: each fault is seen in the losses.


class LazyWork:
    """An all-reduce that happens when it is waited for: as late as an asynchronous one may."""

    def __init__(self, tensor: torch.Tensor, group: Any) -> None:
        self.tensor, self.group = tensor, group

    def wait(self) -> None:
        if self.tensor is not None:
            torch.distributed.all_reduce(self.tensor, group=self.group)
            self.tensor = None


class LazyDist:
    """torch.distributed, with asynchronous all-reduces as late as can be."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)

    def all_reduce(self, tensor: torch.Tensor, group: Any, async_op: bool) -> LazyWork:
        return LazyWork(tensor, group)


def with_the_latest_all_reduce(topology: Topology) -> list[float]:
    hsdp.dist = LazyDist()
    return train_hsdp(topology, "zero3", {"zero": SMALL_BUCKETS}, "node").losses


def without_the_all_reduce(topology: Topology) -> list[float]:
    LazyWork.wait = lambda self: None
    return with_the_latest_all_reduce(topology)


def without_the_wait(topology: Topology) -> list[float]:
    """Shards are put away as they were started; the all-reduce comes after."""
    finish = ReplicaReduction.finish

    def too_early(self):
        for pending in self._pending:
            parts = pending.on_wire.split([shard.numel() for shard in pending.like])
            pending.put_away([p.clone().view(like.shape) for p, like in zip(parts, pending.like, strict=True)])
        self._pending = [
            hsdp._Pending(pending.on_wire, pending.like, pending.handle, lambda averages: None)
            for pending in self._pending
        ]
        finish(self)

    ReplicaReduction.finish = too_early
    return with_the_latest_all_reduce(topology)


def clipping_by_the_norm_of_the_shard(topology: Topology) -> list[float]:
    """As if the sum of squares weren't summed over the shard group."""
    right = deepspeed.comm.all_reduce

    def wrong(tensor, *arguments, **options):
        return None if tensor.numel() == 1 else right(tensor, *arguments, **options)

    deepspeed.comm.all_reduce = wrong
    return train_hsdp(topology, "zero3", MICRO, "node").losses


def test_an_all_reduce_that_comes_as_late_as_can_be_is_waited_for():
    assert difference(run_ranks(4, with_the_latest_all_reduce, local_size=2)[0], reference()[0]) < TOLERANCE


@pytest.mark.parametrize("fault", [without_the_all_reduce, without_the_wait])
def test_a_broken_reduction_is_caught(fault):
    assert difference(run_ranks(4, fault, local_size=2)[0], reference()[0]) > 100 * TOLERANCE


def test_clipping_by_the_norm_of_the_shard_is_caught():
    losses, _ = reference_of(MICRO)
    assert difference(run_ranks(4, clipping_by_the_norm_of_the_shard, local_size=2)[0], losses) > 10 * TOLERANCE


# Which ranks are a shard group.


@pytest.mark.parametrize(
    ("shard_group", "nodes", "size"),
    [("node", [4, 4], 4), ("node", [3, 3], 3), ("node", [2], 2), (2, [4, 4], 2), (8, [4, 4, 4, 4], 8), (4, [4], 4)],
)
def test_the_size_of_a_shard_group(shard_group, nodes, size):
    assert shard_size(shard_group, places(nodes)) == size


@pytest.mark.parametrize(
    ("shard_group", "nodes", "words"),
    [
        (4, [3, 3], "this job has 6 ranks, 3 on each node. Use one of 3, 6"),
        (2, [3, 3], "2 ranks, but this job has 6"),
        (5, [4, 4], "Use one of 2, 4, 8"),
        (8, [4, 4, 4], "Use one of 2, 4, 12"),
        (16, [4, 4], "16 ranks"),
        ("node", [1, 1], "one rank alone"),
        ("node", [4, 3], "the nodes have 3, 4 ranks"),
    ],
)
def test_an_impossible_shard_group_is_refused(shard_group, nodes, words):
    with pytest.raises(ValueError, match=words):
        shard_size(shard_group, places(nodes))


def test_ranks_numbered_across_nodes_are_refused():
    with pytest.raises(ValueError, match="numbers the ranks across nodes"):
        shard_size("node", [(2, 0), (2, 0), (2, 1), (2, 1)])


def places(nodes: list[int]) -> list[tuple[int, int]]:
    return [(ranks, local_rank) for ranks in nodes for local_rank in range(ranks)]


def test_fp16_saturates_on_the_wire():
    values = torch.tensor([1e6, -1e6, 3.0, float("nan")])
    sent = saturate(values, torch.float16, 4).to(torch.float16)
    assert torch.isfinite(4 * sent[:3]).all()
    assert sent[2] == 3
    assert sent[3].isnan()
