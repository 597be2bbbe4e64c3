"""Learning rate schedules, and early stopping.

The dense part and the tables share one factor. transformers.get_scheduler cannot be used, because its schedules need a
torch optimizer, which the tables do not have; they also start at 0 and have no common lower bound.
"""

import math
from typing import Any, get_args

from dhen.config.training_arguments import MetricName, ScalingRule, ScheduleKind


def scale_learning_rate(learning_rate: float, global_batch: int, base_batch: int, rule: ScalingRule) -> float:
    """Scale a learning rate to a batch size other than the one it was tuned for.

    linear: in proportion to the batch size (Goyal et al. 2017, section 2.1). sqrt: with its square root, which keeps
    the variance of the update and suits adaptive optimizers better.
    """
    ratio = global_batch / base_batch
    return learning_rate * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[rule]


class LearningRateSchedule:
    """Factor on the peak learning rate: linear warm-up from 0, then a schedule named as in Hugging Face.

    constant: 1. linear, cosine: fall to `min_lr_ratio` at `total_steps`. inverse_sqrt: sqrt(t / (t + steps since
    warm-up)) with t = `warmup_steps`, or 10,000 without warm-up. reduce_lr_on_plateau: multiplied by `plateau_factor`
    whenever more than `plateau_patience` evaluations in a row have not improved the metric. `min_lr_ratio` is the
    lower bound of all schedules. Raises ValueError for a value out of range.

    >>> schedule = LearningRateSchedule("linear", total_steps=8, warmup_steps=4)
    >>> [schedule.factor(step) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    def __init__(
        self,
        kind: ScheduleKind = "constant",
        *,
        total_steps: int,
        warmup_steps: int = 0,
        min_lr_ratio: float = 0.0,
        plateau_factor: float = 0.1,
        plateau_patience: int = 0,
    ) -> None:
        if kind not in get_args(ScheduleKind):
            raise ValueError(f"lr_scheduler_type is {kind!r}. Use one of {', '.join(get_args(ScheduleKind))}.")
        if not 0 <= min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio is {min_lr_ratio}. Use a fraction of the peak learning rate from 0 to 1.")
        if not 0 < plateau_factor < 1:
            raise ValueError(f"plateau_factor is {plateau_factor}. Use a number between 0 and 1, exclusive.")
        self.kind, self.total_steps, self.warmup_steps = kind, total_steps, warmup_steps
        self.min_lr_ratio = min_lr_ratio
        self.plateau_factor, self.plateau_patience = plateau_factor, plateau_patience
        self._dropped = 1.0
        self._without_improvement = 0

    def factor(self, step: int) -> float:
        """Factor for the next step, after `step` steps. The first factor is above 0, so that no step is wasted."""
        warm_up = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm_up * self._decay(max(0, step - self.warmup_steps))

    def _decay(self, done: int) -> float:
        """Factor after `done` steps since warm-up."""
        share = min(1.0, done / max(1, self.total_steps - self.warmup_steps))
        if self.kind == "linear":
            return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * (1.0 - share)
        if self.kind == "cosine":
            return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * share))
        if self.kind == "inverse_sqrt":
            timescale = self.warmup_steps or 10_000
            return max(self.min_lr_ratio, math.sqrt(timescale / (timescale + done)))
        return max(self.min_lr_ratio, self._dropped)

    def after_evaluation(self, improved: bool) -> None:
        """Record an evaluation. reduce_lr_on_plateau lowers the factor here."""
        self._without_improvement = 0 if improved else self._without_improvement + 1
        if self.kind == "reduce_lr_on_plateau" and self._without_improvement > self.plateau_patience:
            self._dropped *= self.plateau_factor
            self._without_improvement = 0

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint. Everything else follows from the arguments."""
        return {"dropped": self._dropped, "without_improvement": self._without_improvement}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self._dropped, self._without_improvement = state["dropped"], state["without_improvement"]


class BestMetric:
    """Tracks the best value of a validation metric, and the number of evaluations since it last improved.

    >>> best = BestMetric("auc")
    >>> [(best.update(auc), best.has_stalled(patience=1)) for auc in (0.700, 0.712, 0.690)]
    [(True, False), (True, False), (False, True)]
    """

    def __init__(self, name: MetricName) -> None:
        self.name = name
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
        """The state for a checkpoint."""
        return {"name": self.name, "value": self.value, "evaluations_since": self.evaluations_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`. The best value of another metric is forgotten."""
        if state.get("name", self.name) == self.name:
            self.value, self.evaluations_since = state["value"], state["evaluations_since"]
