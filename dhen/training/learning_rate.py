"""Learning rate schedules, and early stopping.

The dense part and the tables share one factor. transformers.get_scheduler cannot be used, because its schedules need a
torch optimizer, which the tables do not have; they also start at 0 and have no common lower bound.
"""

import math
from typing import Any

from dhen.config.training_arguments import MetricName, TrainingArguments


def batch_size_scale(arguments: TrainingArguments, global_batch: int) -> float:
    """Factor on the learning rates for a batch size other than the one that they were tuned for.

    linear: in proportion to the batch size (Goyal et al. 2017, section 2.1). sqrt: with its square root, which keeps
    the variance of the update and suits adaptive optimizers better.
    """
    ratio = global_batch / arguments.base_batch_size
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[arguments.learning_rate_scaling]


class LearningRateSchedule:
    """Factor on the peak learning rate: linear warm-up from 0, then a schedule named as in Hugging Face.

    constant: 1. linear, cosine: fall to `min_lr_ratio` at `total_steps`. inverse_sqrt: sqrt(t / (t + steps since
    warm-up)) with t = `warmup_steps`, or 10,000 without warm-up. reduce_lr_on_plateau: multiplied by `plateau_factor`
    at every `plateau_patience`-th evaluation in a row that does not improve the metric. `min_lr_ratio` is the lower
    bound of all schedules.

    >>> schedule = LearningRateSchedule(TrainingArguments(lr_scheduler_type="linear", warmup_steps=4), total_steps=8)
    >>> [schedule.factor(step) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    def __init__(self, arguments: TrainingArguments, total_steps: int) -> None:
        self._arguments, self._total_steps = arguments, total_steps
        self._dropped = 1.0
        self._without_improvement = 0

    def factor(self, step: int) -> float:
        """Factor for the next step, after `step` steps. The first factor is above 0, so that no step is wasted."""
        steps = self._arguments.warmup_steps
        return (min(1.0, (step + 1) / steps) if steps else 1.0) * self._decay(max(0, step - steps))

    def _decay(self, done: int) -> float:
        """Factor after `done` steps since warm-up."""
        kind, least = self._arguments.lr_scheduler_type, self._arguments.min_lr_ratio
        warmup_steps = self._arguments.warmup_steps
        share = min(1.0, done / max(1, self._total_steps - warmup_steps))
        if kind == "linear":
            return least + (1.0 - least) * (1.0 - share)
        if kind == "cosine":
            return least + (1.0 - least) * 0.5 * (1.0 + math.cos(math.pi * share))
        if kind == "inverse_sqrt":
            timescale = warmup_steps or 10_000
            return max(least, math.sqrt(timescale / (timescale + done)))
        return max(least, self._dropped)

    def after_evaluation(self, improved: bool) -> bool:
        """Record an evaluation. reduce_lr_on_plateau lowers the factor here. Returns whether it does."""
        arguments = self._arguments
        self._without_improvement = 0 if improved else self._without_improvement + 1
        is_plateau = arguments.lr_scheduler_type == "reduce_lr_on_plateau"
        if not is_plateau or self._without_improvement < arguments.plateau_patience:
            return False
        was_above = self._dropped > arguments.min_lr_ratio
        self._dropped *= arguments.plateau_factor
        self._without_improvement = 0
        return was_above

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint. Everything else follows from the arguments."""
        return {"dropped": self._dropped, "without_improvement": self._without_improvement}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._dropped, self._without_improvement = state["dropped"], state["without_improvement"]


class BestMetric:
    """Tracks the best value of a validation metric, and the number of evaluations since it last improved.

    >>> best = BestMetric("auc")
    >>> [(best.update(auc), best.has_stalled(patience=1)) for auc in (0.700, 0.712, 0.690)]
    [(True, False), (True, False), (False, True)]
    """

    def __init__(self, name: MetricName, *, of_average: bool = False) -> None:
        """of_average: the evaluated weights are a moving average."""
        self.name, self._of_average = name, of_average
        self.value: float | None = None
        self.evaluations_since = 0

    def update(self, value: float) -> bool:
        """Record an evaluation. Returns whether it is the best so far. A value that is not finite changes nothing."""
        if not math.isfinite(value):
            return False
        is_best = self.value is None or (value > self.value if self.name == "auc" else value < self.value)
        self.evaluations_since = 0 if is_best else self.evaluations_since + 1
        self.value = value if is_best else self.value
        return is_best

    def has_stalled(self, patience: int) -> bool:
        """Whether the last `patience` evaluations did not improve the metric. Always False for patience 0."""
        return patience > 0 and self.evaluations_since >= patience

    def state_dict(self) -> dict[str, Any]:
        of = {"name": self.name, "of_average": self._of_average}
        return of | {"value": self.value, "evaluations_since": self.evaluations_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`. The best value of another metric, or of other weights, is forgotten."""
        if (state["name"], state["of_average"]) == (self.name, self._of_average):
            self.value, self.evaluations_since = state["value"], state["evaluations_since"]
