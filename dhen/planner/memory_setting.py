"""The parts of a ds_config and a job that decide a rank's memory and a step's time."""

from dataclasses import dataclass, field
from typing import Literal

from dhen.config.ds_config import DsConfig
from dhen.dense.gradient_bucket import GradientBucket
from dhen.planner.zero3_gathering import Limits

_DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class MemorySetting:
    """The parts of a ds_config and a job that matter for memory and speed.

    *_bytes: bytes per element. reduce_bucket, sub_group: in elements. shard_size: number of ranks that ZeRO shards
    over. num_replicas: of the dense part, more than 1 under HSDP. master_bytes: for the optimizer's copy of the
    weights. state_bytes: for all of its states, and the moving average. wire_bytes: for HSDP's all-reduce. wire_copy:
    it works on a copy of the gradients. async_all_reduce: False waits for it at once. temporaries: extra memory of the
    optimizer's step: two copies of "one" weight at a time, one copy of "all" weights (torch's optimizers on GPUs), or
    "none" (fused). accumulates: gradients are summed over several micro steps.
    """

    stage: int
    shard_size: int
    num_replicas: int = 1
    weight_bytes: int = 4
    gradient_bytes: int = 4
    master_bytes: int = 4
    state_bytes: int = 8
    wire_bytes: int = 4
    wire_copy: bool = False
    async_all_reduce: bool = True
    reduce_bucket: int = 25_000_000
    sub_group: int = 1_000_000_000
    limits: Limits = field(default_factory=Limits)
    overlap_comm: bool = False
    offload_optimizer: float = 0.0
    offload_param: bool = False
    offload_activations: int = 0
    temporaries: Literal["one", "all", "none"] = "one"
    accumulates: bool = False

    @classmethod
    def of(cls, ds_config: DsConfig, shard_size: int, world_size: int, *, is_gpu: bool) -> "MemorySetting":
        """The setting of a checked ds_config in a job of `world_size` ranks."""
        raw, zero = ds_config.deepspeed, ds_config.deepspeed.get("zero_optimization", {})
        stage = ds_config.zero_stage
        bf16 = raw.get("bf16", {})
        weight_bytes = 2 if bf16.get("enabled") else 4
        offload = zero.get("offload_optimizer")  # to the CPU: a checked ds_config has no section that is switched off
        type_, params = raw["optimizer"]["type"].lower(), raw["optimizer"].get("params", {})
        moments = {"sgd": int(bool(params.get("momentum"))), "adagrad": 1}.get(type_, 2)
        averages = ds_config.recipe is not None and ds_config.recipe.ema_decay > 0
        has_temporaries = (params.get("torch_adam") or type_ == "sgd") and not params.get("fused")
        return cls(
            stage=stage,
            shard_size=1 if stage == 0 else shard_size,
            num_replicas=world_size // shard_size,
            weight_bytes=weight_bytes,
            gradient_bytes=weight_bytes,
            master_bytes=2 if bf16.get("bf16_master_weights_and_grads") else 4,
            state_bytes=moments * (2 if bf16.get("bf16_optimizer_states") else 4) + (4 if averages else 0),
            wire_bytes=_DTYPE_BYTES.get(ds_config.dhen.all_reduce_dtype or "", weight_bytes),
            wire_copy=bool(ds_config.dhen.all_reduce_dtype or offload),
            async_all_reduce=ds_config.dhen.async_all_reduce,
            reduce_bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
            sub_group=int(zero.get("sub_group_size", 1_000_000_000)),
            limits=Limits.of(zero),
            overlap_comm=zero.get("overlap_comm", stage == 3),
            offload_optimizer=float(offload.get("ratio", 1.0)) if offload else 0.0,
            offload_param="offload_param" in zero,
            temporaries="none" if not has_temporaries else "all" if is_gpu else "one",
            accumulates=raw.get("gradient_accumulation_steps", 1) not in (1, "auto"),
        )

    def gradient_bucket(self) -> GradientBucket:
        """The bucket in which gradients of stages 2 and 3 wait to be reduced."""
        return GradientBucket(self.reduce_bucket, is_eager=self.stage == 3)

    @property
    def shares_masters(self) -> bool:
        """Whether the optimizer steps on the weights themselves: always in stage 0; in stage 3, LeanStage3 does so."""
        is_offloaded = self.offload_optimizer or self.offload_param
        return self.stage == 0 or (self.stage == 3 and not is_offloaded and self.weight_bytes == self.master_bytes)
