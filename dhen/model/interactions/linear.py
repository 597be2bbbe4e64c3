"""The linear interaction (paper 2.3, eq. 6) and MixEmbeddings, the W with which most interactions end.

Shapes: B batch, M embeddings in, L embeddings out, D embedding dimension.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dhen.model.interactions.registry import Axes, Interaction, InteractionContext, register_interaction
from dhen.model.mlp import autocast


def mix(weight: Tensor, x_BMD: Tensor, transposed: bool = False) -> Tensor:
    """u = W x over M, in autocast's dtype if autocast is on. weight: W in R^(L x M), or W^T if `transposed`."""
    return _Mix.apply(weight, autocast(x_BMD), transposed)


class _Mix(torch.autograd.Function):
    """W x that keeps x and the weight alone, and whose dW is one product over the batch and D.

    bmm's own backward makes dW for each example before it sums them, and autocast would cast W for each example. Here
    dW is summed in float32 and rounded once to autocast's dtype, like that of nn.Linear. Saving the weight itself, not
    a view or a copy, lets ZeRO stage 3 free it between forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x_BMD: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(weight, x_BMD)
        ctx.transposed = transposed
        # bmm of an expanded view: matmul would copy x_BMD to fold its batch, which is slower on CPU in float32.
        return torch.bmm(_expanded(weight.t() if transposed else weight, x_BMD), x_BMD)

    @staticmethod
    def backward(ctx: Any, du_BLD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, x_BMD = ctx.saved_tensors
        dweight = dx_BMD = None
        if ctx.needs_input_grad[0]:
            left, right = (x_BMD, du_BLD) if ctx.transposed else (du_BLD, x_BMD)
            dweight = (left.transpose(0, 1).flatten(1) @ right.transpose(0, 1).flatten(1).t()).to(weight.dtype)
        if ctx.needs_input_grad[1]:
            dx_BMD = torch.bmm(_expanded(weight if ctx.transposed else weight.t(), du_BLD), du_BLD)
        return dweight, dx_BMD, None


def _expanded(weight: Tensor, batch: Tensor) -> Tensor:
    return weight.to(batch.dtype).contiguous().expand(batch.shape[0], -1, -1)  # cast once, then expanded


class MixEmbeddings(nn.Module):
    """u = W x over M: each output embedding is a weighted sum of the input embeddings. W has no bias by default.

    >>> MixEmbeddings(5, 3)(torch.ones(2, 5, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, num_inputs: int, num_outputs: int, bias: bool = False, zero_init: bool = False) -> None:
        """W is (L, M) with Glorot initialization, or 0 with `zero_init`. With `bias`, b is (L, 1) and starts at 0."""
        super().__init__()
        self.zero_init = zero_init
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.empty(num_outputs, 1)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W again, or set it to 0, and set b to 0."""
        (nn.init.zeros_ if self.zero_init else nn.init.xavier_uniform_)(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_BMD: Tensor) -> Tensor:
        """Return u_BLD."""
        u_BLD = mix(self.weight, x_BMD)
        return u_BLD if self.bias is None else u_BLD + self.bias


@register_interaction("linear")
class Linear(Interaction):
    """u = W x over M (eq. 6), W in R^(L x M).

    >>> linear = Linear(InteractionContext(num_inputs=5, num_outputs=3, embedding_dim=4))
    >>> linear(torch.ones(2, 5, 4), torch.empty(2, 0)).shape
    torch.Size([2, 3, 4])
    """

    can_start_at_zero = True

    def __init__(self, context: InteractionContext, *, bias: bool = False, use_dense: bool = False) -> None:
        """bias: add b_l to each output embedding l. The paper has no bias here."""
        super().__init__(context, use_dense=use_dense)
        self.mix = MixEmbeddings(self.num_rows, context.num_outputs, bias, context.zero_init)

    def input_axes(self, inputs: Sequence[Hashable], dense: Sequence[Hashable]) -> Axes:
        """W's columns are the embeddings."""
        return super().input_axes(inputs, dense) | {"mix.weight": {1: self.row_labels(inputs)}}

    def forward(self, x_BMD: Tensor, dense_BN: Tensor) -> Tensor:
        """Return u_BLD."""
        return self.mix(self.rows(x_BMD, dense_BN))
