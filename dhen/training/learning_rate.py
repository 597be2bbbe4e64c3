"""Learning rates over a run, and when to stop.

One factor serves the dense part and the tables, which have no torch optimizer. So the schedules of
transformers.get_scheduler do not serve: they are bound to an optimizer, start at 0 and have no common floor.
"""

import math
from typing import Any, get_args

from dhen.config.arguments import MetricName, ScalingRule, ScheduleKind


def scale_learning_rate(learning_rate: float, global_batch: int, base_batch: int, rule: ScalingRule) -> float:
    """The learning rate for a batch other than the one it was tuned for.

    linear: in proportion (Goyal et al. 2017, section 2.1). sqrt: with the square root, which keeps the variance of the
    update and is gentler on adaptive optimizers.
    """
    ratio = global_batch / base_batch
    return learning_rate * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[rule]


class LearningRateSchedule:
    """Factor of the peak learning rate: linear warm-up from 0, then by `kind`, named as in Hugging Face.

    constant: 1. linear, cosine: down to `min_lr_ratio` at `total_steps`. inverse_sqrt: sqrt(t / (t + updates since
    warm-up)) with t = `warmup_steps`, or 10,000 without warm-up. reduce_lr_on_plateau: times `plateau_factor` whenever
    more than `plateau_patience` evaluations in a row have not improved the metric. `min_lr_ratio` bounds all of them.
    Raises ValueError for a number out of its range.

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
            raise ValueError(f"min_lr_ratio is {min_lr_ratio}. Use 0 to 1: it is a share of the peak learning rate.")
        if not 0 < plateau_factor < 1:
            raise ValueError(f"plateau_factor is {plateau_factor}. Use a number between 0 and 1: each drop multiplies.")
        self.kind, self.total_steps, self.warmup_steps = kind, total_steps, warmup_steps
        self.min_lr_ratio = min_lr_ratio
        self.plateau_factor, self.plateau_patience = plateau_factor, plateau_patience
        self._dropped = 1.0
        self._without_improvement = 0

    def factor(self, step: int) -> float:
        """Factor for the update after `step` updates. The first is not 0, which would waste it."""
        warm_up = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm_up * self._decay(max(0, step - self.warmup_steps))

    def _decay(self, done: int) -> float:
        """After `done` updates since warm-up."""
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
        """Take note of an evaluation; reduce_lr_on_plateau drops the factor here."""
        self._without_improvement = 0 if improved else self._without_improvement + 1
        if self.kind == "reduce_lr_on_plateau" and self._without_improvement > self.plateau_patience:
            self._dropped *= self.plateau_factor
            self._without_improvement = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; the rest follows from the arguments."""
        return {"dropped": self._dropped, "without_improvement": self._without_improvement}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result."""
        self._dropped, self._without_improvement = state["dropped"], state["without_improvement"]


class BestMetric:
    """The best value of a validation metric so far, and how many evaluations ago it last improved.

    Serves the best checkpoint (`update`'s result), the plateau (`has_improved`) and early stopping (`has_stalled`). To
    the latter two a value is better only by more than `threshold` (absolute) over the value that last was; small steps
    add up until they reach it.

    >>> best = BestMetric("auc", threshold=0.01)
    >>> [(best.update(auc), best.has_improved) for auc in (0.700, 0.705, 0.712, 0.690)]
    [(True, True), (True, False), (True, True), (False, False)]
    """

    def __init__(self, name: MetricName, threshold: float = 0.0) -> None:
        self.name, self.threshold = name, threshold
        self.value: float | None = None
        self.evaluations_since = 0
        self._mark: float | None = None

    def update(self, value: float) -> bool:
        """Take note of an evaluation; returns whether it is the best. NaN and infinity never are."""
        is_best = self._is_better(value, self.value, by=0.0)
        if is_best:
            self.value = value
        if self._is_better(value, self._mark, by=self.threshold):
            self._mark, self.evaluations_since = value, 0
        else:
            self.evaluations_since += 1
        return is_best

    def _is_better(self, value: float, than: float | None, by: float) -> bool:
        if not math.isfinite(value):
            return False
        return than is None or (value - than if self.name == "auc" else than - value) > by

    @property
    def has_improved(self) -> bool:
        """Whether the last evaluation was better by more than `threshold`."""
        return self._mark is not None and self.evaluations_since == 0

    def has_stalled(self, patience: int) -> bool:
        """Whether `patience` evaluations in a row have not improved it; never for patience 0."""
        return patience > 0 and self.evaluations_since >= patience

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"value": self.value, "mark": self._mark, "evaluations_since": self.evaluations_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result."""
        self.value, self._mark, self.evaluations_since = state["value"], state["mark"], state["evaluations_since"]
