"""Set-ups that DeepSpeed 0.19 accepts and then trains wrongly, or fails on with a message that doesn't help."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepspeed.ops.op_builder import AsyncIOBuilder

from dhen.config.dhen_section import DhenSection

_FP32 = ("fp32", "float32", "float", "torch.float32")


def known_faults(raw: dict[str, Any], section: DhenSection) -> Iterator[str]:
    """What is wrong with a ds_config that DeepSpeed's parser accepted, each fault in words that start with its key.

    raw: DeepSpeed's part.
    """
    stage = int(raw.get("zero_optimization", {}).get("stage", 0))
    yield from _of_precision(raw, stage)
    if raw.get("scheduler"):
        yield "scheduler: the schedule is the recipe's (lr_scheduler_type), so that the tables follow it."
    yield from _of_zero(raw.get("zero_optimization", {}))
    yield from _of_hybrid_sharding(raw, stage, section)


def _of_precision(raw: dict[str, Any], stage: int) -> Iterator[str]:
    if raw.get("fp16", {}).get("enabled"):
        yield (
            "fp16 is not supported: the tables are updated inside the backward, so a step that overflows can't be "
            "taken back. Use bf16 (ZeRO 1 to 3) or torch_autocast with bfloat16."
        )
    autocast = raw.get("torch_autocast", {})
    if autocast.get("enabled") and autocast.get("dtype") != "bfloat16":
        yield (
            f'torch_autocast.dtype is {autocast.get("dtype")!r}; only "bfloat16" is supported. float16 needs a loss '
            "scale, and the tables would be updated with scaled gradients."
        )
    if raw.get("bf16", {}).get("enabled") and stage == 0:
        yield (
            "bf16 under ZeRO stage 0 takes a step with zero gradients at start (DeepSpeed 0.19). Use torch_autocast "
            "with bfloat16, or stage 1."
        )
    asked = raw.get("communication_data_type")
    if asked == "fp16":
        yield (
            "communication_data_type is 'fp16', in which a sum of gradients beyond 65504 becomes inf, and the loss "
            "stands still. Use 'bf16', which has the range of fp32 at the same size."
        )
    elif asked and stage and autocast.get("enabled"):
        yield (
            f"communication_data_type is {asked!r}, which DeepSpeed 0.19 ignores under torch_autocast at ZeRO stages 1 "
            "to 3: gradients travel there in the autocast's dtype for lower_precision_safe_modules, and in fp32 for "
            "others. Remove it."
        )


def _of_zero(zero: dict[str, Any]) -> Iterator[str]:
    for key in ("zero_quantized_weights", "zero_quantized_gradients", "zero_hpz_partition_size", "mics_shard_size"):
        if zero.get(key, 0) not in (0, 1, False, -1):
            yield f"zero_optimization.{key} is not supported here."
    for key in ("offload_optimizer", "offload_param"):
        offload = zero.get(key) or {}
        if offload.get("device") != "nvme":
            continue
        path = offload.get("nvme_path")
        if not path or not Path(path).is_dir():
            yield f"zero_optimization.{key}.nvme_path is {path!r}, which is no folder. Name one on the NVMe drive."
        elif not AsyncIOBuilder().is_compatible(verbose=False):
            yield (
                f'zero_optimization.{key}.device is "nvme", for which DeepSpeed compiles against libaio, and that '
                'isn\'t here. Install its headers (Debian: libaio-dev), or use "cpu".'
            )


def _of_hybrid_sharding(raw: dict[str, Any], stage: int, section: DhenSection) -> Iterator[str]:
    """What hybrid sharding can't be combined with. Whether the ranks can be divided is known only in the job."""
    zero = raw.get("zero_optimization", {})
    if section.shard_group == "world":
        for key, default in (("all_reduce_dtype", None), ("async_all_reduce", True)):
            if getattr(section, key) != default:
                yield (
                    f'dhen.{key} has no effect with dhen.shard_group "world", where nothing is replicated. Remove it, '
                    'or set dhen.shard_group to "node".'
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
            "dhen.shard_group under bf16 and stage 1 with data_types.grad_accum_dtype fp32: DeepSpeed 0.19 has another "
            "optimizer there, which reduces over all ranks. Use stage 2, or leave grad_accum_dtype out."
        )
    for key in ("contiguous_gradients", "reduce_scatter"):
        if zero.get(key) is False:
            yield f"zero_optimization.{key} is false, which dhen.shard_group can't have. Remove it."
