"""Set-ups that DeepSpeed 0.19 accepts but then trains wrongly, or fails on with an unhelpful message."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepspeed.ops.op_builder import AsyncIOBuilder

from dhen.config.dhen_section import DhenSection

_FP32 = ("fp32", "float32", "float", "torch.float32")


def known_faults(raw: dict[str, Any], section: DhenSection) -> Iterator[str]:
    """The faults of a ds_config that DeepSpeed's parser accepts, as messages that start with the key.

    raw: DeepSpeed's part of the ds_config.
    """
    stage = int(raw.get("zero_optimization", {}).get("stage", 0))
    yield from _of_precision(raw, stage, raw.get("zero_optimization", {}))
    if raw.get("scheduler"):
        yield (
            "scheduler is not supported: the recipe sets the schedule, so that the tables follow it, too. Remove it, "
            "and set lr_scheduler_type in the recipe."
        )
    yield from _of_zero(raw.get("zero_optimization", {}))
    yield from _of_hybrid_sharding(raw, stage, section)


def _of_precision(raw: dict[str, Any], stage: int, zero: dict[str, Any]) -> Iterator[str]:
    if raw.get("fp16", {}).get("enabled"):
        yield (
            "fp16.enabled is not supported: tables are updated during the backward, so a step that overflows cannot be "
            "undone. Use bf16 (ZeRO stages 1 to 3) or torch_autocast with bfloat16."
        )
    autocast = raw.get("torch_autocast", {})
    if autocast.get("enabled") and autocast.get("dtype") != "bfloat16":
        yield (
            f'torch_autocast.dtype is {autocast.get("dtype")!r}, but only "bfloat16" is supported: float16 needs a '
            "loss scale, so the tables would be updated with scaled gradients."
        )
    if raw.get("bf16", {}).get("enabled") and stage == 0:
        yield (
            "bf16.enabled with ZeRO stage 0 is not supported: DeepSpeed 0.19 starts with an optimizer step on zero "
            "gradients. Use torch_autocast with bfloat16, or stage 1."
        )
    checks = {"bf16.check_grad_overflow": raw.get("bf16", {}), "zero_optimization.compute_grad_norm": zero}
    for key, where in checks.items():
        if where.get(key.split(".")[1]) is False:
            yield f"{key} is false, so a gradient that is not finite would reach the weights unnoticed. Remove it."
    asked = raw.get("communication_data_type")
    if asked == "fp16":
        yield (
            "communication_data_type is 'fp16': a sum of gradients above 65504 becomes inf, and the loss stops "
            "improving. Use 'bf16', which has the range of fp32 and the size of fp16."
        )
    elif asked and stage and autocast.get("enabled"):
        yield (
            f"communication_data_type is {asked!r}, but DeepSpeed 0.19 ignores it with torch_autocast at ZeRO stages 1 "
            "to 3. Gradients of lower_precision_safe_modules are sent in the autocast dtype, and all others in fp32. "
            "Remove communication_data_type."
        )


def _of_zero(zero: dict[str, Any]) -> Iterator[str]:
    for key in ("zero_quantized_weights", "zero_quantized_gradients", "zero_hpz_partition_size", "mics_shard_size"):
        if zero.get(key, 0) not in (0, 1, False, -1):
            yield f"zero_optimization.{key} is {zero[key]!r}, but this project does not support it. Remove it."
    for key in ("offload_optimizer", "offload_param"):
        offload = zero.get(key) or {}
        if offload.get("device") != "nvme":
            continue
        path = offload.get("nvme_path")
        if not path or not Path(path).is_dir():
            yield f"zero_optimization.{key}.nvme_path is {path!r}, not a folder. Use a folder on the NVMe drive."
        elif not AsyncIOBuilder().is_compatible(verbose=False):
            yield (
                f'zero_optimization.{key}.device is "nvme", which needs libaio, but libaio is not installed. Install '
                'its headers (Debian: libaio-dev), or use "cpu".'
            )


def _of_hybrid_sharding(raw: dict[str, Any], stage: int, section: DhenSection) -> Iterator[str]:
    """What hybrid sharding cannot be combined with. Whether the ranks can be divided is only known in the job."""
    zero = raw.get("zero_optimization", {})
    if section.shard_group == "world":
        for key, default in (("all_reduce_dtype", None), ("async_all_reduce", True)):
            if getattr(section, key) != default:
                yield (
                    f'dhen.{key} has no effect with dhen.shard_group "world", because there are no replicas. Remove '
                    'it, or set dhen.shard_group to "node".'
                )
        return
    if stage == 0:
        yield (
            f"dhen.shard_group is {section.shard_group!r}, but zero_optimization.stage is 0, which shards nothing. "
            "Use stage 1, 2 or 3."
        )
    sums_in_fp32 = raw.get("data_types", {}).get("grad_accum_dtype") in _FP32
    is_on_device = (zero.get("offload_optimizer") or {}).get("device") != "cpu"
    if stage == 1 and raw.get("bf16", {}).get("enabled") and sums_in_fp32 and is_on_device:
        yield (
            "data_types.grad_accum_dtype is fp32, which dhen.shard_group does not support with bf16 and ZeRO stage 1: "
            "DeepSpeed 0.19 then uses another optimizer, which reduces over all ranks. Use stage 2, or remove "
            "grad_accum_dtype."
        )
    for key in ("contiguous_gradients", "reduce_scatter"):
        if zero.get(key) is False:
            yield f"zero_optimization.{key} is false, which dhen.shard_group does not support. Remove it."
