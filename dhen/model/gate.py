"""Gates of layers: each example chooses which layers it passes through, and so its order of interaction.

The paper names gates as future work. A gate reads a layer's input X, and scales the output of the layer's ensemble by
g: Norm(g Ensemble(X) + ShortCut(X)). With z = w vec(X) + b:

soft: g = sigmoid(z).
hard: g = 1 if z > 0, else 0. In training, all is computed, and the gradient of z is that of sigmoid(z), a
straight-through estimator (Bengio et al. 2013, arXiv 1308.3432, section 5). In an evaluation, the interactions get only
the examples whose gate is open. The mean of sigmoid(z) is added to the loss, times `gate_sparsity`.

Shapes: B batch, M embeddings in, L embeddings out, D embedding dimension.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

GateKind = Literal["none", "soft", "hard"]
_START = 2.0
"""b at the start: gates begin almost open, so that a layer learns before its gate closes."""


class LayerGate(nn.Module):
    """Returns g (B, 1, 1), and in a forward that trains the loss of a hard gate.

    skips: whether a hard gate keeps closed examples from the interactions in an evaluation; False computes them and
    multiplies by 0, for a trace without values.

    >>> LayerGate("soft", num_inputs=3, embedding_dim=4, sparsity=0.0)(torch.ones(5, 3, 4))[0].shape
    torch.Size([5, 1, 1])
    """

    skips = True

    def __init__(self, kind: GateKind, num_inputs: int, embedding_dim: int, sparsity: float) -> None:
        """num_inputs: M. sparsity: factor of a hard gate's loss."""
        super().__init__()
        self.is_hard, self.sparsity = kind == "hard", sparsity
        self.weight = nn.Parameter(torch.empty(1, num_inputs * embedding_dim))
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the gate be almost open for all examples."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, _START)

    def forward(self, x_BMD: Tensor) -> tuple[Tensor, ...]:
        """Return g_B11, in the dtype of the weights, then the loss if there is one."""
        with torch.autocast(x_BMD.device.type, enabled=False):  # rounding would change the choice
            z_B1 = nn.functional.linear(x_BMD.flatten(1).to(self.weight.dtype), self.weight, self.bias)
        soft_B1 = z_B1.sigmoid()
        if not self.is_hard:
            return (soft_B1.unsqueeze(2),)
        open_B1 = (z_B1 > 0).to(soft_B1.dtype)
        gate_B11 = (open_B1 + (soft_B1 - soft_B1.detach())).unsqueeze(2)
        if self.sparsity and self.training and torch.is_grad_enabled():
            return gate_B11, self.sparsity * soft_B1.float().sum() / max(soft_B1.shape[0], 1)
        return (gate_B11,)

    def apply_to(
        self, compute: Callable[[Tensor, Tensor], Tensor], gate_B11: Tensor, x_BMD: Tensor, dense_BN: Tensor
    ) -> Tensor:
        """g_BLD = gate * compute(x, dense), without the rows whose gate is closed where they are not needed."""
        if not self.is_hard or self.training or torch.is_grad_enabled() or not self.skips:
            u_BLD = compute(x_BMD, dense_BN)
            return u_BLD * gate_B11.to(u_BLD.dtype)
        rows = gate_B11.flatten().nonzero().squeeze(1)
        u_RLD = compute(x_BMD.index_select(0, rows), dense_BN.index_select(0, rows))
        return u_RLD.new_zeros(x_BMD.shape[0], *u_RLD.shape[1:]).index_copy(0, rows, u_RLD)
