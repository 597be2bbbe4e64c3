"""Activation checkpointing by layer or by interaction (paper 3.1): only inputs are kept, the rest is recomputed."""

import functools
from collections.abc import Iterator, Sequence

from torch import nn
from torch.utils.checkpoint import checkpoint

from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.model.names import unknown_name


def checkpoint_layers(model: DhenForClickPrediction, what: str | int | Sequence[str]) -> int:
    """Recompute activations in the backward for "none", "all", the first N layers, or interactions of given kinds.

    Returns the number of layers or interactions. Losses are bit-identical. Raises ValueError if the model has fewer
    layers, or no interaction of a given kind.
    """
    recomputed = list(_modules(model, what))
    for module in recomputed:
        # Non-reentrant, so that the hooks of the layer's modules run again and ZeRO stage 3 gathers the weights again.
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    return len(recomputed)


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
    of_layers = [[spec.kind for spec in layer.interactions] for layer in model.config.layer_specs]
    for kind in what:
        if not any(kind in kinds for kinds in of_layers):
            raise ValueError(
                f"{list(what)}: {unknown_name('interaction of this model:', kind, set().union(*of_layers))}"
            )
    for layer, kinds in zip(model.model.layers, of_layers, strict=True):
        yield from (module for module, kind in zip(layer.interactions, kinds, strict=True) if kind in what)
