"""DHEN layers of a task's own, between the layers that all tasks share and the MLP of its head.

Shapes: B batch, K embeddings that a head reads, M embeddings of the last shared layer, D embedding dimension, N dense
features.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.interactions import Axes, with_prefix
from dhen.model.layer import DhenLayer, make_norm
from dhen.model.mixture_of_experts import Output, joined, parted


class TaskLayers(nn.Module):
    """config.task_layers layers, each like a layer without an entry in `layers`.

    >>> config = DhenConfig(num_dense_features=2, task_layers=2, interactions=["linear"], num_embeddings_out=4)
    >>> TaskLayers(config, num_inputs=3, num_read=3)(torch.ones(5, 3, 16), torch.ones(5, 2)).shape
    torch.Size([5, 4, 16])
    """

    def __init__(self, config: DhenConfig, num_inputs: int, num_read: int) -> None:
        """num_inputs: M. num_read: K; it is M with `head_inputs` "last"."""
        super().__init__()
        self.reads_all, self.num_inputs, self.num_outputs = config.head_inputs == "all", num_inputs, num_read
        spec, dim = config.task_layer_spec, config.embedding_dim
        self.layers = nn.ModuleList()
        for _ in range(config.task_layers):
            layer = DhenLayer(spec, num_inputs, dim, config.num_dense_features)
            self.layers.append(layer)
            num_inputs = layer.num_outputs
            self.num_outputs = num_inputs + (self.num_outputs if self.reads_all else 0)
        self.norm = make_norm(spec.norm, num_inputs, dim) if spec.norm_position == "pre" else None

    def forward(self, inputs_BKD: Tensor, dense_BN: Tensor) -> Output:
        """Return what the task's MLP reads, (B, num_outputs, D): the last output, or all of them after `inputs_BKD`.

        With it comes the sum of the layers' losses, if they have any.
        """
        x_BMD, read, losses = inputs_BKD[:, -self.num_inputs :], [inputs_BKD], []
        for layer in self.layers:
            (x_BMD,), of_layer = parted([layer(x_BMD, dense_BN)])
            read.append(x_BMD)
            losses += of_layer
        if self.norm is not None:
            read[-1] = self.norm(x_BMD)
        return joined(torch.cat(read, dim=1) if self.reads_all else read[-1], losses)

    def input_axes(self, dense: Sequence[Hashable]) -> Axes:
        """Which weights belong to which of the N dense features, by their labels."""
        axes: Axes = {}
        inputs: Sequence[Hashable] = range(self.num_inputs)
        for index, layer in enumerate(self.layers):
            axes |= with_prefix(f"layers.{index}", layer.input_axes(inputs, dense))
            inputs = range(layer.num_outputs)
        return axes
