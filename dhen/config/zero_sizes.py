"""The sizes that ZeRO works with: what "auto" means for these keys of a ds_config.

All follow from the model's largest layer, so that a rank never holds more than two gathered layers and one layer's
gradients, however deep the model is (paper 3.1). DeepSpeed's own defaults are a billion elements: any smaller model
would stay gathered as a whole.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from dhen.config.deepspeed_sections import ZERO

_SMALL = 250_000
"""Elements (1 MB in fp32) that are not worth a message of their own: its latency costs more than their memory."""
_TABLES = "tables."
_PERSISTENT_SHARE = 100
"""The smallest weights stay gathered, as long as they are at most a hundredth of the model together."""
SIZE_KEYS = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
)
"""The keys of zero_optimization that may be "auto", beside those that the recipe decides."""


def zero_sizes(weights: Mapping[str, int]) -> dict[str, int]:
    """The value of each of SIZE_KEYS. weights: number of elements by name, of all weights of the dense part.

    Replicated tables do not count: none of the sizes has to be as large as a table.
    Stage 3 prefetches one layer, releases each one as soon as it has been used, and reduces gradients layer by layer.

    >>> sizes = zero_sizes({"model.layers.0.mix.weight": 900_000, "model.layers.0.mix.bias": 3_000})
    >>> sizes["stage3_max_live_parameters"], sizes["stage3_param_persistence_threshold"]
    (903001, 3000)
    """
    weights = {name: elements for name, elements in weights.items() if not name.startswith(_TABLES)}
    layer = max([_SMALL, *_layers(weights).values()])
    return {
        "reduce_bucket_size": layer,
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": layer + 1,  # below this, DeepSpeed prefetches one more whole weight
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": _persistence_threshold(sorted(weights.values())),
    }


def with_sizes(deepspeed: Mapping[str, Any], weights: Mapping[str, int]) -> dict[str, Any]:
    """A copy of DeepSpeed's part of a ds_config in which every "auto" size has its value."""
    sizes = zero_sizes(weights)
    zero = {
        key: sizes[key] if value == "auto" and key in sizes else value for key, value in deepspeed.get(ZERO, {}).items()
    }
    return {**deepspeed, ZERO: zero} if zero else dict(deepspeed)


def _layers(weights: Mapping[str, int]) -> dict[str, int]:
    """Elements of each layer, and of each module outside the layers."""
    layers: dict[str, int] = {}
    for name, elements in weights.items():
        parts = name.split(".")
        layer = ".".join(parts[:3] if parts[:2] == ["model", "layers"] else parts[:-1])
        layers[layer] = layers.get(layer, 0) + elements
    return layers


def _persistence_threshold(sizes: list[int]) -> int:
    """The largest size such that all weights up to it are few elements together. sizes: in increasing order."""
    most = max(_SMALL, sum(sizes) // _PERSISTENT_SHARE)
    sums = dict(zip(sizes, itertools.accumulate(sizes), strict=True))  # of equal sizes, the last sum counts
    return max((size for size, elements in sums.items() if elements <= most), default=0)
