"""What a run is expected to need of each rank's memory, said at its start (paper 3.1).

Only a word beforehand: where it can't be predicted the run goes on all the same.
"""

import logging
from dataclasses import dataclass, replace

import torch

from dhen.config.ds_config import DsConfig
from dhen.model.configuration_dhen import DhenConfig
from dhen.planner.memory import MemorySetting, MemoryUse, predict_memory
from dhen.planner.minimum_set import gib
from dhen.planner.step_trace import Precision, StepTrace, evaluation_bytes, trace_step
from dhen.tables.placement.agreed import table_memory
from dhen.training.parallelize import ParallelDhen

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryPlan:
    """A micro step traced, or why it can't be; memory_bytes: what a rank has; evaluation: bytes of its activations."""

    trace: StepTrace | None
    problem: str
    memory_bytes: int
    evaluation: int = 0

    @classmethod
    def of(cls, config: DhenConfig, ds_config: DsConfig, memory_bytes: int, eval_batch_size: int) -> "MemoryPlan":
        """To be made before the model is: ZeRO stage 3 has another `linear` for the whole process."""
        batch_size = ds_config.deepspeed["train_micro_batch_size_per_gpu"]
        try:
            precision = precision_of(ds_config)
            trace = trace_step(config, batch_size, precision, ds_config.dhen.activation_checkpointing)
            return cls(trace, "", memory_bytes, evaluation_bytes(config, eval_batch_size, precision))
        except ValueError as error:
            return cls(None, str(error), memory_bytes)

    def use(self, model: ParallelDhen) -> MemoryUse | None:
        """A rank's at its worst moment; None where it can't be predicted."""
        if self.trace is None:
            return None
        topology, config, is_gpu = model.topology, model.config, model.topology.device.type == "cuda"
        setting = MemorySetting.of(model.ds_config, model.shard_size, topology.world_size, is_gpu=is_gpu)
        offloaded = model.ds_config.dhen.activation_offload
        layers = {"none": 0, "all": len(config.layer_specs)}.get(offloaded, offloaded)
        setting = replace(setting, offload_activations=layers if is_gpu else 0)
        device_bytes = torch.cuda.get_device_properties(topology.device).total_memory if is_gpu else None
        on_device, on_host = table_memory(config, model.placement, device_bytes)
        use = predict_memory(self.trace, setting, on_device, evaluation=self.evaluation, is_gpu=is_gpu)
        return replace(use, host=use.host + on_host)

    def announce(self, model: ParallelDhen) -> None:
        """Say it, and warn where it is more than there is."""
        use = self.use(model)
        if use is None:
            logger.info("memory: can't be predicted: %s", self.problem)
            return
        parts = ", ".join(f"{name} {gib(size)}" for name, size in sorted(use.parts.items(), key=lambda part: -part[1]))
        beside = f", and {gib(use.host)} of the host's" if use.host else ""
        logger.info(
            "memory: a rank is expected to need at most %s of %s GiB%s, in %s: %s",
            gib(use.peak), gib(self.memory_bytes), beside, use.moment, parts,
        )  # fmt: skip
        if use.peak > self.memory_bytes:
            logger.warning(
                "memory: that is more than a rank has. `python tools/plan.py` shows which techniques make it fit, and "
                "--ds_config auto takes them; per_device_eval_batch_size counts too."
            )


def precision_of(ds_config: DsConfig) -> Precision:
    """Of the dense part: bf16 weights, or fp32 ones under autocast."""
    if ds_config.deepspeed.get("bf16", {}).get("enabled"):
        return Precision(torch.bfloat16)
    is_autocast = ds_config.deepspeed.get("torch_autocast", {}).get("enabled")
    return Precision(autocast=torch.bfloat16 if is_autocast else None)
