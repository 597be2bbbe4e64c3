"""HSDP trains like ZeRO-3 over the world and like plain torch, whatever it is combined with; replicas stay bit-equal.

Guards the private names of DeepSpeed 0.19.8 that dhen/dense/hsdp.py relies on: every row runs through them.
"""

import functools
import hashlib
import itertools
import logging
import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero import stage3, stage_1_and_2

from dhen.config.ds_config import read_ds_config
from dhen.dense import replica_reduction
from dhen.dense.replica_reduction import ReplicaReduction, saturate
from dhen.runtime.topology import Topology, shard_size
from dhen.training import parallelize
from dhen.training.parallel_model import ParallelDhen
from tests import ROOT
from tests.plain import global_batches, plain_losses, recipe
from tests.ranks import run_ranks
from tests.tiny_training import difference, train

GLOBAL_BATCH = 48
TOLERANCE = 1e-5
SHAPES = [(2, 2), (3, 2), (2, 3), (1, 4)]
"""Nodes and ranks on each."""
SMALL_BUCKETS = {"reduce_bucket_size": 500}
"""So that a backward has several all-reduces under way, and some weights are larger than a bucket."""
STEPS, FEW_STEPS = 8, 6
MICRO = {"accumulation": 2, "max_grad_norm": 0.05}


COMBINATIONS: dict[str, dict[str, Any]] = {
    "zero3": {},
    "zero3 small buckets": {"zero": SMALL_BUCKETS},
    "zero3 overlap_comm": {"zero": SMALL_BUCKETS | {"overlap_comm": True}},
    "zero3 no overlap_comm": {"zero": SMALL_BUCKETS | {"overlap_comm": False}},
    "zero3 clipped, 2 micro steps": MICRO | {"zero": SMALL_BUCKETS},
    "zero3 SGD": {"accumulation": 2, "optimizer": "SGD"},
    "zero3 waiting at once": {"zero": SMALL_BUCKETS, "dhen": {"async_all_reduce": False}},
    "zero3 weights released early": {"zero": SMALL_BUCKETS | {"stage3_param_persistence_threshold": 0}},
    "hsdp": {},
    "hsdp_ckpt": {},
    "hsdp_ckpt weights released early": {"zero": SMALL_BUCKETS | {"stage3_param_persistence_threshold": 0}},
    "hsdp_offload": {},
    "zero3 gathered parameters small": {"zero": {"stage3_param_persistence_threshold": 0}},
    "zero3_offload": {"zero": SMALL_BUCKETS},
    "zero3_offload clipped, 2 micro steps": MICRO | {"zero": SMALL_BUCKETS},
    "zero2": {"zero": SMALL_BUCKETS},
    "zero2 overlap_comm": {"zero": SMALL_BUCKETS | {"overlap_comm": True}},
    "zero2 clipped, 2 micro steps": MICRO | {"zero": SMALL_BUCKETS},
    "zero2 SGD": {"optimizer": "SGD"},
    "zero2 waiting at once": {"zero": SMALL_BUCKETS, "dhen": {"async_all_reduce": False}},
    "zero2_offload": {"zero": SMALL_BUCKETS},
    "zero2_offload clipped, 2 micro steps": MICRO | {"zero": SMALL_BUCKETS},
    "zero1": {"zero": SMALL_BUCKETS},
    "zero1 overlap_comm": {"zero": SMALL_BUCKETS | {"overlap_comm": True}},
    "zero1 clipped, 2 micro steps": MICRO | {"zero": SMALL_BUCKETS},
    "zero1 SGD": {"accumulation": 2, "optimizer": "SGD"},
}
"""What is trained in fp32: ds_config and what is done to it."""
SUMS_IN_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
ROUNDED = {
    "hsdp_bf16": 0.05,
    "hsdp_ckpt_bf16": 0.05,
    "hsdp_offload_bf16": 0.05,
    "zero2_bf16": 0.05,
    "zero2_bf16 clipped, 2 micro steps": 0.1,  # ZeRO's own over the world is 0.08
    "zero2_bf16 sums in fp32, clipped, 2 micro steps": 0.1,
    "zero2_bf16 SGD": 0.01,
    "zero1_bf16": 0.05,
    "zero1_bf16 clipped, 2 micro steps": 0.1,
    "zero0_bf16 as zero3": 0.05,
    "zero0_bf16 as zero2": 0.05,
    "zero0_bf16 as zero1": 0.05,
    "zero3 bf16 across nodes": 0.02,
    "zero3 fp16 across nodes": 0.005,
    "zero3_offload bf16 across nodes": 0.02,
    "zero2 bf16 across nodes": 0.02,
    "zero2_offload bf16 across nodes": 0.02,
    "paper": 0.05,
}
"""What is rounded somewhere, and the relative difference of a loss that is allowed."""
ROUNDED_CHANGES: dict[str, dict[str, Any]] = {
    "zero2_bf16 clipped, 2 micro steps": MICRO | {"zero": SMALL_BUCKETS},
    "zero2_bf16 sums in fp32, clipped, 2 micro steps": MICRO | {"zero": SMALL_BUCKETS, "others": SUMS_IN_FP32},
    "zero2_bf16 SGD": {"zero": SMALL_BUCKETS, "optimizer": "SGD"},
    "zero1_bf16 clipped, 2 micro steps": MICRO | {"zero": SMALL_BUCKETS},
    "zero0_bf16 as zero3": {"zero": {"stage": 3}},  # torch autocast
    "zero0_bf16 as zero2": {"zero": {"stage": 2}},
    "zero0_bf16 as zero1": {"zero": {"stage": 1}},
    "zero3 bf16 across nodes": {"dhen": {"all_reduce_dtype": "bf16"}},
    "zero3 fp16 across nodes": {"dhen": {"all_reduce_dtype": "fp16"}},
    "zero3_offload bf16 across nodes": {"dhen": {"all_reduce_dtype": "bf16"}},
    "zero2 bf16 across nodes": {"dhen": {"all_reduce_dtype": "bf16"}},
    "zero2_offload bf16 across nodes": {"dhen": {"all_reduce_dtype": "bf16"}},
}


