"""ZeRO-3 without needless copies has the numbers and the checkpoints of DeepSpeed's own, in less memory.

Guards the private names of DeepSpeed 0.19.8 that dhen/dense/lean_stage3.py relies on.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import DsConfig
from dhen.config.zero_sizes import zero_sizes
from dhen.model.configuration_dhen import DhenConfig
from dhen.planner.live_memory import LiveMemory
from dhen.runtime.topology import Topology
from dhen.training import parallelize
from dhen.training.parallel_model import ParallelDhen
from tests.plain import LEARNING_RATE
from tests.ranks import run_ranks
from tests.tiny_training import train

STEPS = 6
SMALL = {"reduce_bucket_size": 500, "stage3_param_persistence_threshold": 0}
"""Most weights fill a bucket, and none stays gathered."""
CASES: dict[str, dict[str, Any]] = {
    "zero3": {},
    "zero3 several reductions": {"zero": {"reduce_bucket_size": 500}},
    "zero3 clipped, 2 micro steps": {"accumulation": 2, "max_grad_norm": 0.05, "zero": {"reduce_bucket_size": 500}},
    "zero3 several sub-groups": {"zero": {"sub_group_size": 400}},
    "zero3 all weights gathered anew": {"zero": {"stage3_param_persistence_threshold": 0}},
    "zero3 weights released early": {"zero": SMALL},
    "zero3 weights released early, recomputed": {"zero": SMALL, "dhen": {"activation_checkpointing": "all"}},
    "zero3_bf16": {},
    "zero3_offload": {},
}


def losses_of_all(topology: Topology, is_lean: bool) -> dict[str, list[float]]:
    if not is_lean:
        keep_deepspeeds_own()
    return {name: train(topology, name.split()[0], steps=STEPS, **changes)[0] for name, changes in CASES.items()}


def keep_deepspeeds_own() -> None:
    parallelize.LeanStage3.take_over = lambda optimizer: None


def test_losses_are_deepspeeds_to_the_last_bit():
    """On two ranks: a sum of two numbers doesn't depend on how gradients share messages."""
    lean, own = (run_ranks(2, losses_of_all, is_lean)[0] for is_lean in (True, False))
    assert lean == own
    assert all(len(set(losses)) == STEPS for losses in own.values()), "nothing was trained"


def memory_of(topology: Topology, is_lean: bool) -> tuple[int, int]:
    """Bytes between steps, and the peak of a step, beyond the activations' few."""
    if not is_lean:
        keep_deepspeeds_own()
    with LiveMemory() as memory:
        train_wide(topology, "zero3", 4, lambda step, model: memory.reset_peak())
        return memory.bytes, memory.peak


def train_wide(
    topology: Topology, scheme: str, steps: int, before_step: Callable[[int, ParallelDhen], None], depth: int = 4
) -> ParallelDhen:
    """A model whose weights are far more than its activations: layers of 256 x 256."""
    config = DhenConfig(
        num_dense_features=4, num_dense_embeddings=32, embedding_dim=8, num_layers=depth, dense_mlp=[], head_mlp=[4],
        interactions=[{"kind": "deep_cross_flattened", "num_embeddings": 32}],
    )  # fmt: skip
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "torch_adam": True, "fused": True}},
        # A quarter of the rule's floor, which is larger than these layers.
        "zero_optimization": {"stage": 3} | {key: value // 4 for key, value in zero_sizes({"": 4}).items()}
        | {"stage3_param_persistence_threshold": 300},
    }  # fmt: skip
    section = DhenSection(shard_group="node" if scheme == "hsdp" else "world")
    model = parallelize.parallelize(parallelize.lay_out(config, topology, DsConfig("test", settings, section)))
    generator = torch.Generator().manual_seed(topology.rank)
    for step in range(steps):
        before_step(step, model)
        dense_BN = torch.randn(4, 4, generator=generator)
        model.step(model.score(dense_BN.new_empty(4, 0, 8), dense_BN).square().mean())
    return model


LAYER = 4 * (256 * 256 + 256)
"""Bytes of a layer's weights, without its norm."""


def test_memory_is_what_training_needs():
    (rest, peak), (own_rest, own_peak) = (run_ranks(2, memory_of, is_lean)[0] for is_lean in (True, False))
    shard = 4 * LAYER / 2
    # Between steps: weights and two moments. In a step: gradients too, two gathered layers and one layer's gradients.
    assert rest == pytest.approx(3 * shard, rel=0.1)
    assert own_rest > 5 * shard - LAYER, "masters and gradients, and DeepSpeed's bucket"
    assert peak < 4 * shard + 4 * LAYER
    assert peak < 0.85 * own_peak


