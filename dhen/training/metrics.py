"""Metrics of click prediction (paper 4.1): exact, over all examples of all ranks.

Sums are float64 and summed over ranks before anything is divided; nothing is an average of averages.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True)
class MetricValues:
    """auc: area under the ROC curve. ne: normalized entropy, logloss over the entropy of the same examples' click rate,
    so 1 is as good as predicting that rate. logloss: nats an example. calibration: mean prediction over click rate.

    NaN where the examples don't define it: auc, ne and calibration need clicks, auc and ne other examples too.
    """

    auc: float
    ne: float
    logloss: float
    calibration: float
    examples: int


def normalized_entropy(logloss_sum: float, clicks: float, examples: float) -> float:
    """Logloss over the entropy of the click rate (paper 4.1); NaN where that entropy is 0."""
    if not 0 < clicks < examples:
        return math.nan
    rate = clicks / examples
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
    return logloss_sum / examples / entropy


def _sums(logits_B: Tensor, labels_B: Tensor) -> Tensor:
    """Of logloss, of predictions, of labels, and the number of examples: float64, (4,)."""
    logits_B, labels_B = logits_B.detach().double(), labels_B.double()
    logloss = softplus(logits_B).sum() - (labels_B * logits_B).sum()
    return torch.stack([logloss, logits_B.sigmoid().sum(), labels_B.sum(), logits_B.new_tensor(float(len(labels_B)))])


class RunningLoss:
    """Sums for the lines of progress: kept on the device, read only when a line is due."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, logits_B: Tensor, labels_B: Tensor) -> None:
        """Add a batch. Doesn't communicate or wait for the device."""
        self._sums += _sums(logits_B, labels_B)

    def take(self, group: dist.ProcessGroup) -> tuple[float, float]:
        """(logloss, ne) since the last call. Communicates over `group`; all its ranks call it."""
        dist.all_reduce(self._sums, group=group)
        logloss, _, clicks, examples = self._sums.tolist()
        self._sums.zero_()
        return (logloss / examples if examples else math.nan), normalized_entropy(logloss, clicks, examples)


class ClickMetrics:
    """Metrics of an evaluation. Keeps 5 bytes an example on each rank, for the AUC.

    >>> metrics = ClickMetrics()
    >>> metrics.update(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
    >>> metrics.compute().auc
    1.0
    """

    def __init__(self) -> None:
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._sums: Tensor | None = None

    def update(self, logits_B: Tensor, labels_B: Tensor) -> None:
        """Add this rank's examples: logits_B, and labels_B of 0 and 1. Raises ValueError for a label that is NaN."""
        if labels_B.isnan().any():
            raise ValueError("The data has no labels, so it can't be evaluated. Score it with recipes/predict.py.")
        sums = _sums(logits_B, labels_B)
        self._sums = sums if self._sums is None else self._sums + sums
        self._logits.append(logits_B.detach().float())
        self._labels.append(labels_B.detach().to(torch.uint8))

    def compute(self, group: dist.ProcessGroup | None = None) -> MetricValues:
        """The metrics of all examples. Communicates over `group`, all its ranks call it; None: this process alone."""
        assert self._sums is not None, "compute before update"
        sums, logits, labels = self._sums, torch.cat(self._logits), torch.cat(self._labels)
        if group is not None:
            dist.all_reduce(sums, group=group)
            logits, labels = _gather(logits, group), _gather(labels, group)
        logloss, predictions, clicks, examples = sums.tolist()
        return MetricValues(
            auc=exact_auc(logits, labels),
            ne=normalized_entropy(logloss, clicks, examples),
            logloss=logloss / examples if examples else math.nan,
            calibration=predictions / clicks if clicks else math.nan,
            examples=int(examples),
        )


def exact_auc(scores: Tensor, labels: Tensor) -> float:
    """Share of (click, other) pairs that the scores rank rightly, ties counting half; NaN without both kinds.

    In whole numbers up to the last division. torchmetrics' exact AUROC divides in float32, which is off in the seventh
    digit where there are many examples.
    """
    clicks = int(labels.sum())
    others = len(labels) - clicks
    if not clicks or not others:
        return math.nan
    order = scores.argsort()
    scores, is_click = scores[order], labels[order].long()
    _, counts = scores.unique_consecutive(return_counts=True)
    last = counts.cumsum(0)
    clicks_upto = is_click.cumsum(0)[last - 1]
    clicks_tied = clicks_upto.diff(prepend=clicks_upto.new_zeros(1))
    others_tied = counts - clicks_tied
    others_below = (last - clicks_upto) - others_tied
    twice_right = int((clicks_tied * (2 * others_below + others_tied)).sum())
    return twice_right / (2 * clicks * others)


def _gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' values one after another, on the CPU. Communicates; the ranks may have different numbers of them."""
    world_size = dist.get_world_size(group)
    sizes = torch.zeros(world_size, dtype=torch.int64, device=values.device)
    dist.all_gather_into_tensor(sizes, sizes.new_tensor([len(values)]), group=group)
    longest = int(sizes.max())
    padded = torch.nn.functional.pad(values, (0, longest - len(values)))
    everyone = values.new_empty(world_size * longest)
    dist.all_gather_into_tensor(everyone, padded, group=group)
    parts = everyone.view(world_size, longest).cpu()
    return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])
