"""Combines the ds_configs of several depths into one: each rung of dhen.by_depth changes the shallowest ds_config."""

from collections.abc import Mapping
from typing import Any

_SECTION = "dhen"
_OF_LAYERS = ("activation_checkpointing", "activation_offload")


def by_depth(ds_configs: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """The ds_config with one rung for each depth's ds_config. A depth between two of them uses the deeper one.

    If the deeper one names more layers than such a depth has, an extra rung before it uses "all" instead.
    """
    rungs: list[tuple[int, dict[str, Any]]] = []
    before = 0
    for depth, ds_config in sorted(ds_configs.items()):
        section = ds_config.get(_SECTION, {})
        named = max((section[key] for key in _OF_LAYERS if isinstance(section.get(key), int)), default=0)
        if named - 1 > before:
            every = {key: "all" for key in _OF_LAYERS if key in section}
            rungs.append((named - 1, ds_config | {_SECTION: section | every}))
        if rungs and rungs[-1][1] == ds_config:
            rungs.pop()
        rungs.append((depth, ds_config))
        before = depth
    base = rungs[0][1]
    ladder = [{"max_layers": depth} | changes(base, ds_config) for depth, ds_config in rungs]
    return base | {_SECTION: base.get(_SECTION, {}) | {"by_depth": ladder}}


def changes(base: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The changes in a rung that turn `base` into `wanted`. null removes a key."""
    result: dict[str, Any] = {key: None for key in base if key not in wanted}
    for key, value in wanted.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            if nested := changes(base[key], value):
                result[key] = nested
        elif key not in base or base[key] != value:
            result[key] = value
    return result
