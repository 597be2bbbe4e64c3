"""Which weights ZeRO stage 3 holds during a step: a replay of DeepSpeed 0.19.8's rules, and LeanStage3's.

A module's weights are gathered when it is entered. The weights of later modules are prefetched as far as two limits
allow. Several weights are gathered into one flat buffer and copied out of it. A module's weights are released when it
is left, unless they are small or needed again soon.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dhen.planner.step_trace import Event


@dataclass(frozen=True)
class Limits:
    """DeepSpeed's stage3_* keys of the same names, in elements, with DeepSpeed's defaults."""

    param_persistence_threshold: int = 100_000
    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000

    @classmethod
    def of(cls, zero: Mapping[str, Any]) -> "Limits":
        names = cls.__dataclass_fields__
        return cls(**{name: int(zero[f"stage3_{name}"]) for name in names if f"stage3_{name}" in zero})


@dataclass
class Gathering:
    """Number of gathered elements while modules are entered and left.

    weights: elements by name. modules: names of the weights that each module owns. visits: the modules that a whole
    step enters, in order. elements: gathered now. peak: maximum during the last call, including flat buffers. sent:
    elements of each all-gather since the start.
    """

    weights: Mapping[str, int]
    modules: Mapping[str, Sequence[str]]
    visits: Sequence[str]
    limits: Limits
    shard_size: int
    elements: int = 0
    peak: int = 0
    sent: list[int] = field(default_factory=list)
    _step: int = 0
    _last_fetched_for: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.persistent = {
            name: size for name, size in self.weights.items() if size <= self.limits.param_persistence_threshold
        }
        self._available = set(self.persistent)
        self.elements = self.peak = sum(self.persistent.values())

    def follow(self, event: Event) -> None:
        """Gather and release what the event of a step makes necessary."""
        if event.kind == "enter" and event.name in self.modules:
            self.enter(event.name)
        elif event.kind == "leave":
            self.leave(event.name)

    def enter(self, module: str) -> None:
        self.peak = self.elements
        own = self.modules.get(module, ())
        self._gather([name for name in own if name not in self._available])
        self._step += 1
        self._gather(self._ahead())

    def leave(self, module: str) -> None:
        """Release the module's weights, except those that persist or are needed again soon."""
        self.peak = self.elements
        soon = self._soon()
        for name in self.modules.get(module, ()):
            if name not in soon and self._last_fetched_for.get(name, -1) <= self._step:
                self.release(name)

    def release(self, name: str) -> None:
        """Release a weight, unless it persists. LeanStage3 does so when the gradient of a large weight is there."""
        if name in self._available and name not in self.persistent:
            self._available.discard(name)
            self.elements -= self.weights[name]

    def _gather(self, names: Sequence[str]) -> None:
        if not names:
            return
        flat = sum(-(-self.weights[name] // self.shard_size) * self.shard_size for name in names)
        elements = sum(self.weights[name] for name in names)
        copied = elements if len(names) > 1 else 0  # a single weight uses the buffer
        self.peak = max(self.peak, self.elements + flat + copied)
        self.sent.append(flat)
        self._available |= set(names)
        self.elements += elements

    def _ahead(self) -> list[str]:
        """The weights to prefetch now, for the modules that are entered next."""
        live = self.elements - sum(self.persistent.values())
        room = min(self.limits.max_live_parameters - live, self.limits.prefetch_bucket_size)
        names: list[str] = []
        elements = 0
        for step, module in enumerate(self.visits[self._step :], self._step):
            for name in self.modules.get(module, ()):
                if elements >= room:
                    return names
                self._last_fetched_for[name] = step
                if name not in self._available and name not in names:
                    names.append(name)
                    elements += self.weights[name]
        return names

    def _soon(self) -> set[str]:
        """Weights of the modules that will be entered within the reuse distance."""
        names: set[str] = set()
        distance = 0
        for module in self.visits[self._step :]:
            if distance >= self.limits.max_reuse_distance:
                break
            for name in self.modules.get(module, ()):
                names.add(name)
                distance += self.weights[name]
        return names
