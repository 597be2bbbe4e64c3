"""Activation offload by depth (paper 3.1): what the first layers keep for the backward waits in the host's memory.

While a layer computes, what autograd saves of it is copied to pinned memory on a stream of its own. In the backward the
first tensor that a layer asks for starts the copies back of the layer before it, so that they run under its backward.
"""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dhen.dense.activation_checkpointing import first_layers
from dhen.model.modeling_dhen import DhenForClickPrediction

_LEAST_BYTES = 1 << 16
"""Smaller tensors stay: a copy's start costs more than their memory is worth."""


def offload_layers(model: DhenForClickPrediction, layers: str | int, device: torch.device) -> int:
    """Keep activations of the first `layers` layers on the host: "none", "all" or how many; returns how many.

    Losses stay the same to the bit. On CPU there is nowhere to go: nothing is done, and 0 returned. Of layers that are
    recomputed the inputs are kept there. Raises ValueError if the model has fewer layers.
    """
    chosen = first_layers(model, layers)
    if device.type == "cpu" or not chosen:
        return 0
    offload = ActivationOffload(torch.cuda.Stream(device))
    for layer in chosen:
        layer.forward = functools.partial(offload.run, layer.forward)
    return len(chosen)


@dataclass(eq=False)
class _Saved:
    """One saved tensor on the host; `back` on the device, when its turn has come. uses: how often it is asked for."""

    host: Tensor
    device: torch.device
    uses: int = 0
    back: Tensor | None = None
    asked: int = 0


@dataclass(eq=False)
class _Layer:
    """What one layer's forward saved, and the layer before it."""

    before: Callable[[], "_Layer | None"]
    saved: list[_Saved] = field(default_factory=list)
    returned: Any = None


def _nothing() -> None:
    """No layer before."""


class ActivationOffload:
    """Runs layers so that what they save is on the host until their backward.

    stream: for the copies; None, as on CPU, where it only shows that nothing is lost: they are made at once.
    """

    def __init__(self, stream: "torch.cuda.Stream | None") -> None:
        self._stream = stream
        self._copied: torch.cuda.Event | None = None  # what the last layer saved
        self._last: Callable[[], _Layer | None] = _nothing

    def run(self, forward: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """`forward(*arguments)`, offloaded."""
        if not torch.is_grad_enabled():
            return forward(*arguments)
        layer = _Layer(self._last)
        sources: dict[tuple, tuple[Tensor, _Saved]] = {}
        with saved_tensors_hooks(functools.partial(self._pack, layer, sources), functools.partial(self._unpack, layer)):
            result = forward(*arguments)
        if self._stream is not None:
            for source, _ in sources.values():
                source.record_stream(self._stream)
            self._hold_back(result.device)
        sources.clear()  # the graph keeps the hooks, and must not keep the sources with them
        self._last = weakref.ref(layer)  # the graph alone keeps it
        return result

    def _hold_back(self, device: torch.device) -> None:
        """Let no more than two layers wait to be copied: the host queues layers faster than they go."""
        before, self._copied = self._copied, self._stream.record_event()
        if before is not None:
            torch.cuda.current_stream(device).wait_event(before)

    def _pack(self, layer: _Layer, sources: dict, tensor: Tensor) -> "Tensor | _Saved":
        is_weight = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)  # ZeRO moves it about
        if is_weight or tensor.numel() * tensor.element_size() < _LEAST_BYTES:
            return tensor
        # Several operations save one tensor. `sources` keeps it alive, so its address stays its own meanwhile.
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version)
        if key not in sources:
            saved = _Saved(
                self._to_host(tensor.detach()), tensor.device
            )  # a copy with a graph would keep it in a circle
            sources[key] = (tensor, saved)
            layer.saved.append(saved)
        saved = sources[key][1]
        saved.uses += 1
        return saved

    def _unpack(self, layer: _Layer, saved: "Tensor | _Saved") -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._last = _nothing  # a backward has begun, so the next layer that runs is a first one
        if layer.returned is None:
            self._bring_back(layer)
        before = layer.before()
        if before is not None and before.returned is None:
            self._bring_back(before)
        if saved.back is None:  # a second backward through the same graph
            saved.back = saved.host.to(saved.device)
        elif self._stream is not None:
            torch.cuda.current_stream(saved.device).wait_event(layer.returned)
            saved.back.record_stream(torch.cuda.current_stream(saved.device))
        tensor = saved.back
        saved.asked += 1
        if saved.asked % saved.uses == 0:
            saved.back = None
        return tensor

    def _to_host(self, tensor: Tensor) -> Tensor:
        if self._stream is None:
            return tensor.clone()
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            return host.copy_(tensor, non_blocking=True)

    def _bring_back(self, layer: _Layer) -> None:
        layer.returned = True
        if self._stream is None:
            for saved in layer.saved:
                saved.back = saved.host.clone()
            return
        if layer.saved:  # not before the backward has come here, however far ahead the host has queued it
            self._stream.wait_stream(torch.cuda.current_stream(layer.saved[0].device))
        with torch.cuda.stream(self._stream):
            for saved in layer.saved:
                saved.back = saved.host.to(saved.device, non_blocking=True)
            layer.returned = self._stream.record_event()
