"""The linear interaction (paper 2.3, eq. 6) and MixEmbeddings, the W with which most interactions end.

Shapes: B batch, M embeddings in, L embeddings out, D embedding dimension.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from dhen.model.interactions.registry import Axes, Interaction, InteractionContext, register_interaction


class MixEmbeddings(nn.Module):
    """u = W x over M: each output embedding is a weighted sum of the input embeddings. W has no bias by default.

    >>> MixEmbeddings(5, 3)(torch.ones(2, 5, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, num_inputs: int, num_outputs: int, bias: bool = False) -> None:
        """W is (L, M) with Glorot initialization. With `bias`, b is (L, 1) and starts at 0."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.empty(num_outputs, 1)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W again and set b to 0."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_BMD: Tensor) -> Tensor:
        """Return u_BLD."""
        # bmm of an expanded view: matmul would copy x_BMD to fold its batch, which is three times slower on CPU.
        u_BLD = torch.bmm(self.weight.expand(x_BMD.shape[0], -1, -1), x_BMD)
        return u_BLD if self.bias is None else u_BLD + self.bias


@register_interaction("linear")
class Linear(Interaction):
    """u = W x over M (eq. 6), W in R^(L x M).

    >>> linear = Linear(InteractionContext(num_inputs=5, num_outputs=3, embedding_dim=4))
    >>> linear(torch.ones(2, 5, 4), torch.empty(2, 0)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, context: InteractionContext, *, bias: bool = False, use_dense: bool = False) -> None:
        """bias: add b_l to each output embedding l. The paper has no bias here."""
        super().__init__(context, use_dense=use_dense)
        self.mix = MixEmbeddings(self.num_rows, context.num_outputs, bias)

    def input_axes(self, inputs: Sequence[Hashable], dense: Sequence[Hashable]) -> Axes:
        """W's columns are the embeddings."""
        return super().input_axes(inputs, dense) | {"mix.weight": {1: self.row_labels(inputs)}}

    def forward(self, x_BMD: Tensor, dense_BN: Tensor) -> Tensor:
        """Return u_BLD."""
        return self.mix(self.rows(x_BMD, dense_BN))
