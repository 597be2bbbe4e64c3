"""Mixture of experts: a gate chooses a few experts for each example and weights their outputs.

Sources: the top-k gate of Shazeer et al. 2017 (eq. 1 and 3 to 5), the capacity of GShard (Lepikhin et al. 2020,
algorithm 1), the load-balancing loss of the Switch Transformer (Fedus et al. 2021, eq. 4 to 6), and the z-loss of
ST-MoE (Zoph et al. 2022, eq. 5). Nothing here depends on what an expert is.

Shapes: B batch, I inputs, O outputs, E experts, K experts per example, R = B K rows: an example and one of its experts.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

Output = Tensor | tuple[Tensor, Tensor]
"""A module's output, alone or with a scalar to add to the training loss.

The scalar is returned, not stored: recomputation then counts it once, and ZeRO and torch.compile see it as any output.
"""


def parted(outputs: Iterable[Output]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of modules, and the scalars that came with them."""
    pairs = [output if isinstance(output, tuple) else (output,) for output in outputs]
    return [tensor for tensor, *_ in pairs], [loss for _, *losses in pairs for loss in losses]


def joined(output: Tensor, losses: Sequence[Tensor]) -> Output:
    """The output, with the sum of the scalars if there are any."""
    return (output, torch.stack(list(losses)).sum()) if losses else output


def balance_loss(probabilities_BE: Tensor, experts_BK: Tensor) -> Tensor:
    """E sum_e f_e P_e (eq. 4 to 6, without alpha): f_e is expert e's share of the choices, P_e its mean probability.

    It is 1 if all experts are equal. Only P has a gradient. An empty batch has loss 0, with a gradient of 0.
    """
    num_examples, num_experts = probabilities_BE.shape
    counts_E = _counts(experts_BK.flatten(), num_experts).to(probabilities_BE.dtype)
    shares_E = counts_E / max(experts_BK.numel(), 1)
    return num_experts * (shares_E * probabilities_BE.sum(0)).sum() / max(num_examples, 1)


def z_loss(h_BE: Tensor) -> Tensor:
    """1/B sum_b (log sum_e exp h_be)^2 (ST-MoE, eq. 5): keeps the gate's logits small. An empty batch has loss 0."""
    return h_BE.logsumexp(1).square().sum() / max(h_BE.shape[0], 1)


