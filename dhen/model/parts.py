"""The parts of a model, from the features to the head, which fine-tuning may freeze or train at rates of their own.

A weight belongs to "tables", "features" (the MLP of the dense features), "layers.0", "layers.1", … or "head". The norm
after the last layer belongs to this layer. The heads of further tasks and the layers of a task's own are part of the
head.
"""

import re
from typing import Annotated

from pydantic import AfterValidator

from dhen.model.names import quoted

_LAYERS = re.compile(r"layers:(\d{1,5})(?:-(\d{1,5}))?")
_FREEZE = re.compile(r"none|(W)( *, *(W))*".replace("W", rf"tables|dense|features|{_LAYERS.pattern}"))


def part_of(name: str, num_layers: int) -> str:
    """The part that a module or weight belongs to. "model", "model.layers" and other containers are their own part.

    >>> [part_of(f"model.{name}.weight", 2) for name in ("features.dense_mlp.0", "layers.0.shortcut.mix", "norm")]
    ['features', 'layers.0', 'layers.1']
    """
    first, *rest = name.removeprefix("model.").split(".")
    if name.startswith("model.norm"):
        return f"layers.{num_layers - 1}"
    return "head" if first in ("tasks", "task_layers") else ".".join([first, *rest[: first == "layers"]])


def frozen_parts(freeze: str, num_layers: int) -> frozenset[str]:
    """The parts that `freeze` names: none, or words separated by commas.

    Raises ValueError if it is not of this form, or names a layer that the model does not have.

    >>> sorted(frozen_parts("features,layers:0-1", num_layers=3))
    ['features', 'layers.0', 'layers.1']
    """
    dense = ["features", *(f"layers.{index}" for index in range(num_layers)), "head"]
    parts: set[str] = set()
    for word in map(str.strip, freeze.split(",")):
        if layers := _LAYERS.fullmatch(word):
            first, last = int(layers[1]), int(layers[2] or layers[1])
            if not first <= last < num_layers:
                raise ValueError(
                    f"freeze is {quoted(freeze)}, but the model has {num_layers} layers. Use a layer or a range of "
                    f"layers, first-last, from 0 to {num_layers - 1}."
                )
            parts.update(f"layers.{index}" for index in range(first, last + 1))
        else:
            parts.update(dense if word == "dense" else {word} - {"none"})
    return frozenset(parts)


def _check_freeze(freeze: str) -> str:
    if not _FREEZE.fullmatch(freeze):
        raise ValueError(
            f"{quoted(freeze)} is not allowed. Use 'none', or one or more of 'tables', 'dense', 'features' and layers "
            "such as 'layers:0-3' or 'layers:2', separated by commas."
        )
    return freeze


Freeze = Annotated[str, AfterValidator(_check_freeze)]
"""The parts of a model that stay as they are, as the user names them."""


def rate_share(part: str, num_layers: int, decay: float) -> float:
    """The share of the head's learning rate that a part trains with, if it falls by `decay` at each layer downwards.

    Layer-wise learning rate decay, as in ELECTRA (Clark et al. 2020, appendix A); discriminative fine-tuning in ULMFiT
    (Howard and Ruder 2018, 3.2).

    >>> [rate_share(part, 2, 0.5) for part in ("head", "layers.1", "layers.0", "features")]
    [1.0, 0.5, 0.25, 0.125]
    """
    kind, _, index = part.partition(".")
    height = num_layers + 1 if kind == "head" else int(index) + 1 if index else 0
    return decay ** (num_layers + 1 - height)
