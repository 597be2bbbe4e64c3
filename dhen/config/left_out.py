"""Sizes that the user left out are chosen by the number of rows."""

import math

from dhen.config.training_arguments import TrainingArguments

MOST_BATCH = 2048
"""The largest batch size per rank that is chosen."""
_LEAST_GLOBAL_BATCH = 64
_STEPS_PER_EPOCH, _LEAST_STEPS, _LEAST_EVAL_STEPS = 200, 500, 25


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
