"""Two kinds of deep cross (paper 2.3): eq. 7 as printed, and DCN-V2's cross of the flattened embeddings.

Shapes: B batch, M embeddings in, L embeddings out, D embedding dimension.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from dhen.model.interactions.linear import MixEmbeddings, mix
from dhen.model.interactions.registry import Axes, Interaction, InteractionContext, register_interaction, with_prefix
from dhen.model.mlp import autocast
from dhen.model.ranges import Depth, Size


@register_interaction("deep_cross")
class DeepCross(Interaction):
    """u = (X X^T) W + b (eq. 7) for the paper's X in R^(D x M), so X X^T is D x D, W and b in R^(D x L).

    We store x_BMD = X^T, so X X^T = x^T x, which is symmetric, and u_BLD = u^T = W^T (x^T x) + b^T.

    >>> cross = DeepCross(InteractionContext(num_inputs=5, num_outputs=3, embedding_dim=4))
    >>> cross(torch.ones(2, 5, 4), torch.empty(2, 0)).shape
    torch.Size([2, 3, 4])
    """

    can_start_at_zero = True

    def __init__(self, context: InteractionContext, *, use_dense: bool = False) -> None:
        """W uses Glorot initialization, or starts at 0 as the context says. b starts at 0."""
        super().__init__(context, use_dense=use_dense)
        self.weight = nn.Parameter(torch.empty(context.embedding_dim, context.num_outputs))
        self.bias = nn.Parameter(torch.empty(context.embedding_dim, context.num_outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W again, or set it to 0, and set b to 0."""
        (nn.init.zeros_ if self.context.zero_init else nn.init.xavier_uniform_)(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x_BMD: Tensor, dense_BN: Tensor) -> Tensor:
        """Return u_BLD."""
        x_BMD = autocast(self.rows(x_BMD, dense_BN))
        u_BLD = mix(self.weight, torch.bmm(x_BMD.transpose(1, 2), x_BMD), transposed=True)
        return u_BLD + self.bias.t().to(u_BLD.dtype)


class CrossNet(nn.Module):
    """x_(l+1) = x_0 * (W_l x_l + b_l) + x_l over vectors of size `width` (DCN-V2), with W_l = U_l V_l if low rank.

    >>> CrossNet(6, num_cross_layers=2, cross_width=3)(torch.ones(2, 6)).shape
    torch.Size([2, 6])
    """

    def __init__(self, width: int, num_cross_layers: int, cross_width: int | None = None) -> None:
        """cross_width: the rank of W_l = U_l V_l, with U_l (width, cross_width) and V_l (cross_width, width). None: W_l
        is a full matrix.
        """
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(num_cross_layers):
            if cross_width is None:
                self.layers.append(nn.Linear(width, width))
            else:
                down, up = nn.Linear(width, cross_width, bias=False), nn.Linear(cross_width, width)
                self.layers.append(nn.Sequential(down, up))

    def input_axes(self, values: Sequence[Hashable]) -> Axes:
        """Which weights belong to which of the `width` values."""
        axes: Axes = {}
        for index, layer in enumerate(self.layers):
            if isinstance(layer, nn.Linear):
                axes[f"layers.{index}.weight"] = {0: values, 1: values}
                axes[f"layers.{index}.bias"] = {0: values}
            else:
                axes[f"layers.{index}.0.weight"] = {1: values}
                axes[f"layers.{index}.1.weight"] = axes[f"layers.{index}.1.bias"] = {0: values}
        return axes

    def forward(self, x0: Tensor) -> Tensor:
        """Return (B, width)."""
        x = x0
        for layer in self.layers:
            x = torch.addcmul(x, x0, layer(x))
        return x


@register_interaction("deep_cross_flattened")
class FlattenedDeepCross(Interaction):
    """u = W reshape(cross(flatten(X))): DCN-V2's cross layers over all M * D values, then W over the M embeddings.

    The crossed vector still holds M embeddings, so W in R^(L x M) maps them to L, as in eq. 6.

    >>> cross = FlattenedDeepCross(InteractionContext(num_inputs=5, num_outputs=3, embedding_dim=4), cross_width=2)
    >>> cross(torch.ones(2, 5, 4), torch.empty(2, 0)).shape
    torch.Size([2, 3, 4])
    """

    can_start_at_zero = True

    def __init__(
        self,
        context: InteractionContext,
        *,
        num_cross_layers: Depth = 1,
        cross_width: Size | None = None,
        use_dense: bool = False,
    ) -> None:
        """num_cross_layers, cross_width: see CrossNet. cross_width None: full (M * D) x (M * D) weights."""
        super().__init__(context, use_dense=use_dense)
        self.cross = CrossNet(self.num_rows * context.embedding_dim, num_cross_layers, cross_width)
        self.mix = MixEmbeddings(self.num_rows, context.num_outputs, zero_init=context.zero_init)

    def input_axes(self, inputs: Sequence[Hashable], dense: Sequence[Hashable]) -> Axes:
        """The cross layers work on the D values of each embedding."""
        columns = range(self.context.embedding_dim)
        values = [(row, column) for row in self.row_labels(inputs) for column in columns]
        mix: Axes = {"mix.weight": {1: self.row_labels(inputs)}}
        return super().input_axes(inputs, dense) | mix | with_prefix("cross", self.cross.input_axes(values))

    def forward(self, x_BMD: Tensor, dense_BN: Tensor) -> Tensor:
        """Return u_BLD."""
        x_BMD = self.rows(x_BMD, dense_BN)
        return self.mix(self.cross(x_BMD.flatten(1)).view_as(x_BMD))