@dataclass(frozen=True)
class Trained:
    """What a rank ends with. shard: a hash of the fp32 weights that it holds."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    shard: str


def train_hsdp(topology: Topology, name: str, changes: dict[str, Any], shard_group: str | int) -> Trained:
    changes = changes | {"dhen": {"shard_group": shard_group} | changes.get("dhen", {})}
    losses, model = train(topology, name.split()[0], global_batch=GLOBAL_BATCH, **{"steps": STEPS} | changes)
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
    assert_equal_weights(ours.weights, weights)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("name", ["zero3 clipped, 2 micro steps", "zero2", "zero1"])
def test_any_number_of_nodes_and_ranks_equals_plain_torch(shape, name):
    losses, weights = reference_of(COMBINATIONS[name])
    ours = trained(*shape)[0][name]
    assert difference(ours.losses, losses) < TOLERANCE
    assert_equal_weights(ours.weights, weights)


def assert_equal_weights(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    assert set(ours) == {key for key in reference if not key.startswith("tables.")}
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, reference[key], atol=1e-5, rtol=1e-5)


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


def train_with_deepspeeds_adam(topology: Topology) -> dict[str, Trained]:
    """Set-ups for which DeepSpeed asks for its own Adam. It takes 45 s to compile, so torch's passes for it here."""
    stage3.DeepSpeedCPUAdam = stage_1_and_2.DeepSpeedCPUAdam = torch.optim.AdamW
    masters = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
    half = {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    rows = {
        "zero2_offload_bf16 with masters in bf16": {"zero": SMALL_BUCKETS, "others": masters},
        "zero3_offload of one half": {"zero": SMALL_BUCKETS | half},
    }
    rows = {name: MICRO | changes | {"steps": FEW_STEPS} for name, changes in rows.items()}
    return train_all(topology, rows)


def test_partial_offload_and_bf16_masters():
    by_rank = run_ranks(4, train_with_deepspeeds_adam, local_size=2)
    losses = reference_of(MICRO)[0][:FEW_STEPS]
    in_bf16, of_one_half = by_rank[0].values()
    assert difference(in_bf16.losses, losses) < 0.1
    assert difference(of_one_half.losses, losses) < TOLERANCE
    for name in by_rank[0]:
        shards = [rank[name].shard for rank in by_rank]
        assert shards[:2] == shards[2:], name


def test_a_frozen_layer_stays_as_it_is():
    hybrid, plain = (run_ranks(4, train_frozen, group, local_size=2)[0] for group in ("node", "world"))
    for stage, (ours, start) in hybrid.items():
        assert difference(ours.losses, plain[stage][0].losses) < TOLERANCE
        frozen = [key for key in start if key.startswith("model.layers.0.")]
        assert frozen
        for key in frozen:
            assert torch.equal(ours.weights[key], start[key]), stage
        trained_key = "model.layers.1.interactions.0.mix.weight"
        assert not torch.equal(ours.weights[trained_key], start[trained_key])


def train_frozen(topology: Topology, shard_group: str) -> dict[str, tuple[Trained, dict[str, torch.Tensor]]]:
    """By ZeRO stage: what is trained, and the weights from which it started."""
    changes = {"frozen": frozenset({"layers.0"})}
    return {
        stage: (
            train_hsdp(topology, stage, changes | {"steps": FEW_STEPS}, shard_group),
            train_hsdp(topology, stage, changes | {"steps": 0}, shard_group).weights,
        )
        for stage in ("zero1", "zero2", "zero3")
    }


# What one rank or one replica does alone.

OVERFLOWS_AT = 2
MAY_OVERFLOW = ("zero1", "zero2", "zero2_offload", "zero2_bf16", "zero3", "zero3_offload")


def train_through_an_overflow(topology: Topology) -> dict[str, list[str]]:
    """One gradient of rank 1 is infinite in one step; fp16 crosses nodes, which would saturate a large number."""
    return {name: through_an_overflow(topology, name) for name in MAY_OVERFLOW}


def through_an_overflow(topology: Topology, name: str) -> list[str]:
    """A hash of this rank's fp32 weights before each step, and after the step that is refused."""
    shards, backward, models = [], itertools.count(), []

    def before_step(step: int, model: ParallelDhen) -> None:
        shards.append(hash_of_shard(model))
        models.append(model)
        if step == 0 and topology.rank == 1:
            weight = model.engine.module.model.layers[0].interactions[0].mix.weight
            weight.register_hook(lambda g: torch.full_like(g, math.inf) if next(backward) == OVERFLOWS_AT else None)

    with pytest.raises(FloatingPointError):
        train(
            topology, name, global_batch=GLOBAL_BATCH, dhen={"shard_group": "node", "all_reduce_dtype": "fp16"},
            zero=SMALL_BUCKETS, steps=FEW_STEPS, before_step=before_step,
        )  # fmt: skip
    return [*shards, hash_of_shard(models[0])]


def test_an_overflow_on_one_rank_is_refused_by_all():
    by_rank = run_ranks(4, train_through_an_overflow, local_size=2)
    for name in MAY_OVERFLOW:
        ranks = [result[name] for result in by_rank]
        assert [ranks[0], ranks[1]] == [ranks[2], ranks[3]], f"{name}: replicas differ"
        kept = [before == after for before, after in itertools.pairwise(ranks[0])]
        assert kept == [step == OVERFLOWS_AT for step in range(OVERFLOWS_AT + 1)], name


def save_and_see(topology: Topology, folder: str) -> dict[str, set[str]]:
    """By ZeRO stage: the names of the files that this rank writes when the job saves."""
    written: dict[str, set[str]] = {}
    save = torch.save

    def noted(values: Any, path: str, **options: Any) -> None:
        written[stage].add(Path(path).name)
        save(values, path, **options)

    torch.save = noted
    for stage in ("zero1", "zero2", "zero3"):
        written[stage] = set()
        _, model = train(topology, stage, global_batch=GLOBAL_BATCH, dhen={"shard_group": "node"}, steps=1)
        model.engine.save_checkpoint(folder, stage, save_latest=False)
    return written


def test_one_replica_writes_a_checkpoint(tmp_path):
    by_rank = run_ranks(4, save_and_see, str(tmp_path), local_size=2)
    for stage in by_rank[0]:
        first, second, *replica = (written[stage] for written in by_rank)
        assert min(len(first), len(second)) > 0, "each rank of the first replica has a shard to write"
        assert not first & second
        assert replica == [set(), set()]


# What is communicated, and when.


def count_messages(topology: Topology, accumulation: int) -> int:
    """All-reduces across nodes in STEPS updates."""
    messages = []
    send = ReplicaReduction._send

    def counted(self, on_wire, put_away):
        messages.append(on_wire.numel())
        send(self, on_wire, put_away)

    ReplicaReduction._send = counted
    train(
        topology,
        "zero3",
        accumulation,
        global_batch=GLOBAL_BATCH,
        dhen={"shard_group": "node"},
        zero=SMALL_BUCKETS,
        steps=STEPS,
    )
    ReplicaReduction._send = send
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


def with_the_latest_all_reduce(topology: Topology) -> dict[str, list[float]]:
    replica_reduction.dist = LazyDist()
    changes = {"zero": SMALL_BUCKETS, "steps": FEW_STEPS}
    return {stage: train_hsdp(topology, stage, changes, "node").losses for stage in ("zero2", "zero3")}


def without_the_all_reduce(topology: Topology) -> dict[str, list[float]]:
    LazyWork.wait = lambda self: None
    return with_the_latest_all_reduce(topology)


def without_the_wait(topology: Topology) -> dict[str, list[float]]:
    """The step takes the gradients as they were sent: each all-reduce is waited for in the backward after it."""
    late: list[LazyWork] = []

    def too_early(self, *, is_last):
        while late:
            late.pop(0).wait()
        for handle, put_away in self._pending:
            put_away()
            late.append(handle)
        self._pending.clear()

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
    for losses in run_ranks(4, with_the_latest_all_reduce, local_size=2)[0].values():
        assert difference(losses, reference()[0][:FEW_STEPS]) < TOLERANCE


@pytest.mark.parametrize("fault", [without_the_all_reduce, without_the_wait])
def test_a_broken_reduction_is_caught(fault):
    for stage, losses in run_ranks(4, fault, local_size=2)[0].items():
        assert difference(losses, reference()[0][:FEW_STEPS]) > 100 * TOLERANCE, stage


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
        (2, [3, 3], r"2 ranks per group\), but this job has 6"),
        (5, [4, 4], "Use one of 2, 4, 8"),
        (8, [4, 4, 4], "Use one of 2, 4, 12"),
        (16, [4, 4], "16 ranks"),
        ("node", [1, 1], "A group of one rank shards nothing"),
        ("node", [4, 3], "the nodes have 3, 4 ranks"),
    ],
)
def test_an_impossible_shard_group_is_refused(shard_group, nodes, words):
    with pytest.raises(ValueError, match=words):
        shard_size(shard_group, places(nodes))


