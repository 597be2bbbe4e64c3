"""Each setting of DeepSpeed's that a ds_config may have trains like torch alone, at another value than its default."""

import contextlib
import functools
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dhen.config.deepspeed_sections import SETTINGS, ZERO, Works
from dhen.config.ds_config import DsConfigError, read_ds_config
from dhen.config.optimizer_section import OPTIMIZERS
from dhen.runtime.topology import Topology
from tests import ROOT
from tests.config.mutations import mutated
from tests.plain import global_batches, plain_losses, recipe
from tests.ranks import run_ranks
from tests.tiny_training import GLOBAL_BATCH, difference, train

STEPS = 5
BUILT = [Path(os.environ["TORCH_EXTENSIONS_DIR"]) / name / f"{name}.so" for name in ("cpu_adam", "fused_adam")]
FP32_TOLERANCE = 1e-5
BF16_TOLERANCE = 0.05
CPU_OFFLOAD = {"device": "cpu", "pin_memory": False}


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    """A ds_config of this stage."""
    return {ZERO: {"stage": stage} | keys}


def named(kind: str, **params: Any) -> dict[str, Any]:
    """A ds_config with this optimizer."""
    return {"optimizer": {"type": kind, "params": params}, "zero_allow_untested_optimizer": True}


TORCH_ADAM = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
EXACT = [
    *(zero(stage, contiguous_gradients=False, overlap_comm=stage < 3) for stage in (1, 2, 3)),
    *(zero(stage, reduce_scatter=False, reduce_bucket_size=100) for stage in (1, 2, 3)),
    *(zero(stage, use_multi_rank_bucket_allreduce=False, allgather_bucket_size=100) for stage in (1, 2)),
    *(zero(stage, round_robin_gradients=True, parameter_alignment=True) for stage in (1, 2)),
    *(zero(stage, offload_optimizer=CPU_OFFLOAD) | {"zero_force_ds_cpu_optimizer": True} for stage in (1, 2, 3)),
    zero(3, offload_param=CPU_OFFLOAD),
    zero(3, sub_group_size=200, memory_efficient_linear=False, stage3_model_persistence_threshold=100),
    zero(3, stage3_prefetch_bucket_size=0, stage3_max_live_parameters=0, stage3_max_reuse_distance=10),
    zero(3, stage3_param_persistence_threshold=0, stage3_use_all_reduce_for_fetch_params=True),
    zero(3, stage3_allgather_sequential=True),
    *(zero(stage) | {"communication_data_type": "fp32", "wall_clock_breakdown": True} for stage in (0, 1, 2, 3)),
]
"""Changes of ds_configs/zero0.json."""
ROUNDED = [
    *(zero(stage) | {"communication_data_type": "bf16"} for stage in (0, 1, 2, 3)),
    *(zero(stage) | {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}} for stage in (0, 1, 2, 3)),
    *(
        zero(stage) | {"bf16": {"enabled": True}} | sums
        for stage in (1, 2, 3)
        for sums in ({}, {"data_types": {"grad_accum_dtype": "fp32"}})
    ),
    *(
        zero(stage) | {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
        for stage in (1, 2, 3)
    ),
]
COMPILED = [
    zero(2, offload_optimizer={"device": "cpu"}) | named("AdamW"),
    zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}) | named("AdamW", bias_correction=True),
    zero(3, offload_optimizer={"device": "cpu"}) | named("Adam", adam_w_mode=False),
    zero(1) | named("AdamW"),
]
"""Those with DeepSpeed's own Adam, which is compiled for a minute each for CPU offload and for other weights."""
PARAMS = {
    "Adam": {"torch_adam": True, "amsgrad": True, "foreach": True, "adam_w_mode": False},
    "AdamW": {"torch_adam": True, "amsgrad": True, "fused": False},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSprop": {"alpha": 0.9},
}
"""Params of optimizers, beside the learning rate."""


def of_optimizers() -> dict[str, list[dict[str, Any]]]:
    """Changes of ds_configs/zero0.json, by optimizer."""
    offload = zero(2, offload_optimizer={"device": "cpu"})
    bases = {kind: (zero(0), zero(3), *((offload,) if kind != "Adagrad" else ())) for kind in OPTIMIZERS}
    return {kind: [base | named(kind, **PARAMS.get(kind, {})) for base in bases[kind]] for kind in OPTIMIZERS}


