"""The dense part in bf16: its all-reduce under every ZeRO stage and HSDP, and its masters and Adam's states."""

import functools

import pytest
import torch

from dhen.runtime.topology import Topology
from dhen.training import parallelize
from dhen.training.parallel_model import ParallelDhen
from tests.plain import global_batches, plain_losses
from tests.ranks import run_ranks
from tests.tiny_training import GLOBAL_BATCH, difference, train

STEPS = 10
TOLERANCE = 0.05  # bf16 keeps 8 bits: after some Adam steps losses are within a few per cent
HYBRID = {"shard_group": 2}
BF16_OPTIMIZER = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
ALL_REDUCE = {"others": {"communication_data_type": "bf16"}}
SET_UPS = {
    **{f"zero{stage}, bf16 all-reduce": (f"zero{stage}", ALL_REDUCE) for stage in range(4)},
    "hsdp, bf16 reduction in the node": ("hsdp", ALL_REDUCE | {"dhen": HYBRID}),
    "hsdp, bf16 all-reduce": ("hsdp", {"dhen": HYBRID | {"all_reduce_dtype": "bf16"}}),
    **{f"zero{stage}, bf16 optimizer": (f"zero{stage}_bf16", {"others": BF16_OPTIMIZER}) for stage in (1, 2, 3)},
    "hsdp, bf16 optimizer": ("hsdp_bf16", {"others": BF16_OPTIMIZER, "dhen": HYBRID}),
    "paper": ("paper", {"dhen": HYBRID}),
    "zero2": ("zero2", {}),
    "zero2, fp32 masters": ("zero2_bf16", {}),
}


def dtypes(model: ParallelDhen) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Of the masters that the optimizer steps, and of Adam's moments."""
    optimizer = model.engine.optimizer
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", None) or optimizer.single_partition_of_fp32_groups
    moments = {state[name].dtype for state in optimizer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")}
    return {master.dtype for master in masters}, moments


def train_all(topology: Topology) -> dict[str, tuple[list[float], tuple]]:
    result = {}
    for name, (file, changes) in SET_UPS.items():
        losses, model = train(topology, file, steps=STEPS, **changes)
        result[name] = (losses, dtypes(model) if file != "zero0" else ())
    return result


@functools.cache
def trained() -> dict[str, tuple[list[float], tuple]]:
    return run_ranks(4, train_all)[0]


@pytest.mark.parametrize("name", SET_UPS)
def test_losses_are_near_plain_torchs(name):
    expected, _ = plain_losses(global_batches(STEPS, GLOBAL_BATCH))
    error = difference(trained()[name][0], expected)
    assert error < (1e-5 if name == "zero2" else TOLERANCE)
    assert name == "zero2" or error > 1e-5, "nothing was rounded, so this showed nothing"


@pytest.mark.parametrize("name", [name for name in SET_UPS if "bf16 optimizer" in name or name == "paper"])
def test_masters_and_adams_moments_are_bf16(name):
    assert trained()[name][1] == ({torch.bfloat16}, {torch.bfloat16})


@pytest.mark.parametrize("name", ["zero2", "zero2, fp32 masters"])
def test_else_they_are_fp32(name):
    assert trained()[name][1] == ({torch.float32}, {torch.float32})


@pytest.mark.parametrize("is_allowed", [True, False])
def test_tf32_follows_the_ds_config_on_a_gpu(is_allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not is_allowed)
    try:
        parallelize._allow_tf32(is_allowed, torch.device("cuda"))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == is_allowed
    finally:
        torch.set_float32_matmul_precision("highest")
