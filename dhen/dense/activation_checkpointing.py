"""Activation checkpointing by layer or by interaction (paper 3.1): only inputs are kept, the rest is recomputed."""

import functools
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dhen.model.mixture_of_experts import Output
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.model.names import unknown_name

_Buffers = dict[str, Tensor | None]  # of one module


def checkpoint_layers(model: DhenForClickPrediction, what: str | int | Sequence[str]) -> int:
    """Recompute activations in the backward for "none", "all", the first N layers, or interactions of given kinds.

    Returns the number of layers or interactions. Losses and buffers, such as batch norm's statistics, are
    bit-identical. Raises ValueError if the model has fewer layers, or no interaction of a given kind.
    """
    recomputed = list(_modules(model, what))
    for module in recomputed:
        buffers = [child._buffers for child in module.modules() if child._buffers]
        module.forward = functools.partial(_run, module.forward, buffers)
    return len(recomputed)


def _run(forward: Callable[..., Output], buffers: Sequence[_Buffers], *inputs: Tensor) -> Output:
    """Run `forward` now and again in the backward. Recomputation sees the buffers as they were, and changes none."""
    before: list[_Buffers] = []

    def run(*inputs: Tensor) -> Output:
        if not before:
            before.extend(_copies(buffers))
            return forward(*inputs)
        present = [own.copy() for own in buffers]
        try:
            _replace(buffers, _copies(before))
            return forward(*inputs)
        finally:  # checkpoint ends a recomputation early by an exception
            _replace(buffers, present)

    # Non-reentrant, so that the hooks of the layer's modules run again and ZeRO stage 3 gathers the weights again.
    return checkpoint(run, *inputs, use_reentrant=False)


def _copies(buffers: Sequence[_Buffers]) -> list[_Buffers]:
    return [{name: None if each is None else each.clone() for name, each in own.items()} for own in buffers]


def _replace(buffers: Sequence[_Buffers], values: Sequence[_Buffers]) -> None:
    for own, value in zip(buffers, values, strict=True):
        own.update(value)


def first_layers(model: DhenForClickPrediction, layers: str | int) -> Sequence[nn.Module]:
    """The first layers, counted from the input: "none", "all" or a number. Raises ValueError if it is too large."""
    depth = len(model.model.layers)
    count = {"none": 0, "all": depth}[layers] if isinstance(layers, str) else layers
    if count > depth:
        raise ValueError(f'{layers}, but the model has {depth} layers. Use "none", "all" or a number up to {depth}.')
    return model.model.layers[:count]


def _modules(model: DhenForClickPrediction, what: str | int | Sequence[str]) -> Iterator[nn.Module]:
    if isinstance(what, str | int):
        yield from first_layers(model, what)
        return
    of_layers = [
        [spec.kind for of in layer.interactions_by_expert for spec in of] for layer in model.config.layer_specs
    ]
    for kind in what:
        if not any(kind in kinds for kinds in of_layers):
            raise ValueError(
                f"{list(what)}: {unknown_name('interaction of this model:', kind, set().union(*of_layers))}"
            )
    for layer, kinds in zip(model.model.layers, of_layers, strict=True):
        interactions = layer.named_interactions().values()
        yield from (module for module, kind in zip(interactions, kinds, strict=True) if kind in what)
