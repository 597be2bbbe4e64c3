"""Metrics equal scikit-learn's, over any number of ranks, and to the bit what one process makes of the same rows."""

import doctest
import math
import random
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

import dhen.training.evaluation.metrics
from dhen.runtime.topology import Topology
from dhen.training.evaluation.metrics import (
    ClickMetrics,
    MetricValues,
    RunningLoss,
    auc_of_counts,
    counts_in_bins,
    exact_auc,
    normalized_entropy,
)
from tests.ranks import run_ranks


def click_log(rows: int, seed: int, *, levels: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits and labels; `levels` different logits at most, so that most of them are tied."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, generator=generator) - 1
    if levels is not None:
        logits = (logits * levels / 10).round() * 10 / levels
    return logits, (torch.rand(rows, generator=generator) < torch.sigmoid(0.7 * logits)).float()


def metrics_of(logits: Tensor, labels: Tensor, batch: int = 1000) -> MetricValues:
    metrics = ClickMetrics()
    for logits_B, labels_B in zip(logits.split(batch), labels.split(batch), strict=True):
        metrics.update(logits_B, labels_B)
    return metrics.compute()


def reference(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The definitions, by scikit-learn and numpy in float64."""
    z, y = logits.double().numpy(), labels.double().numpy()
    p = 1 / (1 + np.exp(-z))
    rate = y.mean()
    logloss = log_loss(y, p)
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return {
        "auc": roc_auc_score(y, z),
        "ne": logloss / entropy,
        "logloss": logloss,
        "calibration": p.mean() / rate,
        "examples": len(y),
    }


@pytest.mark.parametrize(("rows", "levels"), [(10, None), (5_000, None), (5_000, 7), (1_000_000, 40)])
def test_metrics_equal_scikit_learns(rows: int, levels: int | None) -> None:
    logits, labels = click_log(rows, seed=rows, levels=levels)
    assert asdict(metrics_of(logits, labels, batch=65_536)) == pytest.approx(reference(logits, labels), rel=1e-12)


def test_auc_counts_ties_as_half_and_is_the_share_of_pairs() -> None:
    logits, labels = click_log(300, seed=1, levels=5)
    clicks, others = logits[labels == 1], logits[labels == 0]
    right = (clicks[:, None] > others).sum() + (clicks[:, None] == others).sum() / 2
    assert exact_auc(logits, labels) == pytest.approx(right.item() / (len(clicks) * len(others)), rel=1e-15)
    assert exact_auc(torch.zeros(300), labels) == 0.5
    assert exact_auc(torch.tensor([-0.0, 0.0]), torch.tensor([0, 1])) == 0.5


@pytest.mark.parametrize("levels", [None, 7])
def test_many_examples_are_counted_in_bins(monkeypatch, caplog, levels: int | None) -> None:
    logits, labels = click_log(200_000, seed=2, levels=levels)
    exact = metrics_of(logits, labels)
    monkeypatch.setattr(dhen.training.evaluation.metrics, "EXACT_EXAMPLES", 199_999)
    caplog.set_level("INFO")
    binned = metrics_of(logits, labels)
    (line,) = caplog.messages
    bound = float(line.split()[-1])
    assert line.startswith("the AUC of 200,000 examples counts logits in 1,048,576 bins")
    assert abs(binned.auc - exact.auc) < (1e-7 if levels is None else 1e-15)
    assert abs(binned.auc - exact.auc) < bound < (1e-3 if levels is None else 0.2)
    assert replace(binned, auc=exact.auc) == exact


def test_bins_are_in_the_order_of_the_logits() -> None:
    values = [-math.inf, -3e38, -2.0, -1.0, -1e-30, 0.0, 1e-43, 1e-30, 0.3, 1.0, 3e38, math.inf]
    bins = [counts_in_bins(torch.tensor([value]), torch.zeros(1))[0].argmax().item() for value in values]
    assert bins == sorted(bins)
    assert len(set(bins)) == len(bins) - 1, "0 and the smallest numbers share a bin"
    assert counts_in_bins(torch.tensor([-0.0, 0.0, 0.3]), torch.tensor([0, 1, 1])).sum(1).tolist() == [1, 2]
    assert auc_of_counts(*counts_in_bins(torch.tensor([-0.0, 0.0]), torch.tensor([0, 1])).flip(0)) == 0.5


def test_confident_logits_keep_their_digits() -> None:
    values = metrics_of(torch.tensor([40.0, -40.0, 300.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert values.logloss == pytest.approx(2 / 3 * math.exp(-40), rel=1e-12)
    assert metrics_of(torch.tensor([math.inf, 0.0]), torch.tensor([0.0, 1.0])).logloss == math.inf


def test_what_the_examples_do_not_define_is_nan() -> None:
    all_clicks = metrics_of(torch.tensor([1.0, 2.0]), torch.ones(2))
    assert math.isnan(all_clicks.auc)
    assert math.isnan(all_clicks.ne)
    assert all_clicks.calibration == pytest.approx(torch.tensor([1.0, 2.0]).double().sigmoid().mean().item())
    no_clicks = metrics_of(torch.tensor([1.0, 2.0]), torch.zeros(2))
    assert all(math.isnan(value) for value in (no_clicks.auc, no_clicks.ne, no_clicks.calibration))
    assert math.isfinite(no_clicks.logloss)
    nothing = ClickMetrics().compute()
    assert nothing.examples == 0
    assert all(math.isnan(value) for name, value in asdict(nothing).items() if name != "examples")


def test_a_diverged_model_has_no_auc() -> None:
    values = metrics_of(torch.tensor([math.nan, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert math.isnan(values.auc)
    assert math.isnan(values.logloss)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.0, math.nan], "have no label"),
        ([0.0, 2.0], "neither 0 nor 1"),
        ([0.5, 1.0], "1 labels are neither"),
        ([1.0], "(1,)"),
    ],
)
def test_labels_that_are_none_are_refused(labels: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        ClickMetrics().update(torch.zeros(2), torch.tensor(labels))


def test_five_bytes_an_example_are_kept() -> None:
    metrics = ClickMetrics()
    for part in range(4):
        metrics.update(*click_log(1000, seed=part))
    kept = [value for value in vars(metrics).values() if isinstance(value, list)]
    assert sum(tensor.nbytes for tensors in kept for tensor in tensors) == 5 * 4000


def test_compute_can_be_called_again_and_further_examples_added() -> None:
    logits, labels = click_log(2000, seed=3)
    metrics = ClickMetrics()
    metrics.update(logits[:700], labels[:700])
    assert metrics.compute() == metrics.compute() == metrics_of(logits[:700], labels[:700])
    metrics.update(logits[700:], labels[700:])
    assert metrics.compute().examples == 2000


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e3])
def test_the_best_scale_has_the_least_logloss(factor: float) -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(20_000) - 1
    metrics = ClickMetrics()
    metrics.update(logits * factor, (torch.rand(20_000) < logits.sigmoid()).float())
    scale = metrics.best_scale()
    after = metrics.scaled(scale).compute()
    assert scale * factor == pytest.approx(1, rel=0.03)
    assert after.auc == pytest.approx(metrics.compute().auc, abs=1e-6)
    assert all(after.logloss < metrics.scaled(scale * other).compute().logloss for other in (0.99, 1.01))


@pytest.mark.parametrize("sign", [-1.0, 1.0], ids=["against the clicks", "without exception"])
def test_without_a_best_scale_the_logits_stay(sign: float) -> None:
    labels = (torch.arange(1000) % 2).float()
    metrics = ClickMetrics()
    metrics.update(sign * (labels - 0.5), labels)
    assert metrics.best_scale() == 1


@pytest.mark.parametrize("most", [1 << 20, 100], ids=["exact", "in bins"])
def test_a_weight_of_k_counts_as_k_copies(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dhen.training.evaluation.metrics, "EXACT_EXAMPLES", most)
    logits, labels = click_log(2000, seed=7, levels=30)
    copies = torch.arange(2000) % 4
    weighted, copied, running = ClickMetrics(), ClickMetrics(), RunningLoss(torch.device("cpu"))
    for part in torch.arange(2000).split(600):
        weighted.update(logits[part], labels[part], copies[part].float() / 4)
        running.update(logits[part], labels[part], copies[part].float() / 4)
    copied.update(logits.repeat_interleave(copies), labels.repeat_interleave(copies))
    values, expected = weighted.compute(), copied.compute()
    assert (values.examples, expected.examples) == (2000, 3000)
    for name in ("auc", "ne", "logloss", "calibration"):
        assert getattr(values, name) == pytest.approx(getattr(expected, name), rel=1e-12), name
        assert getattr(values, name) != pytest.approx(getattr(metrics_of(logits, labels), name), rel=1e-4), name
    assert running.take() == pytest.approx((expected.logloss, expected.ne), rel=1e-12)
    assert weighted.best_scale() == pytest.approx(copied.best_scale(), rel=1e-9)
    rescaled = weighted.scaled(2.0).compute()
    assert rescaled.logloss == pytest.approx(copied.scaled(2.0).compute().logloss, rel=1e-12)


def test_running_loss_is_of_its_window_only() -> None:
    logits, labels = click_log(3000, seed=4)
    running = RunningLoss(torch.device("cpu"))
    for window in (slice(0, 1200), slice(1200, 3000)):
        for logits_B, labels_B in zip(logits[window].split(500), labels[window].split(500), strict=True):
            running.update(logits_B, labels_B)
        expected = reference(logits[window], labels[window])
        assert running.take() == pytest.approx((expected["logloss"], expected["ne"]), rel=1e-12)
    assert all(math.isnan(value) for value in running.take())


def test_normalized_entropy_of_the_click_rate_itself_is_one() -> None:
    rate_logit = math.log(0.3 / 0.7)
    values = metrics_of(torch.full((10,), rate_logit, dtype=torch.float64), torch.tensor([1.0] * 3 + [0.0] * 7))
    assert values.ne == pytest.approx(1.0, rel=1e-14)
    assert values.calibration == pytest.approx(1.0, rel=1e-14)
    assert math.isnan(normalized_entropy(1.0, 0.0, 5.0))


# Cuts of 3,000 rows over the ranks of a group: first an uneven one, later ones with ranks that have none.
CUTS = {1: [[3000]], 2: [[2400, 600], [1500, 1500], [0, 3000]], 3: [[2000, 700, 300], [0, 2999, 1], [0, 0, 3000]]}


def exact_log() -> tuple[Tensor, Tensor]:
    """Rows in an order of falling click rate, so that ranks see different ones; many ties."""
    logits, labels = click_log(3000, seed=5, levels=20)
    noise = torch.randn(3000, generator=torch.Generator().manual_seed(6))
    order = (labels + noise).argsort(descending=True)
    return logits[order], labels[order]


@dataclass(frozen=True)
class CutResult:
    """What one rank got from one cut of the rows; `average` is the ranks' own auc, ne and logloss, averaged."""

    values: MetricValues
    running: tuple[float, float]
    average: list[float]
    binned_auc: float


@dataclass(frozen=True)
class GroupResult:
    """What one rank got in a group of some size."""

    cuts: list[CutResult]
    one_class: MetricValues
    nothing: MetricValues


def of_cut(rank: int, cut: list[int], group: dist.ProcessGroup) -> CutResult:
    logits, labels = exact_log()
    mine = slice(sum(cut[:rank]), sum(cut[: rank + 1]))
    metrics, running = ClickMetrics(), RunningLoss(torch.device("cpu"))
    for logits_B, labels_B in zip(logits[mine].split(256), labels[mine].split(256), strict=True):
        metrics.update(logits_B, labels_B)
        running.update(logits_B, labels_B)
    values = metrics.compute(group)
    assert metrics.compute(group) == values, "computing changed what was accumulated"
    own = metrics.compute()
    average = torch.tensor([own.auc, own.ne, own.logloss], dtype=torch.float64)
    dist.all_reduce(average, group=group)
    dhen.training.evaluation.metrics.EXACT_EXAMPLES, exact = 2999, dhen.training.evaluation.metrics.EXACT_EXAMPLES
    binned = metrics.compute(group).auc
    dhen.training.evaluation.metrics.EXACT_EXAMPLES = exact
    return CutResult(values, running.take(group), (average / len(cut)).tolist(), binned)


def on_ranks(topology: Topology) -> dict[int, GroupResult]:
    """A rank's results by the size of the group: one launch of three ranks serves groups of one, two and three."""
    results = {}
    for size, cuts in CUTS.items():
        group = dist.new_group(range(size))
        if topology.rank < size:
            one_class = ClickMetrics()
            one_class.update(torch.zeros(3), torch.zeros(3))
            results[size] = GroupResult(
                [of_cut(topology.rank, cut, group) for cut in cuts],
                one_class.compute(group),
                ClickMetrics().compute(group),
            )
    return results


@pytest.fixture(scope="module")
def three_ranks() -> list[dict[int, GroupResult]]:
    return run_ranks(3, on_ranks)


@pytest.fixture(params=sorted(CUTS))
def by_rank(request: pytest.FixtureRequest, three_ranks: list[dict[int, GroupResult]]) -> list[GroupResult]:
    return [results[request.param] for results in three_ranks[: request.param]]


def test_ranks_agree_with_one_process(by_rank: list[GroupResult]) -> None:
    whole = metrics_of(*exact_log(), batch=256)
    for position in range(len(CUTS[len(by_rank)])):
        for result in (of_rank.cuts[position] for of_rank in by_rank):
            values = result.values
            assert values == by_rank[0].cuts[position].values, "the ranks disagree"
            assert (values.auc, values.examples) == (whole.auc, whole.examples), "whole numbers, so exact"
            assert asdict(values) == pytest.approx(asdict(whole), rel=1e-14)
            assert result.binned_auc == pytest.approx(whole.auc, rel=1e-14), "tied logits share a bin"
            assert result.running == pytest.approx((whole.logloss, whole.ne), rel=1e-14)


def test_ranks_without_examples_or_clicks_give_nan(by_rank: list[GroupResult]) -> None:
    for one_class, nothing in ((result.one_class, result.nothing) for result in by_rank):
        assert one_class.examples == 3 * len(by_rank)
        assert math.isnan(one_class.auc)
        assert math.isnan(one_class.ne)
        assert one_class.logloss == pytest.approx(math.log(2))
        assert nothing.examples == 0
        assert math.isnan(nothing.logloss)


def test_negative_control_the_average_of_ranks_is_wrong(by_rank: list[GroupResult]) -> None:
    whole = metrics_of(*exact_log(), batch=256)
    for average, value in zip(by_rank[0].cuts[0].average, (whole.auc, whole.ne, whole.logloss), strict=True):
        assert math.isfinite(average)
        assert (average == pytest.approx(value, rel=1e-3)) == (len(by_rank) == 1)


def test_sums_are_exact_where_float32_would_not_be() -> None:
    rows = 300_000
    logits = torch.full((rows,), -3.0)
    labels = torch.zeros(rows)
    labels[random.Random(0).sample(range(rows), 9)] = 1.0
    values = metrics_of(logits, labels, batch=3_000)
    expected = math.log1p(math.exp(-3.0)) + 9 / rows * 3.0
    assert values.logloss == pytest.approx(expected, rel=1e-13)
    in_float32 = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").cumsum(0)[-1]
    assert in_float32.item() / rows != pytest.approx(expected, rel=1e-8)


def test_examples_of_the_docstrings() -> None:
    assert doctest.testmod(dhen.training.evaluation.metrics, extraglobs={"torch": torch}).failed == 0
