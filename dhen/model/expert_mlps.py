"""MLPs as experts of a mixture. A layer of all of them is one operation, with static shapes, on rows sorted by expert.

On an H100 or newer in bf16, the operation is one kernel. Otherwise it is a product per expert, and a GPU's host waits
for the sizes of the groups: once per forward, in bf16 for each operation.

Shapes: R rows, E experts, I inputs, O outputs. Expert e has the rows from ends[e - 1] to ends[e].
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from dhen.model.mlp import Activation, activation_module, autocast


# torch's own grouped_mm takes no float64 and no odd sizes, and float32 neither on fake tensors nor in torch.compile.
@torch.library.custom_op("dhen::grouped_mm", mutates_args=())
def grouped_mm(rows_RI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """x W_e for each row x of expert e: (R, O)."""
    if ends_E.is_cuda:
        rows_RO = F.grouped_mm(_aligned(rows_RI), _aligned(weight_EIO, 2), offs=ends_E)
        return rows_RO[:, : weight_EIO.shape[2]].contiguous()
    rows_RO = rows_RI.new_empty(rows_RI.shape[0], weight_EIO.shape[2])
    for expert, rows in enumerate(_groups(ends_E)):
        torch.mm(rows_RI[rows], weight_EIO[expert], out=rows_RO[rows])
    return rows_RO


@torch.library.custom_op("dhen::grouped_outer", mutates_args=())
def grouped_outer(rows_RI: Tensor, rows_RO: Tensor, ends_E: Tensor) -> Tensor:
    """X^T Y of the rows of each expert: (E, I, O)."""
    shape = (ends_E.shape[0], rows_RI.shape[1], rows_RO.shape[1])
    if ends_E.is_cuda:
        products_EIO = F.grouped_mm(_aligned(rows_RI).t(), _aligned(rows_RO), offs=ends_E)
        return products_EIO[:, : shape[1], : shape[2]].contiguous()
    products_EIO = rows_RI.new_empty(shape)
    for expert, rows in enumerate(_groups(ends_E)):
        torch.mm(rows_RI[rows].t(), rows_RO[rows], out=products_EIO[expert])
    return products_EIO


grouped_mm.register_fake(lambda rows, weight, ends: rows.new_empty(rows.shape[0], weight.shape[2]))
grouped_outer.register_fake(lambda rows, others, ends: rows.new_empty(ends.shape[0], rows.shape[1], others.shape[1]))


@register_flop_formula([torch.ops.dhen.grouped_mm, torch.ops.dhen.grouped_outer])
def _flops(rows_RI: Sequence[int], other: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * rows_RI[0] * rows_RI[1] * other[-1]


def _groups(ends_E: Tensor) -> Iterator[slice]:
    return (slice(first, last) for first, last in pairwise([0, *ends_E.tolist()]))


def _aligned(tensor: Tensor, num_axes: int = 1) -> Tensor:
    """Contiguous, with the last axes padded with zeros to multiples of 16 bytes in bf16, which torch's kernel needs."""
    sizes = reversed(tensor.shape[-num_axes:])
    return F.pad(tensor, [pad for size in sizes for pad in (0, -size % 8)]).contiguous()


class _GroupedAffine(torch.autograd.Function):
    """Keeps the weight itself, not a copy in the rows' dtype, so that ZeRO stage 3 can free it until the backward."""

    @staticmethod
    def forward(
        ctx: Any, rows_RI: Tensor, weight_EIO: Tensor, bias_EO: Tensor, experts_R: Tensor, ends_E: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows_RI, weight_EIO, ends_E)
        biases_RO = bias_EO.to(rows_RI.dtype).index_select(0, experts_R)
        return grouped_mm(rows_RI, weight_EIO.to(rows_RI.dtype), ends_E).add_(biases_RO)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        rows_RI, weight_EIO, ends_E = ctx.saved_tensors
        drows_RI = dweight_EIO = dbias_EO = None
        if ctx.needs_input_grad[0]:
            drows_RI = grouped_mm(grad_RO, weight_EIO.to(grad_RO.dtype).transpose(1, 2), ends_E)
        if ctx.needs_input_grad[1]:
            dweight_EIO = grouped_outer(rows_RI, grad_RO, ends_E).to(weight_EIO.dtype)
        if ctx.needs_input_grad[2]:  # a product: the gradient of index_select is a sum by atomics on a GPU
            ones_R1 = grad_RO.new_ones(grad_RO.shape[0], 1)
            dbias_EO = grouped_outer(ones_R1, grad_RO, ends_E).squeeze(1).to(weight_EIO.dtype)
        return drows_RI, dweight_EIO, dbias_EO, None, None


class _GroupedLinear(nn.Module):
    """x W_e + b_e for each row x of expert e. The initialization is that of nn.Linear, or 0 with `zero_init`."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, zero_init: bool = False) -> None:
        super().__init__()
        self.bound = 0.0 if zero_init else in_features**-0.5
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights again."""
        nn.init.uniform_(self.weight, -self.bound, self.bound)
        nn.init.uniform_(self.bias, -self.bound, self.bound)

    def forward(self, rows_RI: Tensor, experts_R: Tensor, ends_E: Tensor) -> Tensor:
        """Return rows_RO, in the dtype of rows_RI."""
        return _GroupedAffine.apply(rows_RI, self.weight, self.bias, experts_R, ends_E)


class ExpertMlps(nn.Module):
    """E MLPs of the same sizes, without batch norm.

    >>> experts_R, ends_E = torch.tensor([0, 1]), torch.tensor([1, 2], dtype=torch.int32)
    >>> ExpertMlps(2, 4, [16], 3)(torch.ones(2, 4), experts_R, ends_E).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        activation: Activation = "relu",
        zero_init: bool = False,
    ) -> None:
        """hidden, zero_init: of each expert, as in `MLP`."""
        super().__init__()
        sizes = list(pairwise([in_features, *hidden, out_features]))
        layers = [_GroupedLinear(num_experts, *pair, zero_init and pair is sizes[-1]) for pair in sizes]
        self.layers, self.activation = nn.ModuleList(layers), activation_module(activation)

    def forward(self, rows_RI: Tensor, experts_R: Tensor, ends_E: Tensor) -> Tensor:
        """Return rows_RO."""
        x = autocast(rows_RI)
        ends_E = ends_E if x.dtype == torch.bfloat16 else ends_E.cpu()
        for layer in self.layers[:-1]:
            x = self.activation(layer(x, experts_R, ends_E))
        return self.layers[-1](x, experts_R, ends_E)
