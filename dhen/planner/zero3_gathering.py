"""Which weights ZeRO stage 3 holds during a step: a replay of DeepSpeed 0.19.8's rules, and LeanStage3's.

A module's weights are gathered when it is entered. The weights of later modules are prefetched as far as two limits
allow. Several weights are gathered into one flat buffer and copied out of it. A module's weights are released when it
is left, unless they are small or needed again soon.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Limits:
    """DeepSpeed's stage3_* keys of the same names, in elements, with DeepSpeed's defaults."""

    param_persistence_threshold: int = 100_000
    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000

    @classmethod
    def of(cls, zero: Mapping[str, Any]) -> "Limits":
        """The limits in the zero_optimization section of a ds_config."""
        names = cls.__dataclass_fields__
        return cls(**{name: int(zero[f"stage3_{name}"]) for name in names if f"stage3_{name}" in zero})


@dataclass
class _Gather:
    """An all-gather in progress. number: counted from the start. flat: elements of its buffer."""

    number: int
    flat: int
    weights: list[str]
    is_done: bool = False


@dataclass
class Gathering:
    """Number of gathered elements while modules are entered and left.

    weights: elements by name. modules: names of the weights that each module owns. visits: the modules that a whole
    step enters, in order. elements: gathered now, including flat buffers. peak: maximum during the last call. sent:
    elements of each all-gather since the start. waited: numbers of the all-gathers that were waited for, in order.
    """

    weights: Mapping[str, int]
    modules: Mapping[str, Sequence[str]]
    visits: Sequence[str]
    limits: Limits
    shard_size: int
    elements: int = 0
    peak: int = 0
    sent: list[int] = field(default_factory=list)
    waited: list[int] = field(default_factory=list)
    _step: int = 0
    _available: set[str] = field(default_factory=set)
    _in_flight: dict[str, _Gather] = field(default_factory=dict)
    _last_fetched_for: dict[str, int] = field(default_factory=dict)
    _num_available: int = 0

    def __post_init__(self) -> None:
        """Small weights are always gathered."""
        self.persistent = {
            name for name, size in self.weights.items() if size <= self.limits.param_persistence_threshold
        }
        self._available |= self.persistent
        self.elements = self.peak = sum(self.weights[name] for name in self.persistent)
        self._queue = deque(
            (name, step) for step, module in enumerate(self.visits) for name in self.modules.get(module, ())
        )

    def enter(self, module: str) -> None:
        """Gather the module's weights, wait for them, and prefetch."""
        self.peak = self.elements
        own = self.modules.get(module, ())
        self._gather([name for name in own if name not in self._available and name not in self._in_flight])
        for name in own:
            if name in self._in_flight:
                self._wait(name)
        self._forget(own)
        self._gather(self._ahead())
        self._step += 1

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
            self._num_available -= self.weights[name]

    def _gather(self, names: Sequence[str]) -> None:
        if not names:
            return
        size = self.shard_size
        flat = sum(-(-self.weights[name] // size) * size for name in names)
        gather = _Gather(len(self.sent), flat, list(names))
        self._in_flight |= dict.fromkeys(names, gather)
        self._num_available += sum(self.weights[name] for name in names)
        self.sent.append(flat)
        self._add(flat)

    def _wait(self, name: str) -> None:
        gather = self._in_flight.pop(name)
        if not gather.is_done:
            gather.is_done = True
            self.waited.append(gather.number)
            self._available |= set(gather.weights)
            size = sum(self.weights[other] for other in gather.weights)
            if len(gather.weights) > 1:  # a single weight uses the buffer
                self._add(size)
                self._add(-gather.flat)
            else:
                self._add(size - gather.flat)

    def _add(self, elements: int) -> None:
        self.elements += elements
        self.peak = max(self.peak, self.elements)

    def _forget(self, own: Sequence[str]) -> None:
        """Remove the weights that the module uses now from the queue of weights to prefetch."""
        new = {name for name in own if self._last_fetched_for.get(name, -1) < self._step}
        while self._queue and new:
            name, step = self._queue.popleft()
            self._last_fetched_for[name] = step
            new.discard(name)

    def _ahead(self) -> list[str]:
        """The weights to prefetch now."""
        room = min(self.limits.max_live_parameters - self._num_available, self.limits.prefetch_bucket_size)
        names: list[str] = []
        elements = 0
        while self._queue and elements < room:
            name, step = self._queue.popleft()
            self._last_fetched_for[name] = max(self._last_fetched_for.get(name, -1), step)
            if name not in self._available and name not in self._in_flight and name not in names:
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
