"""Set-ups that DeepSpeed 0.19 accepts but then trains wrongly, or fails on with an unhelpful message."""

import json
from collections.abc import Iterator
from typing import Any

from deepspeed.ops.adam import DeepSpeedCPUAdam

from dhen.config.deepspeed_sections import ZERO
from dhen.config.dhen_section import DhenSection
from dhen.config.hybrid_sharding import reasons_against
from dhen.model.names import quoted


def known_faults(raw: dict[str, Any], section: DhenSection, optimizer: type, *, averages: bool) -> Iterator[str]:
    """The faults of a ds_config that DeepSpeed's parser accepts, as messages that start with the key.

    raw: DeepSpeed's part of the ds_config. optimizer: the class that its section names. averages: the recipe asks for a
    moving average of the weights.
    """
    zero = raw.get(ZERO, {})
    stage, is_cpu_adam = zero.get("stage", 0), optimizer is DeepSpeedCPUAdam
    yield from _of_precision(raw, stage)
    bf16, is_offloaded = raw.get("bf16", {}), "offload_optimizer" in zero
    is_right = is_cpu_adam if is_offloaded else bf16.get("bf16_optimizer_states")
    if bf16.get("bf16_master_weights_and_grads") and not is_right:
        yield (
            "bf16.bf16_master_weights_and_grads needs bf16_optimizer_states and no offload_optimizer, or "
            "offload_optimizer with DeepSpeedCPUAdam, which is the optimizer without torch_adam and fused."
        )
    if bf16.get("bf16_master_weights_and_grads") and averages:  # bf16 loses the small steps of an average
        yield "bf16.bf16_master_weights_and_grads leaves ema_decay no fp32 weights. Remove it, or set ema_decay to 0."
    ratio = zero.get("offload_optimizer", {}).get("ratio", 1)
    if not 0 < ratio <= 1:
        yield f"zero_optimization.offload_optimizer.ratio is {quoted(ratio)}. Use a share above 0, up to 1."
    if ratio != 1 and (stage != 3 or not is_cpu_adam):
        yield (
            "zero_optimization.offload_optimizer.ratio needs ZeRO stage 3 and DeepSpeedCPUAdam. Remove ratio, or use "
            "stage 3, without torch_adam and fused in optimizer.params."
        )
    yield from _of_hybrid_sharding(raw, section)
    yield from _of_table_groups(section)


def _of_precision(raw: dict[str, Any], stage: int) -> Iterator[str]:
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


def _of_table_groups(section: DhenSection) -> Iterator[str]:
    """What replicas of the tables cannot be combined with. Only the job knows whether its ranks can be divided."""
    if section.table_group == "world":
        for key, default in (("table_sync_steps", 1), ("table_sync_dtype", "fp32"), ("table_sync_overlap", False)):
            if getattr(section, key) != default:
                yield (
                    f'dhen.{key} has no effect with dhen.table_group "world", because there are no replicas. Remove '
                    'it, or set dhen.table_group to "node".'
                )
    elif section.exchanges_moves and section.table_optimizer == "adam":
        key = "table_sync_steps" if section.table_sync_steps > 1 else "table_sync_overlap"
        yield (
            f"dhen.{key} is {json.dumps(getattr(section, key))}, but the moves of Adam's replicas do not add up, "
            "because its averages shrink in each of them. Leave it out, or set dhen.table_optimizer to "
            '"rowwise_adagrad", "adagrad" or "sgd".'
        )
    elif not section.exchanges_moves and section.table_sync_dtype != "fp32":
        yield (
            f"dhen.table_sync_dtype is {section.table_sync_dtype!r}, which has no effect with dhen.table_sync_steps 1, "
            'where replicas add up exact gradients. Use more steps, dhen.table_sync_overlap, or "fp32".'
        )


def _of_hybrid_sharding(raw: dict[str, Any], section: DhenSection) -> Iterator[str]:
    """What hybrid sharding cannot be combined with. Whether the ranks can be divided is only known in the job."""
    if section.shard_group == "world":
        for key, default in (("all_reduce_dtype", None), ("async_all_reduce", True)):
            if getattr(section, key) != default:
                yield (
                    f'dhen.{key} has no effect with dhen.shard_group "world", because there are no replicas. Remove '
                    'it, or set dhen.shard_group to "node".'
                )
        return
    for reason in reasons_against(raw):
        yield f'{reason} Or set dhen.shard_group to "world".'
