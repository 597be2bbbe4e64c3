"""How open the gates of the layers are (dhen/model/gate.py), example by example.

Shapes: B examples, L layers with a gate.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dhen.model.modeling_dhen import DhenForClickPrediction


class GateOpenness:
    """Watches the gates of a model in evaluations. layers: the numbers of the layers with a gate, from 0.

    >>> from dhen.model.configuration_dhen import DhenConfig
    >>> config = DhenConfig(num_dense_features=2, num_layers=2, interactions=["linear"], gate="hard")
    >>> model, gates = DhenForClickPrediction(config).eval(), GateOpenness()
    >>> with gates.watching(model):
    ...     output, taken_BL = model(dense=torch.ones(3, 2)), gates.take()
    >>> gates.layers, taken_BL.tolist()
    ([0, 1], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    """

    def __init__(self) -> None:
        self.layers: list[int] = []
        self._seen: dict[int, Tensor] = {}
        self._sums: Tensor | None = None

    @contextmanager
    def watching(self, dense: nn.Module) -> Iterator[None]:
        """Inside this context, forwards of `dense`, a model or an engine around one, are watched."""
        model: DhenForClickPrediction = getattr(dense, "module", dense)
        gates = {number: layer.gate for number, layer in enumerate(model.model.layers) if layer.gate is not None}
        self.layers = list(gates)
        hooks = [
            gate.register_forward_hook(
                lambda gate, _, output, number=number: self._seen.update({number: gate.openness(output[0])})
            )
            for number, gate in gates.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def take(self) -> Tensor | None:
        """The gates_BL of the last forward; None without a gate."""
        if not self.layers:
            return None
        gates_BL = torch.stack([self._seen.pop(number).detach().flatten().float() for number in self.layers], dim=1)
        sums = torch.cat([gates_BL.double().sum(0), gates_BL.new_tensor([len(gates_BL)]).double()])
        self._sums = sums if self._sums is None else self._sums + sums
        return gates_BL

    def mean(self, group: dist.ProcessGroup) -> dict[int, float]:
        """The mean over all examples that were taken on all ranks, by layer. Communicates; all ranks call it."""
        if self._sums is None:
            return {}
        dist.all_reduce(self._sums, group=group)
        *sums, examples = self._sums.tolist()
        return {layer: each / examples for layer, each in zip(self.layers, sums, strict=True)}
