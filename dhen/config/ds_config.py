"""Reads a ds_config: DeepSpeed's own keys, checked by DeepSpeed's parser, and our section "dhen".

DeepSpeed ignores unknown top-level keys and does not resolve "auto", so this file does both. What the recipe decides
(batch size, learning rate, clipping) is "auto" in the JSON; a number there must match the recipe. What follows from the
model (sizes of buckets and of prefetching) may be "auto", too, and stays so until the model is known.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
from pydantic import ValidationError

from dhen.config.deepspeed_sections import AUTO, ZERO, accepted, without_effect
from dhen.config.dhen_section import DhenSection, PlacementSection, TableOptimizer, WireSection
from dhen.config.known_faults import known_faults
from dhen.config.optimizer_section import check_optimizer
from dhen.config.training_arguments import TrainingArguments
from dhen.config.zero_sizes import SIZE_KEYS, with_sizes
from dhen.model.names import first_mistake, quoted, unique_keys
from dhen.paths import find, looked_in

SECTION = "dhen"
_RUNGS = "by_depth"
_PARAMS = "optimizer.params."
_SIZES = [f"{ZERO}.{key}" for key in SIZE_KEYS]
_LONGEST = 480


class DsConfigError(ValueError):
    """A ds_config cannot be used. The message, one line, names the file and the key."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…")


@dataclass(frozen=True)
class Recipe:
    """What decides the values that a ds_config may leave "auto".

    training: the batch size is None if it depends on data that is not known yet. The ds_config must not set it then.
    """

    training: TrainingArguments
    world_size: int

    def values(self) -> dict[str, Any]:
        """The value of each key that may be "auto"."""
        training = self.training
        per_rank, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
        return {
            "train_micro_batch_size_per_gpu": per_rank,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": per_rank * accumulation * self.world_size,
            "gradient_clipping": training.max_grad_norm,
            "optimizer.params.lr": training.learning_rate,
            "optimizer.params.weight_decay": training.weight_decay,
            "optimizer.params.betas": [training.adam_beta1, training.adam_beta2],
            "optimizer.params.eps": training.adam_epsilon,
        }


@dataclass(frozen=True)
class DsConfig:
    """A checked ds_config. deepspeed: the config for deepspeed.initialize. dhen: our section. path: its file.

    recipe: the arguments that it was checked with.
    """

    path: str
    deepspeed: dict[str, Any]
    dhen: DhenSection
    rung: str = ""
    """The entry of by_depth that applies, or the planner's choice, with the reason, as text."""
    recipe: TrainingArguments | None = None

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the dense part, 0 to 3."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    def in_short(self) -> str:
        """What it resolved to, as text: the optimizer, ZeRO's stage, the precision, and our section's own choices."""
        precision = [key for key in ("bf16", "torch_autocast") if key in self.deepspeed] or ["fp32"]
        own = json.dumps(self.dhen.model_dump(exclude_defaults=True))
        return f"{self.deepspeed['optimizer']['type']}, ZeRO stage {self.zero_stage}, {precision[0]}, {SECTION} {own}"

    def sized(self, weights: Mapping[str, int]) -> "DsConfig":
        """This ds_config with its "auto" sizes resolved. weights: elements by name, of the dense part."""
        return replace(self, deepspeed=with_sizes(self.deepspeed, weights))

    def as_dict(self) -> dict[str, Any]:
        """The whole config, for the run folder. Every "auto" is resolved if `sized` has been called."""
        return self.deepspeed | {SECTION: self.dhen.model_dump()}


def read_ds_config(path: str | Path, recipe: Recipe, num_layers: int = 1) -> DsConfig:
    """Read, check and resolve the ds_config at `path`. Raises DsConfigError, which names the file and the key.

    num_layers: depth of the model, which selects a rung of by_depth. The other rungs are checked, too.
    """
    return check_ds_config(str(path), read_json(Path(path)), recipe, num_layers)


