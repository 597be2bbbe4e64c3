"""The names that a ds_config may use, taken from the installed DeepSpeed: keys, keys of sections, optimizer params.

In some places DeepSpeed silently ignores an unknown name; in others it rejects it without saying where it is.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args

import deepspeed
import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import BaseModel, ValidationError

from dhen.model.names import check_names, unknown_name

_READ_KEY_BY_KEY = (
    *("aio", "autotuning", "checkpoint", "data_efficiency", "data_types", "flops_profiler", "timers"),
    "torch_autocast",
)
"""Sections whose unknown keys the parser ignores. All others are pydantic models, which reject unknown keys."""
_OPTIMIZER = ("type", "params", "legacy_fusion")
_OF_ADAM = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}
"""Keys that DeepSpeed removes from params before it creates an Adam optimizer."""
_GIVEN = {"self", "params", "model_params", "adamw_mode", "max_grad_norm"}
"""Arguments of optimizers that the user does not set. DeepSpeed sets max_grad_norm to its gradient_clipping."""


class _Recorder(dict):
    """A config that records which of its keys the parser asks for.

    DeepSpeed lists its keys nowhere: its constants lack 27 of the 60 top-level ones and mix in keys of sections.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> "_Recorder":  # parts of the parser check `key in config.keys()`
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Recorder":
        return self


@functools.cache
def top_level_keys() -> frozenset[str]:
    """The top-level keys that DeepSpeed's parser reads."""
    recorder = _Recorder({"train_micro_batch_size_per_gpu": 1})
    deepspeed.DeepSpeedConfig(recorder)
    return frozenset(recorder.asked)


@functools.cache
def _keys_of(section: str) -> frozenset[str]:
    recorder = _Recorder({})
    deepspeed.DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, section: recorder})
    return frozenset(recorder.asked)


def check_sections(raw: dict[str, Any]) -> None:
    """Raise ValueError about a key that DeepSpeed would silently ignore, or reject only after everything is built."""
    for section in _READ_KEY_BY_KEY:
        if isinstance(raw.get(section), dict):
            check_names(f"key in {section}:", raw[section], _keys_of(section))
    optimizer = raw["optimizer"]
    check_names("key in optimizer:", optimizer, _OPTIMIZER)
    zero, params = raw.get("zero_optimization", {}), optimizer.get("params", {})
    for name, section in (("zero_optimization", zero), ("optimizer.params", params)):
        if not isinstance(section, dict):
            raise ValueError(f"{name} is {section!r}. Use an object, such as {{}}.")
    offload = zero.get("offload_optimizer")
    is_offloaded = isinstance(offload, dict) and offload.get("device", "none") != "none"
    known = _params_of(str(optimizer["type"]), is_offloaded, bool(params.get("torch_adam")))
    if "max_grad_norm" in params:
        raise ValueError("optimizer.params.max_grad_norm: the recipe sets clipping (max_grad_norm). Remove it here.")
    if known is not None:
        check_names(f"key in optimizer.params for {optimizer['type']}:", params, known)


def _params_of(name: str, is_offloaded: bool, is_torch_adam: bool) -> set[str] | None:
    """The optimizer's params; None if its package is not installed. Raises ValueError for an unknown optimizer."""
    kind = name.lower() if name.lower() in DEEPSPEED_OPTIMIZERS else name
    if kind in ("muadam", "muadamw", "musgd"):
        return None
    if kind == "muon":
        engine = deepspeed.DeepSpeedEngine
        return {*engine._MUON_HALF_KEYS, *engine._ADAM_HALF_KEYS, "muon_lr", "adam_lr", *_OF_ADAM}
    arguments = set(inspect.signature(_optimizer(kind, is_offloaded, is_torch_adam)).parameters) - _GIVEN
    return arguments | _OF_ADAM if kind in ("adam", "adamw") else arguments


def _optimizer(kind: str, is_offloaded: bool, is_torch_adam: bool) -> Callable[..., Any]:
    """The class that the engine uses (see DeepSpeedEngine._configure_basic_optimizer)."""
    from deepspeed.ops import adagrad, adam, lamb, lion

    of_torch = {
        n: c for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)
    }
    if kind in ("adam", "adamw"):
        if is_torch_adam:
            return of_torch["AdamW" if kind == "adamw" else "Adam"]
        return adam.DeepSpeedCPUAdam if is_offloaded else adam.FusedAdam
    if kind == "adagrad":
        return adagrad.DeepSpeedCPUAdagrad if is_offloaded else of_torch["Adagrad"]
    if kind == "lamb":
        return lamb.FusedLamb
    if kind == "lion":
        return lion.DeepSpeedCPULion if is_offloaded else lion.FusedLion
    if kind not in of_torch:
        raise ValueError(unknown_name("optimizer.type", kind, {*of_torch, "Lamb", "Lion", "Muon"} - {"Optimizer"}))
    return of_torch[kind]


def refusal(error: ValidationError, raw: dict[str, Any]) -> str:
    """Turn an error of DeepSpeed's pydantic models into a message that names section, key and closest known key."""
    first = error.errors()[0]
    if not first["loc"]:  # an error about a section as a whole
        return f"{error.title}: {first['msg']} (reported by DeepSpeed)."
    model, path = _model(error.title), [str(step) for step in first["loc"]]
    section = next((key for key, values in raw.items() if key != path[0] and _holds(values, path)), None)
    for step in path[:-1]:
        model = _model_within(model, step)
    key = ".".join([section, *path] if section else path)
    if first["type"] == "extra_forbidden" and model is not None:
        names = {field.alias or name for name, field in model.model_fields.items()}
        return f"{key.rpartition('.')[0]}: {unknown_name('key', path[-1], names)}"
    return f"{key} is {first.get('input')!r}: {first['msg']} (reported by DeepSpeed)."


def _holds(values: Any, path: list[str]) -> bool:
    for step in path:
        if not isinstance(values, dict) or step not in values:
            return False
        values = values[step]
    return True


def _model(name: str) -> type[BaseModel] | None:
    return next((model for model in DeepSpeedConfigModel.__subclasses__() if model.__name__ == name), None)


def _model_within(model: type[BaseModel] | None, key: str) -> type[BaseModel] | None:
    """The pydantic model of a field, by name or alias."""
    fields = model.model_fields.items() if model else ()
    kind = next((field.annotation for name, field in fields if key in (name, field.alias)), None)
    options = [kind, *get_args(kind)]
    return next((one for one in options if inspect.isclass(one) and issubclass(one, BaseModel)), None)