def evaluation_peak(topology: Topology) -> int:
    """Bytes that evaluations add to what is there between steps, with a model of 12 layers."""
    with LiveMemory() as memory:
        model = train_wide(topology, "zero3", 3, lambda step, model: None, depth=12)
        before = memory.bytes
        memory.reset_peak()
        with model.evaluating():
            for _ in range(3):
                model.score(torch.empty(4, 0, 8), torch.randn(4, 4))
        return memory.peak - before


def test_an_evaluation_gathers_layer_by_layer():
    assert LAYER < run_ranks(2, evaluation_peak)[0] < 6 * LAYER


def shares_memory(topology: Topology) -> dict[str, list[bool]]:
    """By ds_config: whether each master weight lies where its weight does."""
    shares = {}
    for name in ("zero3", "hsdp", "zero3_bf16", "zero3_offload"):
        _, model = train(topology, name, steps=1)
        optimizer = model.engine.optimizer
        pairs = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
        shares[name] = [weights.data_ptr() == masters.data_ptr() for weights, masters in pairs]
    return shares


def test_masters_are_the_weights_where_both_are_fp32_and_on_the_device():
    shares = run_ranks(4, shares_memory, local_size=2)[0]
    assert {name: set(values) for name, values in shares.items()} == {
        "zero3": {True}, "hsdp": {True}, "zero3_bf16": {False}, "zero3_offload": {False},
    }  # fmt: skip


def save_or_resume(topology: Topology, folder: str, is_lean: bool, resumes: bool) -> list[float]:
    """Losses of steps; those of the second half if they follow from the checkpoint."""
    if not is_lean:
        keep_deepspeeds_own()

    def before_step(step: int, model: ParallelDhen) -> None:
        if resumes and step == STEPS // 2:
            model.engine.load_checkpoint(folder, "half")
        elif step == STEPS // 2:
            model.engine.save_checkpoint(folder, "half", save_latest=False)

    losses, _ = train(topology, "zero3", steps=STEPS, dhen={"shard_group": "world"}, before_step=before_step)
    return losses[STEPS // 2 :]


@pytest.mark.parametrize("is_lean", [True, False])
def test_checkpoints_go_both_ways(tmp_path, is_lean):
    """A checkpoint of DeepSpeed's own optimizer is resumed to the last bit by ours, and the other way around."""
    written = run_ranks(2, save_or_resume, str(tmp_path), is_lean, False)[0]
    assert run_ranks(2, save_or_resume, str(tmp_path), not is_lean, True)[0] == written


class Detour(nn.Module):
    """A weight that only some steps use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(333))


def train_with_a_detour(topology: Topology, *, is_full_of_nan: bool) -> tuple[torch.Tensor, list[float]]:
    """A weight without a gradient, and losses. is_full_of_nan: what uninitialized memory is full of."""
    build, new_empty = parallelize._dense_part, torch.Tensor.new_empty

    def with_detour(*arguments: Any) -> nn.Module:
        model = build(*arguments)
        model.detour = Detour()
        return model

    def full_of_nan(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        result = new_empty(self, *size, **options)
        return result.fill_(math.nan) if result.is_floating_point() else result

    parallelize._dense_part = with_detour
    if is_full_of_nan:
        torch.Tensor.new_empty = full_of_nan
    losses, model = train(topology, "zero3", steps=STEPS, accumulation=2, zero={"reduce_bucket_size": 500})
    return model.dense_state_dict().get("detour.weight"), losses


def test_a_weight_without_a_gradient_stays_as_it_is():
    (weight, losses), (_, expected) = (
        run_ranks(2, functools.partial(train_with_a_detour, is_full_of_nan=is_full))[0] for is_full in (True, False)
    )
    assert torch.equal(weight, torch.ones(333))
    assert losses == expected, "DeepSpeed skips a step whose gradients aren't finite"


def count_gathers(topology: Topology, is_lean: bool) -> int:
    """All-gathers in the optimizer's step: of the weights that stay gathered."""
    if not is_lean:
        keep_deepspeeds_own()
    gathers: list[int] = []
    gather, step = TorchBackend.all_gather_into_tensor, DeepSpeedZeroOptimizer_Stage3.step

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        gathers.append(1)
        return gather(self, *arguments, **options)

    def from_here(self: Any, closure: Any = None) -> None:
        gathers.clear()
        step(self, closure)

    TorchBackend.all_gather_into_tensor, DeepSpeedZeroOptimizer_Stage3.step = counted, from_here
    train(topology, "zero3", steps=2)
    return len(gathers)


def test_weights_that_stay_gathered_share_a_message():
    assert run_ranks(2, count_gathers, True)[0] == 1
    assert run_ranks(2, count_gathers, False)[0] > 10