class Gate(nn.Module):
    """G(x) = Softmax(KeepTopK(H(x), K)) with H(x) = x W_g: the weights of the K experts with the largest H.

    With `is_noisy`, H(x) = x W_g + N(0, 1) Softplus(x W_noise) in training. For K = 1, G would always be 1 and W_g
    would learn nothing from clicks, so G is the expert's probability among all, as in the Switch Transformer.

    >>> weights_BK, experts_BK, loss = Gate(8, num_experts=4, num_chosen=2)(torch.ones(3, 8))
    >>> weights_BK.shape, experts_BK.shape, loss.shape
    (torch.Size([3, 2]), torch.Size([3, 2]), torch.Size([]))
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        num_chosen: int,
        balance: float = 0.01,
        is_noisy: bool = False,
        z_factor: float = 0.0,
    ) -> None:
        """num_chosen: K. balance: factor of `balance_loss`. z_factor: of `z_loss`. With 0, there is no such loss.

        Raises ValueError if K is more than E.
        """
        super().__init__()
        if num_chosen > num_experts:
            raise ValueError(
                f"experts_per_example is {num_chosen}. Use a number up to that of the experts, {num_experts}."
            )
        self.num_experts, self.num_chosen, self.balance, self.z_factor = num_experts, num_chosen, balance, z_factor
        self.linear = nn.Linear(in_features, num_experts, bias=False)
        self.noise = nn.Linear(in_features, num_experts, bias=False) if is_noisy else None

    def forward(self, x_BI: Tensor) -> tuple[Tensor, ...]:
        """Return weights_BK and experts_BK, and in a forward that trains the losses times their factors."""
        # Not in autocast's dtype: rounding would change the choice (Switch Transformer, 2.4).
        with torch.autocast(x_BI.device.type, enabled=False):
            x_BI = x_BI.to(self.linear.weight.dtype)
            h_BE = self.linear(x_BI)
            if self.noise is not None and self.training:
                h_BE = h_BE + torch.randn_like(h_BE) * softplus(self.noise(x_BI))
            h_BE = h_BE.to(torch.promote_types(h_BE.dtype, torch.float32))
            probabilities_BE = h_BE.softmax(1)
        weights_BK, experts_BK = probabilities_BE.topk(self.num_chosen)
        if self.num_chosen > 1:
            weights_BK = weights_BK / weights_BK.sum(1, keepdim=True)
        losses = []
        if self.training and torch.is_grad_enabled():
            losses += [self.balance * balance_loss(probabilities_BE, experts_BK)] if self.balance else []
            losses += [self.z_factor * z_loss(h_BE)] if self.z_factor else []
        return weights_BK, experts_BK, *losses


class MixtureOfExperts(nn.Module):
    """y = sum over the chosen experts e of G(x)_e E_e(x). Only the chosen experts are computed.

    Each example is copied once per chosen expert, and these R rows are sorted by expert. So all shapes are static.

    In training, an expert with a capacity computes at most ceil(capacity_factor R / E) rows: first the examples whose
    first choice it is, in their order, then those whose second choice it is, and so on. The rest is dropped and adds 0
    to y. `row_counts` counts all rows and the dropped ones, since the start of the process.

    >>> from dhen.model.expert_mlps import ExpertMlps
    >>> mixture = MixtureOfExperts(Gate(8, num_experts=4, num_chosen=2), ExpertMlps(4, 8, [16], 3)).eval()
    >>> mixture(torch.ones(5, 8)).shape
    torch.Size([5, 3])
    """

    def __init__(self, gate: Gate, experts: nn.Module, capacity_factor: float | None = None) -> None:
        """experts: (*rows_RI, experts_R, ends_E) -> rows_RO. Expert e has the rows from ends[e - 1] to ends[e].

        capacity_factor: from 1 on; None: no limit. With one, the rows after the last end are dropped: experts must give
        0 for them.
        """
        super().__init__()
        self.gate, self.experts, self.capacity_factor = gate, experts, capacity_factor
        counts = None if capacity_factor is None else torch.empty(2, dtype=torch.int64)
        self.register_buffer("row_counts", counts, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the counts of rows at 0."""
        if self.row_counts is not None:
            self.row_counts.zero_()

    def forward(self, x_BI: Tensor, *others: Tensor) -> Output:
        """Return y_BO, with the sum of the losses of the gate and the experts if there are any.

        x_BI: may have several axes of inputs, which the gate reads as one. others: what the experts also get, a row per
        example. The experts may return several axes of outputs.
        """
        weights_BK, experts_BK, *losses = self.gate(x_BI.flatten(1))
        if self.capacity_factor is not None and self.training:
            experts_BK = self._within_capacity(experts_BK)
        order_R = experts_BK.flatten().argsort(stable=True)
        experts_R = experts_BK.flatten()[order_R]
        ends_E = _counts(experts_R, self.gate.num_experts).cumsum(0, dtype=torch.int32)
        examples_R = order_R // self.gate.num_chosen
        rows = [each.index_select(0, examples_R) for each in (x_BI, *others)]
        (sorted_RO,), of_experts = parted([self.experts(*rows, experts_R, ends_E)])
        rows_RO = torch.empty_like(sorted_RO).index_copy(0, order_R, sorted_RO)
        weights_BKO = weights_BK.to(rows_RO.dtype).view(*weights_BK.shape, *[1] * (rows_RO.dim() - 1))
        y_BKO = rows_RO.view(*weights_BK.shape, *rows_RO.shape[1:]) * weights_BKO
        return joined(y_BKO.sum(1), [*losses, *of_experts])

    def _within_capacity(self, experts_BK: Tensor) -> Tensor:
        """experts_BK, with E, which is no expert, for choices of experts that are full. Counts them."""
        capacity = math.ceil(self.capacity_factor * experts_BK.numel() / self.gate.num_experts)
        chosen_RE = _is_of(experts_BK.t().flatten(), self.gate.num_experts)  # all first choices, then all second ones
        places_R = (chosen_RE.cumsum(0) * chosen_RE).sum(1)
        is_dropped_BK = (places_R > capacity).view(experts_BK.t().shape).t()
        self.row_counts += torch.stack([torch.ones_like(is_dropped_BK).sum(), is_dropped_BK.sum()])
        return experts_BK.masked_fill(is_dropped_BK, self.gate.num_experts)


class ModuleExperts(nn.ModuleList):
    """Modules as experts, each on its rows. Rows of no expert give 0.

    Every module runs in every forward, if need be on no rows: ZeRO stage 3 gathers weights when their module runs, and
    all ranks must gather in the same order. The host waits for the sizes of the groups.

    is_even: gives all experts equally many rows, whatever the gate chose, for a trace without values.

    >>> experts_R, ends_E = torch.tensor([0, 1, 1]), torch.tensor([1, 3])
    >>> ModuleExperts([nn.Linear(4, 5), nn.Linear(4, 5)])(torch.ones(3, 4), experts_R, ends_E).shape
    torch.Size([3, 5])
    """

    is_even = False

    def forward(self, *inputs: Tensor) -> Output:
        """inputs: of `MixtureOfExperts`'s experts. Returns rows_RO, with the sum of the modules' losses."""
        *rows, _, ends_E = inputs
        num_rows = rows[0].shape[0]
        ends = [num_rows * (e + 1) // len(self) for e in range(len(self))] if self.is_even else ends_E.tolist()
        sizes = [last - first for first, last in pairwise([0, *ends, num_rows])]
        groups = zip(*(each.split(sizes) for each in rows), strict=True)  # slices would each make a whole gradient
        outputs, losses = parted(expert(*group) for expert, group in zip(self, groups, strict=False))
        dropped_RO = outputs[0].new_zeros(sizes[-1], *outputs[0].shape[1:])
        return joined(torch.cat([*outputs, dropped_RO]), losses)


def dropped_rows(model: nn.Module) -> Tensor | None:
    """All rows, and those that experts of `model` dropped because they were full; None without capacities. (2,)."""
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    counts = [mixture.row_counts for mixture in mixtures if mixture.row_counts is not None]
    return torch.stack(counts).sum(0) if counts else None


def _is_of(experts_R: Tensor, num_experts: int) -> Tensor:
    """(R, E)."""
    return experts_R.unsqueeze(1) == torch.arange(num_experts, device=experts_R.device)


def _counts(experts_R: Tensor, num_experts: int) -> Tensor:
    """(E,). torch.bincount makes the host wait for a GPU."""
    return _is_of(experts_R, num_experts).sum(0)
