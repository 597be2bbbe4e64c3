"""The "optimizer" section of a ds_config: the optimizers that this project trains with, and their params."""

import inspect
import json
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from dhen.config.deepspeed_sections import ZERO
from dhen.model.names import check_names, quoted, unknown_name

OPTIMIZERS = ("Adam", "AdamW", "SGD", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop")
"""They work on each weight alone, so that a shard trains like the whole. See `_class_of`."""
_GIVEN = {
    *("params", "model_params", "adamw_mode", "fp32_optimizer_states"),  # DeepSpeed sets them
    *("maximize", "capturable", "differentiable", "set_grad_none"),
}
"""Arguments of optimizers that the user does not set."""
_LARGEST = 1e18
"""Beyond it, squares leave the range of float32."""


def check_optimizer(raw: dict[str, Any]) -> type:
    """The optimizer's class. Raises ValueError about what it would refuse, or what DeepSpeed would silently ignore.

    raw: DeepSpeed's part of the ds_config.
    """
    zero, name, params = raw.get(ZERO, {}), raw["optimizer"]["type"], raw["optimizer"]["params"]
    kind = {one.lower(): one for one in OPTIMIZERS if one.lower() in DEEPSPEED_OPTIMIZERS}.get(name.lower(), name)
    if kind not in OPTIMIZERS:
        raise ValueError(unknown_name("or unsupported optimizer.type", name, OPTIMIZERS))
    made = _class_of(kind, params, "offload_optimizer" in zero)
    arguments = inspect.signature(made).parameters
    known = arguments.keys() - _GIVEN | ({"torch_adam", "adam_w_mode"} if kind in ("Adam", "AdamW") else set())
    if not made.__module__.startswith("torch."):
        known -= {"amsgrad"}  # DeepSpeed's own raise on it
    if "max_grad_norm" in params:
        raise ValueError("optimizer.params.max_grad_norm: the recipe sets clipping (max_grad_norm). Remove it here.")
    check_names(f"key in optimizer.params for {name}:", params, known)
    for key, value in params.items():
        default = arguments[key].default if key in arguments else True
        default = True if default is None else default  # foreach and fused
        if isinstance(value, int | float) and not abs(value) <= _LARGEST:
            raise ValueError(f"optimizer.params.{key} is {quoted(value)}. Use a number up to {_LARGEST:g}.")
        if not _has_type_of(default, value):
            raise ValueError(f"optimizer.params.{key} is {quoted(value)}. Use a value like {json.dumps(default)}.")
    if kind == "AdamW" and params.get("adam_w_mode") is False:
        raise ValueError('optimizer.params.adam_w_mode is false, but optimizer.type is AdamW. Use "type": "Adam".')
    is_allowed = made in ZERO_SUPPORTED_OPTIMIZERS or raw.get("zero_allow_untested_optimizer")
    if zero.get("stage") and not is_allowed:
        raise ValueError(f"optimizer.type is {name}. With it, ZeRO needs zero_allow_untested_optimizer: true.")
    if made.__module__.startswith("torch."):
        _try(made, {key: value for key, value in params.items() if key in arguments})
    return made


def _class_of(kind: str, params: dict[str, Any], is_offloaded: bool) -> type:
    """The class that the engine uses (see DeepSpeedEngine._configure_basic_optimizer)."""
    if kind == "Adagrad" and is_offloaded:
        raise ValueError("optimizer.type is Adagrad, which this project has not trained with offload. Use AdamW.")
    if kind not in ("Adam", "AdamW") or params.get("torch_adam"):
        is_coupled = kind == "Adam" and params.get("adam_w_mode") is False
        return torch.optim.Adam if is_coupled else getattr(torch.optim, "AdamW" if kind == "Adam" else kind)
    return DeepSpeedCPUAdam if is_offloaded else FusedAdam


def _has_type_of(default: Any, value: Any) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, list) and len(value) == len(default) and all(_has_type_of(0.0, one) for one in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _try(made: type[torch.optim.Optimizer], params: dict[str, Any]) -> None:
    """Take a step with a weight of one number. Raises ValueError with what torch says against the params."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    try:
        optimizer = made([weight], **params)
        for _ in range(3):
            optimizer.step()
        problem = "" if weight.isfinite().all() else "a step with a gradient of 1 gives a weight that is not finite"
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        problem = str(error)
    if problem:
        raise ValueError(f"optimizer.params for {made.__name__}: {problem[:200]}. Correct it, or leave it out.")