def messages_about_groups(topology: Topology) -> list[str]:
    """What is logged for a shard group that is the job's only one, and for ZeRO's own."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("dhen").addHandler(handler)
    logging.getLogger("dhen").setLevel(logging.INFO)
    for name in ("hsdp", "zero3"):
        config = read_ds_config(ROOT / f"ds_configs/{name}.json", recipe(topology.world_size, 8))
        assert parallelize._shard_groups(topology, config) is None
    return messages


def test_on_one_node_the_log_says_that_it_is_plain_zero():
    ((message,),) = run_ranks(1, messages_about_groups)
    assert "dhen.shard_group 'node' covers all 1 ranks of this job, so there is only one replica" in message


def see_groups(topology: Topology) -> tuple[list[timedelta], float]:
    """Timeouts of a rank's groups, and by what it clips where the nodes' norms differ in the last bit."""
    groups = topology.shard_groups(2)
    timeouts = [group._get_backend(topology.device).options._timeout for group in (groups.shard, groups.replica)]
    norm = torch.tensor(1.0 + (topology.rank // 2) * torch.finfo(torch.float32).eps)
    return timeouts, ReplicaReduction(groups).agreed(norm).item()


def test_groups_have_the_timeout_of_the_job_and_replicas_clip_by_one_norm():
    by_rank = run_ranks(4, see_groups)
    assert [timeouts for timeouts, _ in by_rank] == [[timedelta(minutes=2)] * 2] * 4
    assert [norm for _, norm in by_rank] == [1.0] * 4


def test_ranks_numbered_across_nodes_are_refused():
    with pytest.raises(ValueError, match="does not number the ranks node by node"):
        shard_size("node", [(2, 0), (2, 0), (2, 1), (2, 1)])


def places(nodes: list[int]) -> list[tuple[int, int]]:
    return [(ranks, local_rank) for ranks in nodes for local_rank in range(ranks)]


def test_fp16_saturates_on_the_wire():
    values = torch.tensor([1e6, -1e6, 3.0, math.nan, math.inf, -math.inf])
    sent = saturate(values, torch.float16, 4).to(torch.float16)
    assert torch.isfinite(4 * sent[:3]).all()
    assert sent[2] == 3
    assert sent[3].isnan()
    assert sent[4:].tolist() == [math.inf, -math.inf], "an overflow is seen, and its step skipped"
