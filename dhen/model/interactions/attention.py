"""The self-attention interaction (paper 2.3): one transformer encoder layer over the embeddings, then W.

Shapes: B batch, M embeddings in, L embeddings out, D embedding dimension, H heads.
"""

from collections.abc import Hashable, Sequence

from torch import Tensor, nn

from dhen.model.interactions.linear import MixEmbeddings
from dhen.model.interactions.registry import Axes, Interaction, InteractionContext, register_interaction
from dhen.model.mlp import Activation, activation_module
from dhen.model.ranges import ShareBelowOne, Size


class MultiHeadAttention(nn.Module):
    """softmax(Q K^T / sqrt(D / H)) V in H heads, concatenated and mapped by one more linear layer.

    >>> import torch
    >>> MultiHeadAttention(embedding_dim=4, num_heads=2)(torch.ones(3, 5, 4)).shape
    torch.Size([3, 5, 4])
    """

    def __init__(self, embedding_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        """dropout: dropout rate on the attention weights. Raises ValueError if H does not divide D."""
        super().__init__()
        if num_heads < 1 or embedding_dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}. Use a divisor of embedding_dim, {embedding_dim}.")
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_key_value = nn.Linear(embedding_dim, 3 * embedding_dim)
        self.output = nn.Linear(embedding_dim, embedding_dim)

    def forward(self, x_BMD: Tensor, is_seen_BM: Tensor | None = None) -> Tensor:
        """Return (B, M, D). is_seen_BM: whether an embedding can be attended to; None: all can."""
        heads = self.query_key_value(x_BMD).unflatten(2, (3, self.num_heads, -1))
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(dim=2))
        dropout = self.dropout if self.training else 0.0
        mask = None if is_seen_BM is None else is_seen_BM[:, None, None]
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout)
        return self.output(mixed.transpose(1, 2).flatten(2))


@register_interaction("self_attention")
class SelfAttention(Interaction):
    """u = W E(X) with one transformer encoder layer E and W in R^(L x M): H = Norm(X + A(X)), E = Norm(H + FF(H)).

    A: multi-head attention. FF: linear, activation, linear. With `norm_first`: H = X + A(Norm(X)), E = H + FF(Norm(H)).

    >>> import torch
    >>> attention = SelfAttention(InteractionContext(num_inputs=5, num_outputs=3, embedding_dim=4), num_heads=2)
    >>> attention(torch.ones(2, 5, 4), torch.empty(2, 0)).shape
    torch.Size([2, 3, 4])
    """

    can_start_at_zero = True

    def __init__(
        self,
        context: InteractionContext,
        *,
        num_heads: Size = 1,
        feedforward_dim: Size | None = None,
        dropout: ShareBelowOne = 0.0,
        norm_first: bool = False,
        activation: Activation | None = None,
        use_dense: bool = False,
    ) -> None:
        """feedforward_dim: inner size of FF; None: 4 D. dropout: rate within A and FF and on their outputs. activation:
        of FF; the layer's if None. Raises ValueError if num_heads does not divide D.
        """
        super().__init__(context, use_dense=use_dense)
        dim = context.embedding_dim
        inner = 4 * dim if feedforward_dim is None else feedforward_dim
        self.norm_first = norm_first
        self.attention = MultiHeadAttention(dim, num_heads, dropout)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, inner),
            activation_module(context.activation if activation is None else activation),
            nn.Dropout(dropout),
            nn.Linear(inner, dim),
        )
        self.attention_norm = nn.LayerNorm(dim)
        self.feedforward_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.mix = MixEmbeddings(self.num_rows, context.num_outputs, zero_init=context.zero_init)

    def input_axes(self, inputs: Sequence[Hashable], dense: Sequence[Hashable]) -> Axes:
        """W's columns are the embeddings."""
        return super().input_axes(inputs, dense) | {"mix.weight": {1: self.row_labels(inputs)}}

    def forward(self, x_BMD: Tensor, dense_BN: Tensor) -> Tensor:
        """Return u_BLD."""
        x_BMD = self.rows(x_BMD, dense_BN)
        if self.norm_first:
            x_BMD = x_BMD + self.dropout(self.attention(self.attention_norm(x_BMD)))
            x_BMD = x_BMD + self.dropout(self.feedforward(self.feedforward_norm(x_BMD)))
        else:
            x_BMD = self.attention_norm(x_BMD + self.dropout(self.attention(x_BMD)))
            x_BMD = self.feedforward_norm(x_BMD + self.dropout(self.feedforward(x_BMD)))
        return self.mix(x_BMD)
