"""The convolution interaction (paper 2.3): Conv2d over the plane of embeddings, then W.

Shapes: B batch, C channels, M embeddings in, L embeddings out, D embedding dimension.
"""

from collections.abc import Hashable, Sequence

from torch import Tensor, nn

from dhen.model.interactions.linear import MixEmbeddings
from dhen.model.interactions.registry import Axes, Interaction, InteractionContext, register_interaction
from dhen.model.mlp import Activation, activation_module
from dhen.model.ranges import Size


@register_interaction("convolution")
class Convolution(Interaction):
    """u = W act(Conv2d(X)): X is a one-channel M x D image, Conv2d outputs C channels of this size, W in R^(L x C M).

    Conv2d has a bias, which the paper does not print.

    >>> import torch
    >>> convolution = Convolution(InteractionContext(num_inputs=5, num_outputs=3, embedding_dim=4))
    >>> convolution(torch.ones(2, 5, 4), torch.empty(2, 0)).shape
    torch.Size([2, 3, 4])
    """

    can_start_at_zero = True

    def __init__(
        self,
        context: InteractionContext,
        *,
        num_channels: Size = 1,
        kernel_size: Sequence[Size] = (3, 3),
        activation: Activation = "identity",
        use_dense: bool = False,
    ) -> None:
        """num_channels: C. kernel_size: over M and over D; zero padding keeps the size M x D. activation: the paper
        has none.

        Raises ValueError unless kernel_size is two odd numbers, because an even kernel has no center.
        """
        super().__init__(context, use_dense=use_dense)
        if len(kernel_size) != 2 or any(size % 2 == 0 for size in kernel_size):
            raise ValueError(f"kernel_size is {list(kernel_size)}. Use two odd numbers, one for M and one for D.")
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        self.convolution = nn.Conv2d(1, num_channels, tuple(kernel_size), padding=padding)
        self.activation = activation_module(activation)
        self.mix = MixEmbeddings(num_channels * self.num_rows, context.num_outputs, zero_init=context.zero_init)

    def input_axes(self, inputs: Sequence[Hashable], dense: Sequence[Hashable]) -> Axes:
        """W's columns are the M embeddings of each channel."""
        rows, channels = self.row_labels(inputs), range(self.convolution.out_channels)
        mix: Axes = {"mix.weight": {1: [(channel, row) for channel in channels for row in rows]}}
        return super().input_axes(inputs, dense) | mix

    def forward(self, x_BMD: Tensor, dense_BN: Tensor) -> Tensor:
        """Return u_BLD."""
        image_BCMD = self.convolution(self.rows(x_BMD, dense_BN).unsqueeze(1))
        return self.mix(self.activation(image_BCMD).flatten(1, 2))
