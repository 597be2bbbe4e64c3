"""Every setting of DeepSpeed 0.19's config: the values that train as they should, or why it is refused.

`SETTINGS` has each top-level key, and each key of the sections that work. The tests walk the installed DeepSpeed, and
fail if it reads a key that is not here. They train with every setting that works, and compare the losses with torch's.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import deepspeed
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dhen.model.names import check_names, quoted, unknown_name

AUTO = "auto"
ZERO = "zero_optimization"


class Works(NamedTuple):
    """A setting that works. values: a type, a range of whole numbers, or the strings allowed.

    stages: the ZeRO stages at which it has an effect.
    """

    values: type | range | tuple[str, ...]
    stages: str = "0123"


_COUNT = range(1, 2**63)
_BUCKET = range(1, 2**31)  # elements of a buffer on every rank: 8 GiB in fp32 are beyond any use
_UNSUPPORTED = "is not supported. Remove it."
_REMOVED = "was removed from DeepSpeed. Remove it."
_NOTHING = "has no effect in DeepSpeed 0.19. Remove it."
_CHECKPOINT = "is not supported: this project saves its checkpoints and models itself. Remove it."
_NVME = 'is for offload to NVMe, which this project has not trained with. Remove it, and use "device": "cpu".'
_SETTINGS: dict[str, dict[Works | str, str]] = {
    "": {
        Works(_COUNT): "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps",
        Works(float): "gradient_clipping",
        Works(bool): "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer wall_clock_breakdown",
        Works(("bf16", "fp32", "fp16")): "communication_data_type",
        Works(dict): f"optimizer bf16 torch_autocast data_types {ZERO}",
        "is not supported: the tables follow the recipe's schedule, too. Use lr_scheduler_type.": "scheduler",
        "is not supported: tables are updated during the backward, so a step that overflows cannot be undone. Remove "
        "it, and use bf16 (ZeRO stages 1 to 3) or torch_autocast with bfloat16.": "fp16",
        "is not supported. Use bf16 or torch_autocast.": "bfloat16 amp",
        "is not supported: it would scale the dense part's gradients, but not the tables'. Remove it.": (
            "gradient_allreduce_op prescale_gradients gradient_predivide_factor"
        ),
        "has no effect in DeepSpeed 0.19. Use dhen.activation_checkpointing.": "activation_checkpointing",
        'is DeepCompile, which is not supported. Use dhen.compile "layers".': "compile",
        "is not supported. Use the recipe's dataloader_drop_last.": "dataloader_drop_last",
        "is not supported: this project loads the data itself. Remove it.": "data_efficiency curriculum_learning",
        "is not supported: DeepSpeed's own log is off. Remove it; logging_steps sets how often a run prints a line.": (
            "steps_per_print log_level dump_state memory_breakdown comms_logger timers"
        ),
        "is not supported. Use torch.profiler.": "flops_profiler",
        "is not supported: this project reports its numbers itself. Remove it, and use --report_to.": (
            "tensorboard csv_monitor wandb comet"
        ),
        "is not supported: a model is parallel in its tables and, by ZeRO, in its dense part. Remove it.": (
            "tensor_parallel expert_parallel use_data_before_expert_parallelism seq_parallel_communication_data_type "
            "pipeline"
        ),
        "is not supported. Use --ds_config auto, or tools/plan.py.": "autotuning",
        _NVME: "aio",
        _NOTHING: "disable_allgather vocabulary_size",
        _UNSUPPORTED: "managed_gradient_accumulation disable_python_gc hybrid_engine weight_quantization",
        _CHECKPOINT: "checkpoint datastates_ckpt nebula",
        _REMOVED: "sparse_gradients sparse_attention compression_training quantize_training eigenvalue elasticity "
        "graph_harvesting progressive_layer_drop",
    },
    "optimizer": {
        Works(str): "type",
        Works(dict): "params",
        _UNSUPPORTED: "legacy_fusion",
    },
    "bf16": {
        Works(bool): "enabled bf16_master_weights_and_grads bf16_optimizer_states",
        "false lets a gradient that is not finite reach the weights unnoticed. Remove it.": "check_grad_overflow",
        _NOTHING: "immediate_grad_update",
    },
    "torch_autocast": {
        Works(bool): "enabled",
        Works(str): "dtype",
        _UNSUPPORTED: "lower_precision_safe_modules",
    },
    "data_types": {
        Works(("fp32",)): "grad_accum_dtype",
        _UNSUPPORTED: "param_dtype buffer_dtype keep_in_fp32_modules",
    },
    ZERO: {
        Works(range(4)): "stage",
        Works(bool, "123"): "contiguous_gradients reduce_scatter overlap_comm",
        Works(bool, "12"): "use_multi_rank_bucket_allreduce round_robin_gradients parameter_alignment",
        Works(bool, "3"): "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential memory_efficient_linear",
        Works(_BUCKET, "123"): "reduce_bucket_size",
        Works(range(2, 2**31, 2), "12"): "allgather_bucket_size",
        Works(_COUNT, "3"): "sub_group_size",
        Works(range(2**63), "3"): "stage3_prefetch_bucket_size stage3_param_persistence_threshold "
        "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance",
        Works(dict, "3"): "offload_param",
        Works(dict, "123"): "offload_optimizer",
        'is not supported. Use offload_optimizer or offload_param with "device": "cpu".': "zenflow cpu_offload "
        "cpu_offload_param cpu_offload_use_pin_memory",
        "is not supported. Use stage3_prefetch_bucket_size.": "stage3_module_granularity_threshold leaf_module",
        _UNSUPPORTED: "compute_grad_norm ignore_unused_parameters log_trace_cache_warnings enable_sanity_checks "
        "legacy_stage1 save_muon_momentum_buffer_in_memory",
        "is not supported. Use communication_data_type.": "zero_quantized_weights zero_quantized_nontrainable_weights "
        "zero_quantized_gradients zeropp_loco_param",
        'is not supported. Use dhen.shard_group "node".': "zero_hpz_partition_size mics_shard_size "
        "mics_hierarchical_params_gather",
        _CHECKPOINT: "load_from_fp32_weights elastic_checkpoint pipeline_loading_checkpoint "
        "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save",
        _NOTHING: "allgather_partitions override_module_apply",
    },
    f"{ZERO}.offload_param": {
        Works(("cpu", "none")): "device",
        Works(bool): "pin_memory",
        _NVME: "nvme_path buffer_count buffer_size max_in_cpu",
    },
    f"{ZERO}.offload_optimizer": {
        Works(("cpu", "none")): "device",
        Works(bool): "pin_memory",
        Works(float): "ratio",
        _UNSUPPORTED: "super_offload cpuadam_cores_perc",
        _NVME: "nvme_path buffer_count pipeline_read pipeline_write fast_init",
    },
}
"""The keys of each section, top-level ones first, by the values that work, or by the reason why they are refused."""
SETTINGS: dict[str, Works | str] = {
    f"{section}.{key}".lstrip("."): setting
    for section, settings in _SETTINGS.items()
    for setting, keys in settings.items()
    for key in keys.split()
}
"""By dotted key."""
_SWITCHES = {"bf16": "enabled", "torch_autocast": "enabled"}
_SWITCHES |= {f"{ZERO}.offload_param": "device", f"{ZERO}.offload_optimizer": "device"}
"""Sections that do nothing until this key of theirs is set."""


def accepted(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """DeepSpeed's part of a ds_config, without keys that are null and sections that are switched off.

    Whole numbers become ints, even if they are written as 5e8. Raises ValueError about a key that is unknown or
    refused, or has a value of another type or out of range. prefix: of the section's keys.
    """
    result = {}
    for name, value in section.items():
        key = prefix + name
        setting = SETTINGS.get(key)
        if value is None:
            continue
        if key in _SWITCHES and isinstance(value, dict) and _is_off(key, value):
            check_names(
                f"key in {key}:", value, [one.rpartition(".")[2] for one in SETTINGS if one.startswith(f"{key}.")]
            )
            continue
        if setting is None:
            places = [other.rpartition(".") for other, works in SETTINGS.items() if isinstance(works, Works)]
            names = [last for before, _, last in places if before == prefix[:-1]]
            where = f"{prefix[:-1]}: " if prefix else ""
            raise ValueError(where + unknown_name("key", name, names if prefix else [*names, "dhen"]))
        if isinstance(setting, Works):
            result[name] = _checked(key, value, setting.values)
        elif not _is_off(key, value):
            raise ValueError(f"{key} {setting}")
    switch = _SWITCHES.get(prefix[:-1])
    if switch and switch not in result:
        raise ValueError(f"{prefix}{switch} is missing, so {prefix[:-1]} would do nothing. Add it, or remove both.")
    return result


def without_effect(raw: Mapping[str, Any]) -> Iterator[str]:
    """The keys of zero_optimization that do nothing at its stage, as sentences. Removes "auto": it asks for nothing."""
    zero = raw.get(ZERO, {})
    stage = zero.get("stage", 0)
    for name, value in list(zero.items()):
        key = f"{ZERO}.{name}"
        stages = SETTINGS[key].stages
        if str(stage) in stages or _is_default(key, value):
            continue
        if zero.pop(name) != AUTO:
            yield (
                f"{key} has no effect at ZeRO stage {stage}, only at {', '.join(stages)}. Remove it, or change "
                "zero_optimization.stage. In by_depth, null removes a key."
            )


def _checked(key: str, value: Any, values: type | range | tuple[str, ...]) -> Any:
    """The value, if it is one of `values`."""
    if value == AUTO:
        return value  # resolved, or refused, later
    kind = bool if isinstance(value, bool) else float if isinstance(value, int | float) else type(value)
    if isinstance(values, range):
        if kind is float and value == int(value) and int(value) in values:
            return int(value)
        allowed = f"a{' whole' if values.step == 1 else 'n even'} number from {values[0]:,} to {values[-1]:,}"
    elif isinstance(values, tuple):
        if value in values:
            return value
        allowed = " or ".join(f'"{one}"' for one in values)
    else:
        if kind is dict and values is dict:
            # Params depend on the type: see optimizer_section.py.
            is_open = key == "optimizer.params"
            return {k: v for k, v in value.items() if v is not None} if is_open else accepted(value, f"{key}.")
        if kind is values:
            return value
        allowed = {dict: "an object, such as {}", bool: "true or false", float: "a number", str: "a text"}[values]
    raise ValueError(f"{key} is {quoted(value)}. Use {allowed}.")


def _is_off(key: str, value: Any) -> bool:
    """Whether a setting asks for nothing: DeepSpeed's default, or a section that is off, or has nothing switched on."""
    if not isinstance(value, dict):
        return _is_default(key, value)
    if _SWITCHES.get(key) == "device":
        return value.get("device") == "none"
    is_idle = bool(value) and all(not one or _is_off("", one) for one in value.values())
    return value.get("enabled") is False or (key not in _SWITCHES and is_idle)


def _is_default(key: str, value: Any) -> bool:
    default = _defaults().get(key)
    default = False if default is None else default
    return isinstance(value, bool) == isinstance(default, bool) and value == default


@functools.cache
def _defaults() -> dict[str, Any]:
    """DeepSpeed's defaults of top-level keys, except sections, and of the keys of zero_optimization."""
    zero = {f"{ZERO}.{field.alias or key}": field.default for key, field in DeepSpeedZeroConfig.model_fields.items()}
    top = vars(deepspeed.DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1}))
    return top | zero | {"bf16.check_grad_overflow": True}
