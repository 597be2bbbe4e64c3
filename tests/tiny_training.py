"""A tiny DHEN trained in parallel for a few steps, by any ds_config: what the tests of this room compare."""

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits

from dhen.config.ds_config import DsConfig, read_ds_config
from dhen.model.configuration_dhen import DhenConfig
from dhen.runtime.topology import Topology
from dhen.training.loop import summed_loss
from dhen.training.parallel_model import ParallelDhen
from dhen.training.parallelize import lay_out, parallelize
from tests import ROOT
from tests.plain import CONFIG, LEARNING_RATE, SEED, TABLE_LEARNING_RATE, global_batches, recipe, task_labels

STEPS, GLOBAL_BATCH = 20, 32
OF_LAYERS = {
    "zero0, recomputed": {"dhen": {"activation_checkpointing": "all"}},
    "zero2, 2 micro steps": {"accumulation": 2, "optimizer": "SGD"},
    "zero3": {},
    "zero3, recomputed, offloaded": {"dhen": {"activation_checkpointing": "all", "activation_offload": "all"}},
    "hsdp_ckpt": {},
}
"""Set-ups, as of `losses_of_set_ups`, under which what is new in a layer trains like plain torch."""


def train(
    topology: Topology,
    name: str,
    accumulation: int = 1,
    max_grad_norm: float = 0.0,
    optimizer: str = "AdamW",
    *,
    global_batch: int = GLOBAL_BATCH,
    dhen: dict[str, Any] | None = None,
    zero: dict[str, Any] | None = None,
    others: dict[str, Any] | None = None,
    replicated: Collection[str] | None = None,
    architecture: dict[str, Any] | None = None,
    steps: int = STEPS,
    num_passes: int = 1,
    frozen: frozenset[str] = frozenset(),
    before_step: Callable[[int, ParallelDhen], None] = lambda step, model: None,
) -> tuple[list[float], ParallelDhen]:
    """Mean loss of each step, the same on all ranks, and the model.

    name: of a file in ds_configs, or an absolute path, without its ending. dhen, zero: keys that change that section of
    the file; others: sections in place of its own; none of these is checked.
    replicated: tables of the dense part. architecture: keys that change the model's config. num_passes: with the
    self-ensemble loss, if more than 1; the returned losses are those of the mean prediction. frozen: parts that are not
    trained.
    """
    micro = global_batch // topology.world_size // accumulation
    config = read_ds_config(
        ROOT / "ds_configs" / f"{name}.json", recipe(topology.world_size, micro, accumulation, max_grad_norm)
    )
    config = _changed(config, {"table_optimizer": "sgd"} | (dhen or {}), zero or {}, others or {})
    config = with_sgd_dense(config) if optimizer == "SGD" else config
    layout = lay_out(DhenConfig(**CONFIG | (architecture or {})), topology, config, replicated=replicated)
    model = parallelize(layout, frozen=frozen, seed=SEED)
    model.set_learning_rates(LEARNING_RATE, TABLE_LEARNING_RATE)
    losses = []
    for step, batch in enumerate(global_batches(steps, global_batch)):
        before_step(step, model)
        total = torch.zeros(1, device=topology.device)
        for micro_step in range(accumulation):
            first = (micro_step * topology.world_size + topology.rank) * micro
            sparse, dense_BN, labels_B = (part.to(topology.device) for part in batch.rows(first, first + micro))
            output = model.forward(model.look_up(sparse), dense_BN, sparse, num_passes)
            tasks_BT = None if output.task_logits is None else task_labels(dense_BN)
            loss, logits_B = summed_loss(output, labels_B, num_passes, tasks_BT=tasks_BT)
            model.step(loss / micro)
            total += binary_cross_entropy_with_logits(logits_B.detach(), labels_B)
        dist.all_reduce(total)
        losses.append(total.item() / topology.world_size / accumulation)
    return losses, model


def losses_of_set_ups(
    topology: Topology, set_ups: dict[str, dict[str, Any]], architecture: dict[str, Any], steps: int
) -> dict[str, list[float]]:
    """Cross entropy of each step, by set-up: a ds_config's name, and what follows a comma. An evaluation at the end has
    no auxiliary loss.
    """
    found = {}
    for name, more in set_ups.items():
        found[name], model = train(topology, name.split(",")[0], steps=steps, architecture=architecture, **more)
        with model.evaluating():
            sparse, dense_BN, _ = global_batches(1, 6)[0].rows(0, 6)
            output = model.forward(model.look_up(sparse), dense_BN, sparse)
            assert output.auxiliary_loss is None
    return found


def _changed(config: DsConfig, dhen: dict[str, Any], zero: dict[str, Any], others: dict[str, Any]) -> DsConfig:
    deepspeed = config.deepspeed | {"zero_optimization": config.deepspeed.get("zero_optimization", {}) | zero}
    return DsConfig(config.path, deepspeed | others, config.dhen.model_copy(update=dhen))


def with_sgd_dense(config: DsConfig) -> DsConfig:
    """Plain SGD shows a wrong scale of the gradients, to which Adam is blind."""
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}}, "zero_allow_untested_optimizer": True}
    return DsConfig(config.path, config.deepspeed | sgd, config.dhen)


def difference(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference of a step's loss."""
    return max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))