def read_section(path: str | Path) -> DhenSection:
    """Read only the "dhen" section of the ds_config at `path`, without by_depth. Raises DsConfigError."""
    raw = read_json(Path(path))
    _take_rungs(str(path), raw)
    return _check_section(str(path), raw.get(SECTION, {}), None)


def check_ds_config(path: str, raw: Mapping[str, Any], recipe: Recipe, num_layers: int = 1) -> DsConfig:
    """Like `read_ds_config`, for the contents of a ds_config. Does not modify `raw`. path: its name in messages."""
    raw = merged(dict(raw), {})
    rungs = _take_rungs(path, raw)
    if not rungs:
        return _checked(path, raw, recipe)
    every = [_checked(f"{path}: {_rung_name(i)}", merged(raw, changes), recipe) for i, (_, changes) in enumerate(rungs)]
    index = next((i for i, (most, _) in enumerate(rungs) if most is None or num_layers <= most), None)
    if index is None:
        raise DsConfigError(
            f"{path}: the model has {num_layers} layers, but the last rung of dhen.by_depth has max_layers "
            f"{rungs[-1][0]}. Add a rung for deeper models; a rung without max_layers applies to any depth."
        )
    most, changes = rungs[index]
    size = "any depth" if most is None else f"up to {most} layers"
    rung = f"{_rung_name(index)} ({size}) for {num_layers} layers: {json.dumps(changes)}"
    return replace(every[index], rung=rung, path=path)


def _checked(path: str, raw: dict[str, Any], recipe: Recipe) -> DsConfig:
    training = recipe.training
    section = _check_section(path, raw.pop(SECTION, {}), training.table_optimizer)
    if training.per_device_train_batch_size is None:
        recipe = replace(recipe, training=replace(training, per_device_train_batch_size=1))
        for key in ("train_micro_batch_size_per_gpu", "train_batch_size"):
            if raw.pop(key, None) not in (AUTO, None):
                raise DsConfigError(
                    f"{path}: {key} is set, but per_device_train_batch_size is not, so it would follow the number of "
                    f'training rows. Set --per_device_train_batch_size, or make {key} "auto".'
                )
    try:
        raw = accepted(raw)
        if not isinstance(raw.get("optimizer"), dict) or "type" not in raw["optimizer"]:
            raise ValueError('optimizer is missing. Use {"type": "AdamW", "params": {"lr": "auto"}}.')
        _resolve_auto(raw, recipe.values())
        _add_what_is_missing(raw, recipe.values())
        averages = training.ema_decay > 0
        for fault in (*without_effect(raw), *known_faults(raw, section, check_optimizer(raw), averages=averages)):
            raise ValueError(fault)
    except ValueError as error:
        raise DsConfigError(f"{path}: {error}") from error
    # The parser changes its input, wants numbers for "auto" sizes, and would take the global batch for one rank's.
    parsed = {key: value for key, value in with_sizes(raw, {"": 1}).items() if key != "train_batch_size"}
    try:
        deepspeed.DeepSpeedConfig(copy.deepcopy(parsed))
    except Exception as error:  # plain parsing of a dict, by code of many hands
        raise DsConfigError(f"{path}: DeepSpeed rejects this ds_config: {error}") from error
    return DsConfig(path, raw, section, recipe=training)


def _rung_name(index: int) -> str:
    return f"{SECTION}.{_RUNGS}[{index}]"


