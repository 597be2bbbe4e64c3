"""Metrics by group equal scikit-learn's on each group, on any number of ranks."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from dhen.model.features import SparseIds
from dhen.runtime.topology import Topology
from dhen.training.evaluation import group_metrics
from dhen.training.evaluation.group_metrics import GroupedValues, GroupMetrics
from tests.ranks import run_ranks

ROWS = 3000


def log(weighted: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Groups, logits with many ties, labels and weights. Some groups have one row, some one label."""
    generator = torch.Generator().manual_seed(3)
    groups = (torch.rand(ROWS, generator=generator) ** 3 * 400).long()
    logits = (torch.randn(ROWS, generator=generator) * 4).round() / 4 + (groups % 5) / 2
    labels = (torch.rand(ROWS, generator=generator) < (logits - 1).sigmoid()).float()
    weights = torch.randint(1, 5, (ROWS,), generator=generator).float() / 2
    return groups, logits, labels, weights if weighted else None


def measure(topology: Topology, weighted: bool, cut: list[int]) -> GroupedValues:
    """The second of two features is the group. cut: rows of each rank, in batches of 100."""
    groups, logits, labels, weights = log(weighted)
    first = sum(cut[: topology.rank])
    metrics = GroupMetrics(1)
    for rows in torch.arange(first, first + cut[topology.rank]).split(100):
        ids = SparseIds(torch.cat([rows * 0, groups[rows]]), 2)
        metrics.update(ids, logits[rows], labels[rows], None if weights is None else weights[rows])
    return metrics.compute(topology)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cut", [[3000], [2000, 1000], [0, 2999, 1]], ids=str)
def test_each_group_and_gauc_equal_scikit_learns(weighted, cut):
    results = run_ranks(len(cut), measure, weighted, cut)
    assert len(set(map(repr, results))) == 1
    groups, logits, labels, weights = (None if each is None else each.double().numpy() for each in log(weighted))
    weights = np.ones(ROWS) if weights is None else weights
    sums, left_out, one_class = np.zeros(2), 0, 0
    for group in np.unique(groups):
        of = groups == group
        y, z, w = labels[of], logits[of], weights[of]
        found, rate = results[0].largest[int(group)], np.average(y, weights=w)
        assert found.examples == of.sum()
        if 0 < rate < 1:
            auc, p = roc_auc_score(y, z, sample_weight=w), 1 / (1 + np.exp(-z))
            assert found.auc == pytest.approx(auc, abs=1e-9)
            entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
            assert found.ne == pytest.approx(log_loss(y, p, sample_weight=w) / entropy, rel=1e-9)
            assert found.calibration == pytest.approx(np.average(p, weights=w) / rate, rel=1e-9)
            sums += (auc * w.sum(), w.sum())
        else:
            assert math.isnan(found.auc)
            assert math.isnan(found.ne)
            left_out, one_class = left_out + of.sum(), one_class + 1
    assert one_class > 20
    assert results[0].gauc == pytest.approx(sums[0] / sums[1], abs=1e-9)
    counts = (results[0].groups, results[0].one_class, results[0].left_out)
    assert counts == (len(np.unique(groups)), one_class, left_out)


def measure_few(topology: Topology) -> list[int]:
    group_metrics.MOST_GROUPS = 5
    return list(measure(topology, False, [1000, 2000]).largest)


def test_the_largest_groups_of_all_ranks_are_kept():
    sizes = torch.bincount(log(False)[0])
    expected = sorted(range(len(sizes)), key=lambda group: (-sizes[group], group))[:5]
    assert run_ranks(2, measure_few) == [expected, expected]


def measure_nothing(topology: Topology) -> GroupedValues:
    metrics = GroupMetrics(0)
    metrics.update(SparseIds(torch.empty(0, dtype=torch.int64), 1), torch.empty(0), torch.empty(0))
    return metrics.compute(topology)


def test_without_examples_there_is_no_gauc():
    (values,) = run_ranks(1, measure_nothing)
    assert math.isnan(values.gauc)
    assert (values.groups, values.largest) == (0, {})
