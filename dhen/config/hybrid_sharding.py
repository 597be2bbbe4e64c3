"""Settings of DeepSpeed 0.19 that hybrid sharding (paper 3.2.2) cannot be combined with."""

from collections.abc import Iterator
from typing import Any

_ZERO_PLUS_PLUS = "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients"


def reasons_against(config: dict[str, Any]) -> Iterator[str]:
    """What in DeepSpeed's `config` hybrid shards do not support, as messages that start with the key."""
    zero = config.get("zero_optimization", {})
    stage, offload = zero.get("stage", 0), zero.get("offload_optimizer") or {}
    if stage == 0:
        yield "zero_optimization.stage is 0, which shards nothing. Use stage 1, 2 or 3."
    autocast = config.get("torch_autocast", {})
    for key, is_fp16 in (("fp16", True), ("torch_autocast", autocast.get("dtype") == "float16")):
        if config.get(key, {}).get("enabled") and is_fp16:
            yield f"{key}.enabled is not supported with fp16: loss scaling has not been tested with replicas. Use bf16."
    sums_in_fp32 = config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    if stage == 1 and config.get("bf16", {}).get("enabled") and sums_in_fp32 and offload.get("device") != "cpu":
        yield (
            "data_types.grad_accum_dtype is fp32, which is not supported with bf16 and ZeRO stage 1: DeepSpeed 0.19 "
            "then uses another optimizer, which reduces over all ranks. Use stage 2, or remove grad_accum_dtype."
        )
    for key in ("contiguous_gradients", "reduce_scatter"):
        if zero.get(key) is False:
            yield f"zero_optimization.{key} is false, which hybrid sharding does not support. Remove it."
    if zero.get("zero_hpz_partition_size", 1) > 1:
        yield "zero_optimization.zero_hpz_partition_size is another way to shard within a node. Remove it."
    for key in _ZERO_PLUS_PLUS.split():
        if zero.get(key):
            yield f"zero_optimization.{key} is not supported. Remove it, and set communication_data_type instead."
    if zero.get("zenflow") or offload.get("super_offload"):
        yield "zero_optimization: ZenFlow and SuperOffload are not supported. Remove zenflow and super_offload."
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device") == "nvme":
            yield f'zero_optimization.{key} to NVMe is not supported. Use "device": "cpu".'
    if config.get("managed_gradient_accumulation") is False:
        yield "managed_gradient_accumulation is false, so no backward knows that it is the last. Remove it."
    if config.get("compile", {}).get("deepcompile"):
        yield "compile.deepcompile is not supported: it replaces ZeRO's reductions. Remove it."
    if "muon" in config.get("optimizer", {}).get("type", "").lower():
        yield "optimizer.type is Muon, which needs full gradients. Use another optimizer."
