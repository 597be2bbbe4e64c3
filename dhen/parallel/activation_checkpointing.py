"""Activation checkpointing by depth (paper 3.1): the first layers keep their inputs alone and compute again."""

import functools

from torch.utils.checkpoint import checkpoint

from dhen.model.modeling_dhen import DhenForClickPrediction


def checkpoint_layers(model: DhenForClickPrediction, layers: str | int) -> int:
    """Recompute the first `layers` layers, counted from the input, in the backward: "none", "all" or how many.

    Returns how many they are. Losses stay the same to the bit. Raises ValueError if the model has fewer.
    """
    depth = len(model.model.layers)
    count = {"none": 0, "all": depth}[layers] if isinstance(layers, str) else layers
    if count > depth:
        raise ValueError(f'{layers}, but the model has {depth} layers. Use "none", "all" or up to {depth}.')
    for layer in model.model.layers[:count]:
        # Non-reentrant: DeepSpeed's stage 3 then gathers the weights again by the hooks of the layer's modules.
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return count