def _take_rungs(path: str, raw: dict[str, Any]) -> list[tuple[int | None, dict[str, Any]]]:
    """Remove by_depth from `raw`. Returns max_layers and the changes of each rung."""
    section = raw.get(SECTION)
    rungs = section.pop(_RUNGS, []) if isinstance(section, dict) else []
    if not isinstance(rungs, list) or not all(isinstance(rung, dict) for rung in rungs):
        raise DsConfigError(
            f'{path}: {SECTION}.{_RUNGS} must be a list of objects like {{"max_layers": 8, …changes…}}.'
        )
    taken = [(rung.pop("max_layers", None), rung) for rung in rungs]
    before = 0
    for index, (most, _) in enumerate(taken):
        is_last = index == len(taken) - 1
        if (most is None and not is_last) or (most is not None and (type(most) is not int or most <= before)):
            raise DsConfigError(
                f"{path}: {_rung_name(index)}.max_layers is {json.dumps(most)}. Rungs must be in increasing order of "
                f"max_layers. Use a whole number above {before} here; only the last rung may leave it out."
            )
        before = most or before
    return taken


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of `base`, updated with `changes` recursively. null removes a key."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def read_json(path: Path) -> dict[str, Any]:
    """Read the ds_config at `path` without checking its keys. Raises DsConfigError."""
    path = Path(find(str(path)))
    if not path.is_file():
        near = sorted(other.name for other in Path(find(str(path.parent))).glob("*.json"))
        have = f" Use one of {', '.join(near)}." if near else ""
        raise DsConfigError(f"{path}: no such ds_config.{have}{looked_in(path)}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
        _check_numbers(raw)
    except (ValueError, RecursionError) as error:
        raise DsConfigError(f"{path}: not strict JSON: {error}") from error
    if not isinstance(raw, dict):
        raise DsConfigError(f"{path}: a ds_config must be a JSON object, but this is a {type(raw).__name__}.")
    return raw


def _check_numbers(raw: Any) -> None:
    """Raise ValueError about numbers that are not finite, which Python takes for JSON, and about endless nesting."""
    values: list[tuple[Any, Any]] = [("the value", raw)]
    for _ in range(30):
        inner: list[tuple[Any, Any]] = []
        for key, value in values:
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{quoted(key)} is {value}. Use a finite number")
            if isinstance(value, dict | list):
                inner += value.items() if isinstance(value, dict) else [(key, one) for one in value]
        values = inner
    if values:
        raise ValueError("it is nested more than 30 levels deep")


def _check_section(path: str, section: Any, table_optimizer: TableOptimizer | None) -> DhenSection:
    """table_optimizer: the recipe's, which applies if the section leaves it out or "auto"."""
    try:
        checked = DhenSection.model_validate(section)
    except ValidationError as error:
        inner = {("placement",): PlacementSection, ("all_to_all_dtype",): WireSection}
        known = inner.get(error.errors()[0]["loc"][:-1], DhenSection).model_fields
        raise DsConfigError(f"{path}: {first_mistake(error, SECTION, known=known)}") from error
    asked, default = section.get("table_optimizer", AUTO), DhenSection().table_optimizer
    if asked not in (AUTO, table_optimizer or asked):
        raise DsConfigError(
            f'{path}: {SECTION}.table_optimizer is {asked!r}, but the recipe sets {table_optimizer!r}. Use "auto", or '
            "make them equal."
        )
    return checked.model_copy(update={"table_optimizer": table_optimizer or default}) if asked == AUTO else checked


def _add_what_is_missing(raw: dict[str, Any], values: dict[str, Any]) -> None:
    """Set all values that the recipe decides, so that no default of DeepSpeed or its optimizer applies instead."""
    optimizer = raw["optimizer"]
    params = optimizer.setdefault("params", {})
    for key, value in values.items():
        if not key.startswith(_PARAMS):
            raw.setdefault(key, value)
        elif key.removeprefix(_PARAMS) in ("lr", "weight_decay") or "adam" in optimizer["type"].lower():
            params.setdefault(key.removeprefix(_PARAMS), value)


def _resolve_auto(raw: dict[str, Any], values: dict[str, Any], prefix: str = "") -> None:
    for key, value in raw.items():
        full = prefix + key
        if isinstance(value, dict):
            _resolve_auto(value, values, f"{full}.")
        elif value == AUTO:
            if full in _SIZES:
                continue  # resolved when the model is known
            if full not in values:
                allowed = ", ".join([*values, *SIZE_KEYS])
                raise ValueError(f'{full} is "auto". Set a value: only {allowed} can be "auto".')
            raw[key] = values[full]
        elif full in values and value != values[full]:
            raise ValueError(
                f'{full} is {quoted(value)}, but the recipe sets {values[full]}. Use "auto", or make them equal.'
            )
