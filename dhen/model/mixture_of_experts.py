"""Mixture of experts: a gate chooses a few experts for each example and weights their outputs.

Sources: the top-k gate of Shazeer et al. 2017 (eq. 1 and 3 to 5), and the load-balancing loss of the Switch Transformer
(Fedus et al. 2021, eq. 4 to 6). Nothing here depends on what an expert is.

Shapes: B batch, I inputs, O outputs, E experts, K experts per example, R = B K rows: an example and one of its experts.
"""

from collections.abc import Iterable, Sequence

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


class Gate(nn.Module):
    """G(x) = Softmax(KeepTopK(H(x), K)) with H(x) = x W_g: the weights of the K experts with the largest H.

    With `is_noisy`, H(x) = x W_g + N(0, 1) Softplus(x W_noise) in training. For K = 1, G would always be 1 and W_g
    would learn nothing from clicks, so G is the expert's probability among all, as in the Switch Transformer.

    >>> weights_BK, experts_BK, loss = Gate(8, num_experts=4, num_chosen=2)(torch.ones(3, 8))
    >>> weights_BK.shape, experts_BK.shape, loss.shape
    (torch.Size([3, 2]), torch.Size([3, 2]), torch.Size([]))
    """

    def __init__(
        self, in_features: int, num_experts: int, num_chosen: int, balance: float = 0.01, is_noisy: bool = False
    ) -> None:
        """num_chosen: K. balance: factor alpha of `balance_loss`; 0: none. Raises ValueError if K is more than E."""
        super().__init__()
        if num_chosen > num_experts:
            raise ValueError(f"experts_per_example is {num_chosen}. Use a number up to num_experts, {num_experts}.")
        self.num_experts, self.num_chosen, self.balance = num_experts, num_chosen, balance
        self.linear = nn.Linear(in_features, num_experts, bias=False)
        self.noise = nn.Linear(in_features, num_experts, bias=False) if is_noisy else None

    def forward(self, x_BI: Tensor) -> tuple[Tensor, ...]:
        """Return weights_BK and experts_BK, and in a forward that trains the balance loss times alpha."""
        # Not in autocast's dtype: rounding would change the choice (Switch Transformer, 2.4).
        with torch.autocast(x_BI.device.type, enabled=False):
            x_BI = x_BI.to(self.linear.weight.dtype)
            h_BE = self.linear(x_BI)
            if self.noise is not None and self.training:
                h_BE = h_BE + torch.randn_like(h_BE) * softplus(self.noise(x_BI))
            probabilities_BE = h_BE.to(torch.promote_types(h_BE.dtype, torch.float32)).softmax(1)
        weights_BK, experts_BK = probabilities_BE.topk(self.num_chosen)
        if self.num_chosen > 1:
            weights_BK = weights_BK / weights_BK.sum(1, keepdim=True)
        if self.balance and self.training and torch.is_grad_enabled():
            return weights_BK, experts_BK, self.balance * balance_loss(probabilities_BE, experts_BK)
        return weights_BK, experts_BK


class MixtureOfExperts(nn.Module):
    """y = sum over the chosen experts e of G(x)_e E_e(x). Only the chosen experts are computed, and no row is dropped.

    Each example is copied once per chosen expert, and these R rows are sorted by expert. So all shapes are static.

    >>> from dhen.model.expert_mlps import ExpertMlps
    >>> mixture = MixtureOfExperts(Gate(8, num_experts=4, num_chosen=2), ExpertMlps(4, 8, [16], 3)).eval()
    >>> mixture(torch.ones(5, 8)).shape
    torch.Size([5, 3])
    """

    def __init__(self, gate: Gate, experts: nn.Module) -> None:
        """experts: (rows_RI, experts_R, ends_E) -> rows_RO. Expert e has the rows from ends[e - 1] to ends[e]."""
        super().__init__()
        self.gate, self.experts = gate, experts

    def forward(self, x_BI: Tensor) -> Output:
        """Return y_BO, with the gate's loss if there is one."""
        weights_BK, experts_BK, *losses = self.gate(x_BI)
        order_R = experts_BK.flatten().argsort(stable=True)
        experts_R = experts_BK.flatten()[order_R]
        ends_E = _counts(experts_R, self.gate.num_experts).cumsum(0, dtype=torch.int32)
        sorted_RO = self.experts(x_BI.index_select(0, order_R // self.gate.num_chosen), experts_R, ends_E)
        rows_RO = torch.empty_like(sorted_RO).index_copy(0, order_R, sorted_RO)
        y_BKO = rows_RO.view(*weights_BK.shape, rows_RO.shape[1]) * weights_BK.to(rows_RO.dtype).unsqueeze(2)
        return joined(y_BKO.sum(1), losses)


def _counts(experts_R: Tensor, num_experts: int) -> Tensor:
    """(E,). torch.bincount makes the host wait for a GPU."""
    return (experts_R.unsqueeze(1) == torch.arange(num_experts, device=experts_R.device)).sum(0)
