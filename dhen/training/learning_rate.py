"""Learning rates over a run, the same factor for the dense part and the tables; and when to stop."""

import math
from typing import Any, Literal

ScheduleKind = Literal["constant", "linear", "cosine", "inverse_sqrt", "reduce_lr_on_plateau"]
ScalingRule = Literal["none", "linear", "sqrt"]


def scale_learning_rate(learning_rate: float, global_batch: int, base_batch: int, rule: ScalingRule) -> float:
    """The learning rate for a batch other than the one it was tuned for.

    linear: in proportion (Goyal et al. 2017, section 2.1). sqrt: with the square root, which keeps the variance of the
    update and is gentler on adaptive optimizers.
    """
    ratio = global_batch / base_batch
    return learning_rate * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[rule]


class LearningRateSchedule:
    """Factor of the peak learning rate: linear warm-up from 0, then by `kind`.

    reduce_lr_on_plateau multiplies it by `plateau_factor` when more than `plateau_patience` evaluations in a row have
    not improved the metric. No factor falls below `min_lr_ratio` once warmed up.
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
        self.kind, self.total_steps, self.warmup_steps = kind, total_steps, warmup_steps
        self.min_lr_ratio = min_lr_ratio
        self.plateau_factor, self.plateau_patience = plateau_factor, plateau_patience
        self._dropped = 1.0
        self._without_improvement = 0

    def factor(self, step: int) -> float:
        """Factor for the update after `step` updates."""
        warm_up = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm_up * max(self._decay(step), self.min_lr_ratio)

    def _decay(self, step: int) -> float:
        done = step - self.warmup_steps
        if done <= 0:
            return self._dropped
        share = min(1.0, done / max(1, self.total_steps - self.warmup_steps))
        if self.kind == "linear":
            return 1.0 - share
        if self.kind == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * share))
        if self.kind == "inverse_sqrt":
            return math.sqrt(max(1, self.warmup_steps) / (max(1, self.warmup_steps) + done))
        return self._dropped

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
    """The best value of a validation metric so far, and how many evaluations ago it was."""

    def __init__(self, name: Literal["auc", "ne", "logloss"]) -> None:
        self.name = name
        self.value: float | None = None
        self.evaluations_since = 0

    def update(self, value: float) -> bool:
        """Take note of an evaluation; returns whether it is the best. NaN never is."""
        greater_is_better = self.name == "auc"
        improved = not math.isnan(value) and (
            self.value is None or (value > self.value if greater_is_better else value < self.value)
        )
        self.value = value if improved else self.value
        self.evaluations_since = 0 if improved else self.evaluations_since + 1
        return improved

    def has_stalled(self, patience: int) -> bool:
        """Whether `patience` evaluations in a row have not improved it; never for patience 0."""
        return patience > 0 and self.evaluations_since >= patience

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"value": self.value, "evaluations_since": self.evaluations_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result."""
        self.value, self.evaluations_since = state["value"], state["evaluations_since"]
