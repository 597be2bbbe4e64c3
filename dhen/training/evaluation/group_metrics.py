"""Metrics by group of examples: those of each value of a feature, and the grouped AUC (gAUC).

gAUC is the mean of the groups' AUCs, weighted by their examples (Zhou et al. 2018, Deep Interest Network, eq. 5). A
group whose examples have one label has no AUC; such groups are left out and counted. Each group is measured on one
rank, to which all ranks send its examples, so no rank gathers all.

Shapes: B examples of a batch, N examples on this rank, G groups on this rank, W ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from dhen.data.schema import Schema
from dhen.model.features import SparseIds
from dhen.runtime.collectives import all_to_all, from_all
from dhen.runtime.topology import Topology
from dhen.training.evaluation.metrics import MetricValues, normalized_entropy

MOST_GROUPS = 1000
"""Groups whose own metrics are kept: those with the most examples."""


@dataclass(frozen=True)
class GroupedValues:
    """gauc: NaN without a group of both labels. groups, one_class: numbers of groups, and of those with one label.

    left_out: number of examples in the latter. largest: the metrics of the largest groups by id, the largest first.
    openness: of these groups, the mean openness of the gate of each layer that has one.
    """

    gauc: float
    groups: int
    one_class: int
    left_out: int
    largest: dict[int, MetricValues]
    openness: dict[int, list[float]]


def groups_by(names: Sequence[str], schema: Schema) -> dict[str, "GroupMetrics"]:
    """An accumulator for each feature. Raises ValueError if one does not have one id per example."""
    columns = {column.name: column for column in schema.sparse}
    single = [name for name, column in columns.items() if not column.is_multi_valued]
    for name in names:
        if name not in single:
            what = "may have many ids in a row" if name in columns else "is no sparse feature"
            raise ValueError(f"--metrics_by: {name!r} {what}. Use one of {', '.join(single) or 'no feature'}.")
    places = [column.name for column in schema.lookups]
    return {name: GroupMetrics(places.index(name)) for name in names}


class GroupMetrics:
    """Accumulates examples by the id of one feature. Keeps 32 bytes per example on each rank, and 8 per gate.

    >>> from dhen.runtime.topology import start
    >>> metrics = GroupMetrics(0)
    >>> ids = SparseIds(torch.tensor([7, 7, 3, 3]), num_features=1)
    >>> metrics.update(ids, torch.tensor([1.0, -1.0, 2.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    >>> values = metrics.compute(start())
    >>> values.gauc, values.groups, values.one_class, list(values.largest)
    (1.0, 2, 1, [3, 7])
    """

    def __init__(self, feature: int) -> None:
        """feature: its place among the sparse features; it has one id per example."""
        self.feature = feature
        self._rows_BC: list[Tensor] = []

    def update(
        self,
        sparse: SparseIds,
        logits_B: Tensor,
        labels_B: Tensor,
        weights_B: Tensor | None = None,
        gates_BL: Tensor | None = None,
    ) -> None:
        """Add a batch of this rank, possibly an empty one. weights_B: of the examples; None: 1. gates_BL: openness of
        the layers' gates, if there are any.
        """
        weights_B = torch.ones_like(labels_B) if weights_B is None else weights_B
        ids_B = sparse.ids.split(list(sparse.counts_F))[self.feature]
        rows_BC = torch.stack([each.double() for each in (ids_B, logits_B, labels_B, weights_B)], dim=1)
        self._rows_BC.append(rows_BC if gates_BL is None else torch.cat([rows_BC, gates_BL.double()], dim=1))

    def scale(self, factor: float) -> None:
        """Multiply all logits so far."""
        for rows_BC in self._rows_BC:
            rows_BC[:, 1] *= factor

    def compute(self, topology: Topology) -> GroupedValues:
        """The metrics over all ranks, the same on each. Communicates; all ranks call it after at least one update."""
        groups_GC = _by_group(_to_owners(torch.cat(self._rows_BC), topology))
        _, examples_G, weights_G, *_, auc_G = groups_GC[:, :7].unbind(1)
        is_known_G = ~auc_G.isnan()
        sums = torch.stack([
            (weights_G * auc_G)[is_known_G].sum(), weights_G[is_known_G].sum(), examples_G[~is_known_G].sum(),
            (~is_known_G).sum().double(), weights_G.new_tensor(len(weights_G)),
        ])  # fmt: skip
        dist.all_reduce(sums, group=topology.world)
        right, weight, left_out, one_class, groups = sums.tolist()
        largest = groups_GC[examples_G.argsort(descending=True, stable=True)[:MOST_GROUPS]].tolist()
        of_all = sorted(
            (row for rows in from_all(largest, topology) for row in rows), key=lambda row: (-row[1], row[0])
        )
        gauc = right / weight if weight else math.nan
        values = {int(row[0]): _values(*row[1:7]) for row in of_all[:MOST_GROUPS]}
        openness = {int(row[0]): [each / row[1] for each in row[7:]] for row in of_all[:MOST_GROUPS] if row[7:]}
        return GroupedValues(gauc, int(groups), int(one_class), int(left_out), values, openness)


def _values(
    examples: float, weight: float, logloss: float, predictions: float, clicks: float, auc: float
) -> MetricValues:
    """The metrics of a group from its sums."""
    return MetricValues(
        auc=auc,
        ne=normalized_entropy(logloss, clicks, weight),
        logloss=logloss / weight if weight else math.nan,
        calibration=predictions / clicks if clicks else math.nan,
        examples=int(examples),
    )


def _to_owners(rows_NC: Tensor, topology: Topology) -> Tensor:
    """Send each row to the rank that owns its group, the id modulo W. Communicates over all ranks."""
    if topology.world_size == 1:
        return rows_NC
    owner_N = rows_NC[:, 0].long() % topology.world_size
    sent_W = torch.bincount(owner_N, minlength=topology.world_size)
    received_W = torch.empty_like(sent_W)
    dist.all_to_all_single(received_W, sent_W, group=topology.world)
    flat, width = rows_NC[owner_N.argsort()].flatten(), rows_NC.shape[1]
    sizes = [[width * count for count in counts.tolist()] for counts in (sent_W, received_W)]
    return all_to_all(flat, *sizes, topology.world)().view(-1, width)


def _by_group(rows_NC: Tensor) -> Tensor:
    """By group: id, examples, and the sums of weights, log loss, predictions and clicks, then the AUC, then the sums of
    the gates: (G, 7 + L), float64.

    rows_NC: id, logit, label, weight, and the openness of L gates.
    """
    rows_NC = rows_NC[rows_NC[:, 1].argsort(stable=True)]
    rows_NC = rows_NC[rows_NC[:, 0].argsort(stable=True)]  # by id, and then by logit
    id_N, logit_N, label_N, weight_N = rows_NC[:, :4].unbind(1)
    ids_G, group_N, examples_G = id_N.unique_consecutive(return_inverse=True, return_counts=True)
    loss_N = -logsigmoid((2 * label_N - 1) * logit_N)
    summed = torch.stack([torch.ones_like(loss_N), loss_N, logit_N.sigmoid(), label_N], dim=1) * weight_N[:, None]
    sums_G4 = summed.new_zeros(len(ids_G), 4).index_add(0, group_N, summed)
    # Examples of a group with the same logit are tied: together they are one step of the group's curve.
    starts_N = torch.ones_like(group_N, dtype=torch.bool)
    starts_N[1:] = (group_N.diff() != 0) | (logit_N.diff() != 0)
    step_N = starts_N.cumsum(0) - 1
    weights = torch.stack([label_N, 1 - label_N], dim=1) * weight_N[:, None]
    clicks_S, others_S = weights.new_zeros(int(starts_N.sum()), 2).index_add(0, step_N, weights).unbind(1)
    group_S, upto_S = group_N[starts_N], others_S.cumsum(0)
    before_G = upto_S.new_zeros(len(ids_G)).index_add(0, group_S, others_S).cumsum(0).roll(1)
    before_G[:1] = 0
    right_S = clicks_S * (upto_S - others_S / 2 - before_G[group_S])
    clicks_G = sums_G4[:, 3]
    pairs_G = clicks_G * (sums_G4[:, 0] - clicks_G)
    auc_G = torch.where(pairs_G > 0, pairs_G.new_zeros(len(ids_G)).index_add(0, group_S, right_S) / pairs_G, math.nan)
    gates_GL = rows_NC.new_zeros(len(ids_G), rows_NC.shape[1] - 4).index_add(0, group_N, rows_NC[:, 4:])
    return torch.cat([ids_G[:, None], examples_G[:, None].double(), sums_G4, auc_G[:, None], gates_GL], dim=1)
