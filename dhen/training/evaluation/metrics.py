"""Metrics of click prediction (paper 4.1), over all examples of all ranks.

Sums are kept in float64 and reduced over ranks before the division, so no metric is an average of averages. All are
exact, but for the AUC of more than 10 million examples, which counts logits in bins, and says how far it may be off.
"""

import logging
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from dhen.runtime.collectives import all_gather_uneven

EXACT_EXAMPLES = 10_000_000
"""All ranks gather up to so many examples for the AUC."""
AUC_BINS = 1 << 20
_BITS_IN_BIN = 12  # of a float32's 32, so a bin is as wide as 1/2048 of its logits
_NEWTON_STEPS, _CONVERGED = 20, 1e-6
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetricValues:
    """The metrics of an evaluation.

    auc: area under the ROC curve. ne: normalized entropy, that is, logloss / entropy of the examples' click rate; 1 is
    as good as always predicting that rate. logloss: nats per example. calibration: mean prediction / click rate.

    If examples have weights, each counts as so many, but for `examples`, their number.

    A metric is NaN if the examples do not define it: auc, ne and calibration need clicks; auc and ne also need
    examples without a click.
    """

    auc: float
    ne: float
    logloss: float
    calibration: float
    examples: int


def normalized_entropy(logloss_sum: float, clicks: float, examples: float) -> float:
    """Logloss / entropy of the click rate (paper 4.1). NaN if that entropy is 0."""
    if not 0 < clicks < examples:
        return math.nan
    rate = clicks / examples
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
    return logloss_sum / examples / entropy


def _sums(logits_B: Tensor, labels_B: Tensor, weights_B: Tensor | None) -> Tensor:
    """Sums of logloss, predictions, labels and weights (None: 1 for each example): float64, (4,)."""
    logits_B, labels_B = logits_B.detach().double(), labels_B.double()
    weights_B = torch.ones_like(labels_B) if weights_B is None else weights_B.double()
    # One logsigmoid per example has no difference of large numbers, so the loss of a confident logit keeps its digits.
    logloss_B = -logsigmoid((2 * labels_B - 1) * logits_B)
    return torch.stack([logloss_B, logits_B.sigmoid(), labels_B, torch.ones_like(labels_B)]) @ weights_B


