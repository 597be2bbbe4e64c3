"""The multiplicative interaction: quadratic layers over the flattened embeddings, as in QNN-alpha.

Source: Li et al., "Revisiting Feature Interactions from the Perspective of Quadratic Neural Networks for
Click-through Rate Prediction", arXiv 2505.17999, and its public code. We leave out its heads.

Shapes: B batch, M embeddings in, L embeddings out, D embedding dimension, R rows of a quadratic layer.
"""

from collections.abc import Hashable, Sequence

from torch import Tensor, nn

from dhen.model.interactions.linear import MixEmbeddings
from dhen.model.interactions.registry import Axes, Interaction, InteractionContext, register_interaction, with_prefix
from dhen.model.mlp import Activation, BatchNorm, activation_module
from dhen.model.ranges import Depth, ShareBelowOne, Size


class QuadraticLayer(nn.Module):
    """Dropout(x * sum_r Dropout(act(BatchNorm(W_r x + b_r))) + x) over vectors of size `width`, r = 1 to R.

    The activation keeps the rows apart: without it, their sum would be a single matrix.

    >>> import torch
    >>> QuadraticLayer(6, num_rows=2, activation="relu", batch_norm=False, dropout=0.1)(torch.ones(3, 6)).shape
    torch.Size([3, 6])
    """

    def __init__(self, width: int, num_rows: int, activation: Activation, batch_norm: bool, dropout: float) -> None:
        """num_rows: R."""
        super().__init__()
        self.num_rows = num_rows
        self.linear = nn.Linear(width, num_rows * width, bias=not batch_norm)  # as in MLP
        self.norm = BatchNorm(num_rows * width) if batch_norm else None
        self.activation, self.dropout = activation_module(activation), nn.Dropout(dropout)

    def input_axes(self, values: Sequence[Hashable]) -> Axes:
        """Which weights belong to which of the `width` values."""
        rows = {0: [(row, value) for row in range(self.num_rows) for value in values]}
        names = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
        return {"linear.weight": rows | {1: values}} | dict.fromkeys(
            ("linear.bias",) if self.norm is None else names, rows
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width)."""
        h = self.linear(x)
        if self.norm is not None:
            h = self.norm(h)
        h = self.dropout(self.activation(h)).unflatten(1, (self.num_rows, -1))
        return self.dropout(x * h.sum(dim=1) + x)


@register_interaction("multiplicative")
class Multiplicative(Interaction):
    """u = W reshape(Q(flatten(X))): quadratic layers Q over all M * D values, then W in R^(L x M) over the embeddings.

    With a piecewise linear activation, n layers make polynomials of X of degree up to 2^n, piece by piece.

    >>> import torch
    >>> multiplicative = Multiplicative(InteractionContext(num_inputs=5, num_outputs=3, embedding_dim=4))
    >>> multiplicative(torch.ones(2, 5, 4), torch.empty(2, 0)).shape
    torch.Size([2, 3, 4])
    """

    can_start_at_zero = True

    def __init__(
        self,
        context: InteractionContext,
        *,
        num_rows: Size = 2,
        num_layers: Depth = 1,
        dropout: ShareBelowOne = 0.0,
        batch_norm: bool | None = None,
        activation: Activation | None = None,
        use_dense: bool = False,
    ) -> None:
        """num_rows: R. dropout: rate in both places. batch_norm, activation: the layer's if None. Raises ValueError if
        the rows would add up to one.
        """
        super().__init__(context, use_dense=use_dense)
        activation = context.activation if activation is None else activation
        if activation == "identity" and num_rows > 1:
            raise ValueError("num_rows has no effect with activation 'identity'. Use another one, or a single row.")
        width = self.num_rows * context.embedding_dim
        norm = context.batch_norm if batch_norm is None else batch_norm
        layers = [QuadraticLayer(width, num_rows, activation, norm, dropout) for _ in range(num_layers)]
        self.layers = nn.Sequential(*layers)
        self.mix = MixEmbeddings(self.num_rows, context.num_outputs, zero_init=context.zero_init)

    def input_axes(self, inputs: Sequence[Hashable], dense: Sequence[Hashable]) -> Axes:
        """The quadratic layers work on the D values of each embedding."""
        rows = self.row_labels(inputs)
        values = [(row, column) for row in rows for column in range(self.context.embedding_dim)]
        axes = super().input_axes(inputs, dense) | {"mix.weight": {1: rows}}
        for index, layer in enumerate(self.layers):
            axes |= with_prefix(f"layers.{index}", layer.input_axes(values))
        return axes

    def forward(self, x_BMD: Tensor, dense_BN: Tensor) -> Tensor:
        """Return u_BLD."""
        x_BMD = self.rows(x_BMD, dense_BN)
        return self.mix(self.layers(x_BMD.flatten(1)).view_as(x_BMD))