def losses_of(topology: Topology, folder: Path, changes: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The losses by change, as JSON. Each is written to a file, so that it is read and checked like a user's."""
    losses = {}
    base = json.loads((ROOT / "ds_configs/zero0.json").read_text())
    for change in changes:
        path = folder / f"rank{topology.rank}"
        path.with_suffix(".json").write_text(json.dumps(base | change))
        losses[json.dumps(change)] = train(topology, str(path), steps=STEPS)[0]
    return losses


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[str, list[float]]:
    """See `losses_of`."""
    changes = [*EXACT, *ROUNDED, *itertools.chain(*of_optimizers().values())]
    return run_ranks(2, losses_of, tmp_path_factory.mktemp("settings"), changes)[0]


@functools.cache
def reference(kind: str = "AdamW", **params: Any) -> list[float]:
    return plain_losses(global_batches(STEPS, GLOBAL_BATCH), optimizer=kind, **params)[0]


@pytest.mark.parametrize("change", EXACT, ids=json.dumps)
def test_a_setting_changes_no_loss(losses, change):
    assert difference(losses[json.dumps(change)], reference()) < FP32_TOLERANCE


@pytest.mark.parametrize("change", ROUNDED, ids=json.dumps)
def test_a_dtype_rounds_the_losses(losses, change):
    assert FP32_TOLERANCE < difference(losses[json.dumps(change)], reference()) < BF16_TOLERANCE


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_trains_like_torchs(losses, kind):
    ours = ("torch_adam", "adam_w_mode")
    arguments = {key: value for key, value in PARAMS.get(kind, {}).items() if key not in ours}
    for change in of_optimizers()[kind]:
        assert difference(losses[json.dumps(change)], reference(kind, **arguments)) < 10 * FP32_TOLERANCE, change


@pytest.mark.skipif(
    not (os.environ.get("DHEN_COMPILE") or all(built.exists() for built in BUILT)),
    reason="cpu_adam and fused_adam are not compiled here. DHEN_COMPILE=1 compiles them, which takes minutes",
)
def test_deepspeeds_own_adam_trains_like_torchs(tmp_path):
    for change, losses in run_ranks(2, losses_of, tmp_path, COMPILED)[0].items():
        assert difference(losses, reference()) < FP32_TOLERANCE, change


def train_mutated(topology: Topology, folder: Path, count: int) -> list[int]:
    """Train two steps with each of the first `count` mutated ds_configs that are read. Returns their seeds."""
    path, trained = folder / "mutated", []
    for seed in itertools.count():
        path.with_suffix(".json").write_bytes(mutated(seed))
        with contextlib.suppress(DsConfigError):
            config = read_ds_config(path.with_suffix(".json"), recipe(topology.world_size, GLOBAL_BATCH))
            if is_compiled(config.deepspeed["optimizer"]):
                continue
            try:
                train(topology, str(path), steps=2)
            except DsConfigError:
                raise
            except Exception as error:
                raise AssertionError(f"seed {seed}: {mutated(seed)!r:.3000}") from error
            trained.append(seed)
        if len(trained) == count:
            break
    return trained


def is_compiled(optimizer: dict[str, Any]) -> bool:
    return optimizer["type"].lower() in ("adam", "adamw") and not optimizer["params"].get("torch_adam")


def test_what_is_read_is_trained_without_a_traceback(tmp_path):
    assert len(run_ranks(1, train_mutated, tmp_path, 40)[0]) == 40


def test_each_setting_that_works_is_trained_with():
    """Here, or by a shipped file, whose losses test_zero_parity.py compares."""
    files = [json.loads(path.read_text()) for path in (ROOT / "ds_configs").glob("*.json")]
    changes = [*EXACT, *ROUNDED, *itertools.chain(*of_optimizers().values()), *COMPILED, *files]
    trained = {key for change in changes for key in keys_of(change)}
    works = {key for key, setting in SETTINGS.items() if isinstance(setting, Works)}
    assert works <= trained


def keys_of(section: dict[str, Any], prefix: str = "") -> set[str]:
    """All keys, dotted."""
    inner = [keys_of(value, f"{prefix}{key}.") for key, value in section.items() if isinstance(value, dict)]
    return {prefix + key for key in section}.union(*inner)