class RunningLoss:
    """Running sums for the progress lines. They stay on the device and are read only when a line is due.

    sums: of this rank, which a checkpoint keeps.

    >>> running = RunningLoss(torch.device("cpu"))
    >>> running.update(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
    >>> loss, ne = running.take()
    >>> round(loss, 4), ne
    (0.6931, 1.0)
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, logits_B: Tensor, labels_B: Tensor, weights_B: Tensor | None = None) -> None:
        """Add a batch of logits_B, and labels_B of 0 and 1. Does not communicate or wait for the device."""
        self.sums += _sums(logits_B, labels_B, weights_B)

    def take(self, group: dist.ProcessGroup | None = None) -> tuple[float, float]:
        """Return (logloss, ne) since the last call, NaN without examples, and reset the sums.

        Communicates over `group`; all its ranks call it. None: this process alone.
        """
        logloss, _, clicks, examples = _sum_over(self.sums, group).tolist()
        self.sums.zero_()
        return (logloss / examples if examples else math.nan), normalized_entropy(logloss, clicks, examples)


class ClickMetrics:
    """Accumulates the metrics of an evaluation. Keeps 5 bytes per example on each rank, 9 with weights, for the AUC.

    >>> metrics = ClickMetrics()
    >>> metrics.update(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
    >>> metrics.compute().auc
    1.0
    """

    def __init__(self) -> None:
        self._logits: list[Tensor] = [torch.empty(0, dtype=torch.float32)]
        self._labels: list[Tensor] = [torch.empty(0, dtype=torch.uint8)]
        self._weights: list[Tensor] = []
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._wrong = torch.zeros(2, dtype=torch.int64)

    def update(self, logits_B: Tensor, labels_B: Tensor, weights_B: Tensor | None = None) -> None:
        """Add this rank's examples, possibly none: logits_B, and labels_B of 0 and 1. Does not wait for a GPU.

        weights_B: of the examples, in all calls or in none. Raises ValueError if the shapes differ or a label is not 0
        or 1; on a GPU, `compute` does that. NaN marks rows without a label.
        """
        if logits_B.shape != labels_B.shape or logits_B.dim() != 1:
            raise ValueError(f"logits {tuple(logits_B.shape)} and labels {tuple(labels_B.shape)} must have shape (B,).")
        wrong = ((labels_B != 0) & (labels_B != 1)).sum()
        self._wrong = self._wrong.to(labels_B.device) + torch.stack([labels_B.isnan().sum(), wrong])
        if labels_B.device.type == "cpu":
            _check_labels(*self._wrong.tolist())
        self._sums = self._sums.to(logits_B.device) + _sums(logits_B, labels_B, weights_B)
        if weights_B is not None:
            self._weights.append(weights_B.float())
        self._logits.append(logits_B.detach().float())
        self._labels.append(labels_B.to(torch.uint8))

    def compute(self, group: dist.ProcessGroup | None = None) -> MetricValues:
        """Compute the metrics over all examples so far. All ranks get the same values.

        Communicates over `group`; all its ranks call it, including those without examples. None: this process alone.
        """
        numbers = self._sums.new_tensor([sum(map(len, self._labels)), bool(self._weights)])
        sums = torch.cat([self._sums, numbers, self._wrong.to(self._sums)])
        logloss, predictions, clicks, weight, examples, weighted, *wrong = _sum_over(sums, group).tolist()
        if weighted and not self._weights:  # a rank without examples
            self._weights = [torch.empty(0)]
        _check_labels(*wrong)
        return MetricValues(
            auc=math.nan if math.isnan(predictions) else self._auc(int(examples), group),
            ne=normalized_entropy(logloss, clicks, weight),
            logloss=logloss / weight if weight else math.nan,
            calibration=predictions / clicks if clicks else math.nan,
            examples=int(examples),
        )

    def _auc(self, examples: int, group: dist.ProcessGroup | None) -> float:
        values = self._examples()
        if examples <= EXACT_EXAMPLES:
            if group is not None:
                device = _communication_device(group)
                values = [all_gather_uneven(each.to(device), group) for each in values]
            return exact_auc(*values)
        others, clicks = _sum_over(counts_in_bins(*values), group)
        auc = auc_of_counts(clicks, others)
        bound = ((clicks.double() @ others.double()) / (2 * clicks.sum().double() * others.sum())).item()
        logger.info(
            "the AUC of %s examples counts logits in %s bins: %.8f, off by at most %.2g",
            f"{examples:,}", f"{AUC_BINS:,}", auc, 1.05 * bound,  # so that rounding does not make it too small
        )  # fmt: skip
        return auc

    def best_scale(self, group: dist.ProcessGroup | None = None) -> float:
        """The positive number that, multiplied with all logits, makes the logloss least (temperature scaling).

        1 if there is none: clicks do not follow the logits, or follow them without exception. Needs examples of both
        labels. Communicates over `group` like `compute`.
        """
        logits, labels, *weights = self._examples()
        weights = weights[0].double() if weights else torch.ones_like(logits, dtype=torch.float64)
        log_scale = 0.0
        for _ in range(_NEWTON_STEPS):
            z = logits.double() * math.exp(log_scale)
            p = z.sigmoid()
            parts = [(weights * (labels - p)) @ z, (weights * p * (1 - p)) @ z.square()]
            slope, curvature = _sum_over(torch.stack(parts), group).tolist()
            step = max(-1.0, min(slope / max(curvature, 1e-30), 1.0))  # a longer step may overshoot
            log_scale += step
        return math.exp(log_scale) if abs(step) < _CONVERGED and curvature > 0 else 1.0

    def scaled(self, scale: float) -> "ClickMetrics":
        """The same examples with their logits multiplied by `scale`."""
        logits, *others = self._examples()
        result = ClickMetrics()
        result.update(logits * scale, *others)
        return result

    def _examples(self) -> list[Tensor]:
        """Logits and labels, and the weights if there are any."""
        parts = [self._logits, self._labels, *([self._weights] if self._weights else [])]
        return [torch.cat([part.to(self._sums.device) for part in each]) for each in parts]


def _check_labels(missing: float, wrong: float) -> None:
    """missing: rows without a label, which count as `wrong` too."""
    if missing:
        raise ValueError("Some rows have no label and cannot be evaluated. Score them with recipes/predict.py.")
    if wrong:
        raise ValueError(f"{wrong:.0f} labels are neither 0 nor 1. Prepare the data again.")


def exact_auc(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Fraction of (click, no click) pairs that the scores rank correctly; ties count half (Mann-Whitney).

    weights: of the examples; a pair weighs the product of its two. NaN unless both labels occur.
    """
    order = scores.argsort()
    _, counts = scores[order].unique_consecutive(return_counts=True)
    of_labels = labels.long() if weights is None else labels * weights.double()
    of_all = torch.ones_like(of_labels) if weights is None else weights.double()
    upto = torch.stack([of_labels, of_all])[:, order].cumsum(1)[:, counts.cumsum(0) - 1]
    clicks, both = upto.diff(prepend=upto.new_zeros(2, 1))
    return auc_of_counts(clicks, both - clicks)


def auc_of_counts(clicks: Tensor, others: Tensor) -> float:
    """The AUC from the number of clicks, and of other examples, at each score, from low to high: (scores,), int64, or
    float64 for sums of weights.

    >>> auc_of_counts(torch.tensor([0, 1]), torch.tensor([1, 1]))
    0.75
    """
    # torchmetrics' binary_auroc divides and integrates in float32, even for float64 scores, and is off by 5e-8 for a
    # million examples. Here everything is an integer until the last division, unless there are weights.
    below = others.cumsum(0) - others
    twice_right = (clicks * (2 * below + others)).sum().item()
    pairs = clicks.sum().item() * others.sum().item()
    return twice_right / (2 * pairs) if pairs else math.nan


def counts_in_bins(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """How many examples have a logit in each bin, from low to high: (2, AUC_BINS), first without and then with a click.

    weights: of the examples, which then count as so many. logits: float32, not NaN. A bin has the logits whose first 20
    bits are the same.
    """
    bits = (logits + 0.0).view(torch.int32)  # turns -0 into 0
    in_order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # whole numbers in the order of the logits
    bins = (in_order >> _BITS_IN_BIN) + AUC_BINS // 2
    weights = None if weights is None else weights.double()
    return torch.bincount(bins + AUC_BINS * labels.long(), weights, minlength=2 * AUC_BINS).view(2, AUC_BINS)


def _communication_device(group: dist.ProcessGroup) -> torch.device:
    """The device on which the group's backend needs its tensors."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else torch.device("cpu")
    )


def _sum_over(sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the ranks of `group`, without changing `sums`. Communicates over `group`."""
    if group is None:
        return sums
    total = sums.to(_communication_device(group), copy=True)
    dist.all_reduce(total, group=group)
    return total
