"""One ds_config for all depths that were planned: dhen.by_depth, each rung what it changes of the shallowest's."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dhen.planner.minimum_set import Technique

_SECTION = "dhen"


@dataclass(frozen=True)
class Plan:
    """The minimum set of a depth, and its ds_config."""

    depth: int
    technique: Technique
    ds_config: dict[str, Any]

    @property
    def partial(self) -> int:
        """So many layers, not all, that its ds_config names by their number; 0 where it names none."""
        counts = (self.technique.checkpointing, self.technique.offload_activations)
        return max((count for count in counts if count < self.depth), default=0)


def by_depth(plans: Sequence[Plan]) -> dict[str, Any]:
    """The ds_config with a rung for each plan, in the order of depth; a depth between two takes the deeper one's.

    Where the deeper one's names more layers than a depth between has, a rung before it names all of them.
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
    """What a rung says so that `base` becomes `wanted`: null takes a key away."""
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
