"""Combines the ds_configs of several depths into one: each rung of dhen.by_depth changes the shallowest ds_config."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dhen.planner.technique import Technique

_SECTION = "dhen"


@dataclass(frozen=True)
class Plan:
    """The minimum set of a depth, and its ds_config."""

    depth: int
    technique: Technique
    ds_config: dict[str, Any]

    @property
    def partial(self) -> int:
        """The largest number of layers that the ds_config names by number; 0 if it has only "all" or "none"."""
        counts = (self.technique.checkpointing, self.technique.offload_activations)
        return max((count for count in counts if count < self.depth), default=0)


def by_depth(plans: Sequence[Plan]) -> dict[str, Any]:
    """The ds_config with one rung for each plan, ordered by depth. A depth between two plans uses the deeper one.

    If the deeper plan names more layers than such a depth has, an extra rung before it uses "all" instead.
    """
    rungs: list[tuple[int, dict[str, Any]]] = []
    before = 0
    for plan in plans:
        if plan.partial - 1 > before:
            rungs.append((plan.partial - 1, _with_all_layers(plan.ds_config)))
        if rungs and rungs[-1][1] == plan.ds_config:
            rungs.pop()
        rungs.append((plan.depth, plan.ds_config))
        before = plan.depth
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


def _with_all_layers(ds_config: dict[str, Any]) -> dict[str, Any]:
    section = ds_config[_SECTION]
    names = ("activation_checkpointing", "activation_offload")
    every = {name: "all" for name in names if name in section}
    return json.loads(json.dumps(ds_config)) | {_SECTION: section | every}
