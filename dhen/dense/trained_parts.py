"""Freezes parts of the dense part, and groups the weights of the others by learning rate, for DeepSpeed's optimizer."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.model.parts import part_of, rate_share

ANCHOR = "anchor"
"""Name of a number that is added to the logits and stays 0: DeepSpeed cannot train without any weight."""


def freeze(dense: DhenForClickPrediction, parts: Collection[str]) -> None:
    """Give the weights of these parts no gradient and no optimizer state. Call it before DeepSpeed gets the model.

    If no weight is left, ANCHOR is added. Its gradient also tells whether that of the logits is finite.
    """
    num_layers = len(dense.model.layers)
    for name, weight in dense.named_parameters():
        weight.requires_grad_(part_of(name, num_layers) not in parts)
    if not any(weight.requires_grad for weight in dense.parameters()):
        dense.register_parameter(ANCHOR, nn.Parameter(next(dense.parameters()).new_zeros(1)))
        dense.head.register_forward_hook(lambda head, inputs, logits_B1: logits_B1 + dense.get_parameter(ANCHOR))


def groups_of(dense: DhenForClickPrediction, decay: float) -> list[Any]:
    """The trained weights, as an optimizer takes them: one list, or groups with a "rate_share" of the learning rate.

    decay: from each layer to the one below it. 1: no groups.
    """
    weights = {name: weight for name, weight in dense.named_parameters() if weight.requires_grad}
    if ANCHOR in weights:
        return [{"params": [weights[ANCHOR]], "rate_share": 0.0}]
    if decay == 1:
        return list(weights.values())
    groups: dict[float, list[Tensor]] = {}
    num_layers = len(dense.model.layers)
    for name, weight in weights.items():
        groups.setdefault(rate_share(part_of(name, num_layers), num_layers, decay), []).append(weight)
    return [{"params": of_rate, "rate_share": share} for share, of_rate in groups.items()]
