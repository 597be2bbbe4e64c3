"""Predicts the memory that a run needs per rank, and logs it at the start (paper 3.1).

The prediction is for information only. If it is not possible, the run continues without it.
"""

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from deepspeed.accelerator import get_accelerator

from dhen.config.ds_config import DsConfig
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.parts import part_of
from dhen.planner.memory import MemoryUse, predict_memory
from dhen.planner.memory_setting import MemorySetting
from dhen.planner.minimum_set import gib
from dhen.planner.step_trace import Precision, StepTrace, evaluation_bytes, trace_step
from dhen.runtime.machine_at_hand import HOST_SHARE, host_bytes
from dhen.tables.placement.agreed import table_memory
from dhen.training.parallelize import Layout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryPlan:
    """The trace of a micro step, or the `problem` that prevents it.

    memory_bytes: memory per rank. evaluation: bytes of activations in an evaluation step.
    """

    trace: StepTrace | None
    problem: str
    memory_bytes: int
    evaluation: int = 0

    @classmethod
    def of(
        cls,
        config: DhenConfig,
        ds_config: DsConfig,
        memory_bytes: int,
        eval_batch_size: int,
        num_passes: int = 1,
        frozen: Collection[str] = (),
    ) -> "MemoryPlan":
        """Trace a micro step. Call this before the model is built, because ZeRO stage 3 patches torch's `linear`.

        frozen: parts of the model without gradients and optimizer states.
        """
        batch_size = ds_config.deepspeed["train_micro_batch_size_per_gpu"]
        try:
            precision = precision_of(ds_config)
            trace = trace_step(config, batch_size, precision, ds_config.dhen.activation_checkpointing, num_passes)
            if ds_config.dhen.compile == "layers":
                trace = trace.of_compiled_layers(precision.weights.itemsize)
            num_layers = len(config.layer_specs)
            fixed = frozenset(name for name in trace.weights if part_of(name, num_layers) in frozen)
            trace = replace(trace, frozen=fixed)
            return cls(trace, "", memory_bytes, evaluation_bytes(config, eval_batch_size, precision))
        except ValueError as error:
            return cls(None, str(error), memory_bytes)

    def use(self, layout: Layout) -> MemoryUse | None:
        """Peak memory use of the fullest rank; None if it cannot be predicted."""
        if self.trace is None:
            return None
        topology, config, is_gpu = layout.topology, layout.config, layout.topology.device.type == "cuda"
        setting = MemorySetting.of(layout.ds_config, layout.shard_size, topology.world_size, is_gpu=is_gpu)
        offloaded = layout.ds_config.dhen.activation_offload
        layers = {"none": 0, "all": len(config.layer_specs)}.get(offloaded, offloaded)
        setting = replace(setting, offload_activations=layers if is_gpu else 0)
        use = predict_memory(self.trace, setting, evaluation=self.evaluation, is_gpu=is_gpu)
        return use.with_tables(*table_memory(config, layout.placement))

    def has_room_for_copy(self, layout: Layout) -> bool:
        """Whether a rank's states fit into the memory of its host a second time, for a save in the background.

        Logs it if they do not.
        """
        use, topology = self.use(layout), layout.topology
        if use is None:
            return False
        on_host = use.host if topology.device.type == "cuda" else use.peak
        room = int(HOST_SHARE * host_bytes() / topology.local_size) - on_host
        copied = use.host + sum(use.parts.get(name, 0) for name in ("tables", "optimizer", "weights"))
        if copied > room:
            logger.info(
                "memory: training waits for its saves, because a copy of the states, %s GiB, does not fit into the "
                "%s GiB that are left of a rank's host memory.", gib(copied), gib(max(0, room)),
            )  # fmt: skip
        return copied <= room

    def announce(self, layout: Layout) -> bool:
        """Log the prediction, and warn if it exceeds the memory of a rank. Returns whether it does."""
        use = self.use(layout)
        if use is None:
            logger.info("memory: cannot be predicted: %s", self.problem)
            return False
        parts = ", ".join(f"{name} {gib(size)}" for name, size in sorted(use.parts.items(), key=lambda part: -part[1]))
        host = f" of device memory, and {gib(use.host)} GiB of host memory" if use.host else ""
        if math.isfinite(room := layout.placement.device_bytes):
            host += f"; its tables may use {gib(room)} GiB of the device beside the dense part"
        logger.info(
            "memory: a rank is expected to need at most %s of %s GiB%s. Peak during %s, in GiB: %s",
            gib(use.peak), gib(self.memory_bytes), host, use.moment, parts,
        )  # fmt: skip
        if use.peak > self.memory_bytes:
            logger.warning(
                "memory: this is more than a rank has. `python tools/plan.py` shows which techniques make the model "
                "fit, and --ds_config auto applies them. Or lower the batch sizes for training and evaluation."
            )
        return use.peak > self.memory_bytes


def precision_of(ds_config: DsConfig) -> Precision:
    """Precision of the dense part: bf16 weights, fp32 weights under autocast, or plain fp32."""
    if ds_config.deepspeed.get("bf16", {}).get("enabled"):
        return Precision(torch.bfloat16)
    if ds_config.deepspeed.get("torch_autocast", {}).get("enabled"):
        return Precision(autocast=torch.bfloat16, is_gpu=get_accelerator().device_name() == "cuda")
    return Precision()
