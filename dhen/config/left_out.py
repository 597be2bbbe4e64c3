"""Arguments that the user left out: chosen by the number of rows, or as a run of an earlier version had them."""

import math
from collections.abc import Mapping
from typing import Any

from dhen.config.arguments import Arguments
from dhen.config.training_arguments import LEARNING_RATES, TrainingArguments

MOST_BATCH = 2048
"""The largest batch size per rank that is chosen."""
_LEAST_GLOBAL_BATCH = 64
_STEPS_PER_EPOCH, _LEAST_STEPS, _LEAST_EVAL_STEPS = 200, 500, 25
_CHANGED_DATA_DEFAULTS = ("id_encoding", "hash_size", "min_count", "vocabulary_keys")
_CHANGED_DEFAULTS = (
    "per_device_train_batch_size", "num_train_epochs", "lr_scheduler_type", "learning_rate", "table_learning_rate",
    "table_epsilon",
)  # fmt: skip
"""Arguments whose defaults were others in versions that did not record vocabulary_keys."""


def choose_sizes(training: TrainingArguments, rows: int, world_size: int) -> str:
    """Set the batch size and the number of epochs that were left out. rows: of the training split.

    Returns what was chosen, as text; empty if nothing was left out.
    """
    chosen, pieces = [], world_size * training.gradient_accumulation_steps
    if training.per_device_train_batch_size is None:
        global_batch = max(2 ** round(math.log2(rows / _STEPS_PER_EPOCH)), _LEAST_GLOBAL_BATCH)
        training.per_device_train_batch_size = min(max(global_batch // pieces, 1), MOST_BATCH)
        chosen.append(f"per_device_train_batch_size {training.per_device_train_batch_size}")
    if training.num_train_epochs is None and training.max_steps < 1:
        steps_per_epoch = math.ceil(rows / (training.per_device_train_batch_size * pieces))
        training.num_train_epochs = math.ceil(_LEAST_STEPS / steps_per_epoch)
        chosen.append(f"num_train_epochs {training.num_train_epochs}")
        if not training.eval_steps and steps_per_epoch < _LEAST_EVAL_STEPS:
            training.eval_steps = _LEAST_EVAL_STEPS
            chosen.append(f"eval_steps {training.eval_steps}")
    return f"chosen for {rows:,} training rows: {', '.join(chosen)}" if chosen else ""


def take_recorded(arguments: Arguments, recorded: Mapping[str, Any]) -> list[str]:
    """For a resume: if a run of an earlier version, whose defaults were others, recorded its arguments, take its values
    for those that are left at their default. Returns a sentence for each of them.
    """
    if "vocabulary_keys" in recorded:
        return []
    recorded = {**recorded, "vocabulary_keys": "new"}
    is_fine_tuning = arguments.training.model_name_or_path is not None
    rates = {name: rate / 3 if is_fine_tuning else rate for name, rate in LEARNING_RATES.items()}
    sentences = []
    for part, names in ((arguments.data, _CHANGED_DATA_DEFAULTS), (arguments.training, _CHANGED_DEFAULTS)):
        for name in names:
            default = rates.get(name, type(part).__dataclass_fields__[name].default)
            if getattr(part, name) == default != recorded.get(name, default):
                setattr(part, name, recorded[name])
                sentences.append(f"{name} is {recorded[name]}, as in the run that is resumed")
    return sentences
