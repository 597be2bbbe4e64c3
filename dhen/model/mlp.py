"""The multi-layer perceptron used for the dense features, the interactions and the head.

Shapes: B batch.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dhen.model.names import check_names

Activation = Literal["relu", "gelu", "silu", "tanh", "identity"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


def activation_module(name: Activation) -> nn.Module:
    """Return the module of an activation. Raises ValueError with the nearest valid name."""
    check_names("activation", [name], get_args(Activation))
    return _ACTIVATIONS[name]()


def autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype if autocast is on. Several products of the result share and keep one cast copy."""
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64  # autocast leaves float64 alone
    return x.to(torch.get_autocast_dtype(device)) if is_cast else x


class BatchNorm(nn.BatchNorm1d):
    """Batch normalization of (B, width) that can also train on batches of one row or none.

    Such a batch has no variance. It is normalized with the running statistics and does not update them.

    >>> import torch
    >>> BatchNorm(3).train()(torch.ones(1, 3)).shape
    torch.Size([1, 3])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each column over the batch. Statistics are stored and applied in float32 or wider."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.running_mean, self.running_var = self.running_mean.to(dtype), self.running_var.to(dtype)
        updates = self.training and x.shape[0] > 1
        if updates:
            self.num_batches_tracked += 1
        return nn.functional.batch_norm(
            x.to(dtype),
            self.running_mean,
            self.running_var,
            self.weight.to(dtype),
            self.bias.to(dtype),
            training=updates,
            momentum=self.momentum,
            eps=self.eps,
        ).to(x.dtype)


class _ZeroLinear(nn.Linear):
    """A linear layer that starts at 0."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class MLP(nn.Sequential):
    """Hidden layers act(BatchNorm(W x + b)), with BatchNorm off by default, then a final linear layer.

    >>> import torch
    >>> MLP(8, [16, 16], 4)(torch.ones(2, 8)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        activation: Activation = "relu",
        batch_norm: bool = False,
        zero_init: bool = False,
    ) -> None:
        """Map (B, in_features) to (B, out_features). `hidden` lists the hidden sizes; [] gives one linear layer.

        zero_init: the last layer starts at 0.
        """
        steps: list[nn.Module] = []
        for size in hidden:
            # A bias would only shift the mean that batch norm subtracts. Its gradient is rounding noise, which Adam
            # scales up to full steps, and the running mean would lag behind.
            steps.append(nn.Linear(in_features, size, bias=not batch_norm))
            if batch_norm:
                steps.append(BatchNorm(size))
            steps.append(activation_module(activation))
            in_features = size
        super().__init__(*steps, (_ZeroLinear if zero_init else nn.Linear)(in_features, out_features))
