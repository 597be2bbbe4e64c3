"""Activation offload by layer (paper 3.1): the first layers keep their activations in host memory until the backward.

During a layer's forward, the tensors that autograd saves are copied to pinned memory on a separate stream. When a
layer's backward asks for its first tensor, the copies of the previous layer's tensors back to the device begin, so that
they overlap with this layer's backward.
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
from dhen.model.mixture_of_experts import Output
from dhen.model.modeling_dhen import DhenForClickPrediction

_LEAST_BYTES = 1 << 16
"""Smaller tensors stay on the device: they save too little memory to pay for launching a copy."""


def offload_layers(model: DhenForClickPrediction, layers: str | int, device: torch.device) -> int:
    """Offload activations of the first `layers` layers ("none", "all" or a number). Returns the number of layers.

    Losses are bit-identical. On CPU, does nothing and returns 0. For recomputed layers, the inputs are offloaded.
    Raises ValueError if the model has fewer layers.
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
    """One saved tensor. host: the copy in host memory. back: the copy on the device, once it has been fetched.

    uses: how many times a backward needs it. asked: how many times it has been requested.
    """

    host: Tensor
    device: torch.device
    uses: int = 0
    back: Tensor | None = None
    asked: int = 0


@dataclass(eq=False)
class _Layer:
    """The tensors that one layer's forward saved, and the layer before it."""

    before: Callable[[], "_Layer | None"]
    saved: list[_Saved] = field(default_factory=list)
    returned: Any = None


def _nothing() -> None:
    """Stands for "no previous layer"."""


class ActivationOffload:
    """Runs layers so that their saved tensors stay in host memory until their backward.

    stream: for the copies. None makes synchronous copies; tests use it to check on CPU that nothing is lost.
    """

    def __init__(self, stream: "torch.cuda.Stream | None") -> None:
        self._stream = stream
        self._copied: torch.cuda.Event | None = None  # the last layer's tensors have been copied
        self._last: Callable[[], _Layer | None] = _nothing

    def run(self, forward: Callable[..., Output], *arguments: Any) -> Output:
        """Run `forward(*arguments)` with offload."""
        if not torch.is_grad_enabled():
            return forward(*arguments)
        layer = _Layer(self._last)
        sources: dict[tuple, tuple[Tensor, _Saved]] = {}
        with saved_tensors_hooks(functools.partial(self._pack, layer, sources), functools.partial(self._unpack, layer)):
            result = forward(*arguments)
        if self._stream is not None:
            for source, _ in sources.values():
                source.record_stream(self._stream)
            self._hold_back(arguments[0].device)
        sources.clear()  # the graph keeps the hooks alive, and they must not keep the sources alive
        self._last = weakref.ref(layer)  # only the graph keeps the layer alive
        return result

    def _hold_back(self, device: torch.device) -> None:
        """Allow at most two layers to wait for their copies, because the host queues layers faster than they run."""
        before, self._copied = self._copied, self._stream.record_event()
        if before is not None:
            torch.cuda.current_stream(device).wait_event(before)

    def _pack(self, layer: _Layer, sources: dict, tensor: Tensor) -> "Tensor | _Saved":
        is_weight = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)  # ZeRO manages weights
        is_on_host = self._stream is not None and tensor.device.type == "cpu"  # attention's random state
        if is_weight or is_on_host or tensor.numel() * tensor.element_size() < _LEAST_BYTES:
            return tensor
        # Several operations may save the same tensor. `sources` keeps it alive, so its address is not reused.
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version)
        if key not in sources:
            # Detached, because a copy with a graph would form a reference cycle with it.
            saved = _Saved(self._to_host(tensor.detach()), tensor.device)
            sources[key] = (tensor, saved)
            layer.saved.append(saved)
        saved = sources[key][1]
        saved.uses += 1
        return saved

    def _unpack(self, layer: _Layer, saved: "Tensor | _Saved") -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._last = _nothing  # the backward has begun, so the next layer to run is the first of a new forward
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
        if layer.saved:  # wait until the device's backward gets here: the host may be far ahead of it
            self._stream.wait_stream(torch.cuda.current_stream(layer.saved[0].device))
        with torch.cuda.stream(self._stream):
            for saved in layer.saved:
                saved.back = saved.host.to(saved.device, non_blocking=True)
            layer.returned = self._stream.record_event()
