"""How long a step takes: compute, communication by link, recomputation and offload, simulated layer by layer.

Compute, the fabric of the ranks that ZeRO shards over, the link between replicas and the way to the host each do one
thing at a time, and at the same time as the others. Every operation of the trace takes as long as its floating-point
operations or its bytes need, whichever is more. It is meant to tell which technique is faster, not by how many
milliseconds: congestion, stragglers and kernels that share the GPU with communication are left out.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dhen.planner.machine import Machine
from dhen.planner.memory import ALL_REDUCE_ELEMENTS, MemorySetting, gathering_of
from dhen.planner.step_trace import StepTrace, Work
from dhen.planner.zero3_gathering import Gathering

_ADAM_PASSES = 2
"""Adam's masters and states are read and written."""


@dataclass(frozen=True)
class StepSeconds:
    """One step. compute: of forward, backward and recomputation. waiting: for communication, beyond what is hidden.

    optimizer: with what it moves to and from the host. tables: lookups, updates and all-to-all of the slowest rank.
    """

    compute: float
    waiting: float
    optimizer: float
    tables: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.compute + self.waiting + self.optimizer + self.tables


@dataclass
class Segment:
    """A layer's forward or backward, or, where layer is None, what is before and after the layers.

    work: its operations. asked: elements of each all-gather that stage 3 starts in it; needed: numbers, over the whole
    step, of those that it waits for; entries: of modules with weights. gradients: elements by weight. kept: bytes of
    activations that became alive.
    """

    layer: int | None
    is_backward: bool
    work: list[Work] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    needed: list[int] = field(default_factory=list)
    entries: int = 0
    gradients: dict[str, int] = field(default_factory=dict)
    kept: int = 0


def segments(trace: StepTrace, gathering: Gathering | None) -> list[Segment]:
    """The trace layer by layer, forward and then backward."""
    result: list[Segment] = []
    owner = {weight: module for module, own in trace.modules.items() for weight in own}
    at: tuple[int | None, bool] | None = None
    is_backward = False
    for event in trace.events:
        if (event.layer, is_backward) != at:
            at = (event.layer, is_backward)
            result.append(Segment(*at))
        segment = result[-1]
        segment.work += event.work
        segment.kept += event.kept
        if event.kind == "gradient":
            segment.gradients[event.name] = trace.weights[event.name]
        if gathering is not None and (owner.get(event.name) or event.name) in trace.modules:
            before = len(gathering.sent), len(gathering.waited)
            if event.kind == "enter":
                segment.entries += 1
                gathering.enter(event.name)
            elif event.kind == "leave":
                gathering.leave(event.name)
            elif event.name == trace.modules[owner[event.name]][-1]:
                gathering.leave(owner[event.name])
            segment.asked += gathering.sent[before[0] :]
            segment.needed += gathering.waited[before[1] :]
        is_backward |= event.kind == "loss"
    return result


def compute_seconds(work: Iterable[Work], machine: Machine, dtype: str = "fp32") -> float:
    """Seconds of operations one after the other, matrix products in `dtype`."""
    flops = machine.flops.get(dtype, machine.flops["fp32"]) * machine.compute_efficiency
    rate = machine.memory_bytes_per_second
    least = machine.seconds_per_operation
    return sum(max(each.flops / flops, each.bytes / rate, least) for each in work)


def step_seconds(
    trace: StepTrace,
    setting: MemorySetting,
    machine: Machine,
    nodes: int,
    *,
    dtype: str = "fp32",
    table_seconds: float = 0.0,
    accumulation_steps: int = 1,
) -> StepSeconds:
    """A micro step on `nodes` of the machine, all of their ranks in the job, with its part of the update's time.

    accumulation_steps: micro steps for an update, whose time they share.
    """
    gathering = gathering_of(trace, setting) if setting.stage == 3 else None
    links = _Links(machine, setting, nodes)
    timeline = _Timeline(machine, setting, links, accumulation_steps)
    for part in segments(trace, gathering):
        timeline.run(part, compute_seconds(part.work, machine, dtype))
    update = _update_traffic_seconds(trace, setting, links, gathering)
    return StepSeconds(
        compute=timeline.compute,
        waiting=timeline.finish() - timeline.compute + update / accumulation_steps,
        optimizer=_optimizer_seconds(trace, setting, machine) / accumulation_steps,
        tables=table_seconds,
    )


class _Timeline:
    """When what a micro step uses is free again: the compute, the fabric that ZeRO shards over, the link between
    replicas, the way to the host.
    """

    def __init__(self, machine: Machine, setting: MemorySetting, links: "_Links", accumulation_steps: int) -> None:
        self._machine, self._setting, self._links = machine, setting, links
        self._accumulation_steps = accumulation_steps
        is_serial = not machine.is_gpu or not machine.can_overlap  # gloo's reduce-scatter is waited for
        self._waits_for_reduction = is_serial or (setting.stage == 2 and not setting.overlap_comm)
        self._now = self._fabric = self._link = self._host = 0.0
        self._began = 0.0  # the part at hand, or the one before
        self._bucket = setting.gradient_bucket()
        self._gathered: list[float] = []  # when each all-gather is done
        self._on_host: dict[int, int] = {}  # bytes of activations by layer
        self.compute = 0.0

    def run(self, part: Segment, seconds: float) -> None:
        """Compute it for so long, once what it needs is there."""
        self._gather(part)
        if part.layer in self._on_host:
            self._move_to_or_from_host(self._on_host.pop(part.layer), self._began)
            self._now = max(self._now, self._host)
        self._began = self._now
        self._now += seconds + part.entries * self._machine.seconds_per_module
        self.compute += seconds
        if not part.is_backward:
            self._offload(part)
        elif self._setting.stage >= 2:
            self._take(part.gradients)

    def _gather(self, part: Segment) -> None:
        """Ask for weights, and wait for those that are needed now."""
        for elements in part.asked:
            size = elements * self._setting.weight_bytes
            self._fabric = max(self._fabric, self._now) + self._links.gather(size)
            if self._setting.offload_param and self._machine.is_gpu:
                self._fabric += size / self._setting.shard_size / self._machine.host_bytes_per_second
            self._gathered.append(self._fabric)
        there = [self._gathered[number] for number in part.needed]
        if not self._machine.can_overlap:
            there.append(self._fabric)
        self._now = max([self._now, *there])

    def finish(self) -> float:
        """Reduce what is left; when all are free."""
        self._reduce(self._now)
        return max(self._now, self._fabric, self._link, self._host)

    def _take(self, gradients: Mapping[str, int]) -> None:
        """Let gradients leave in buckets; one that lacks room for the very first needn't wait for the others."""
        ready = self._began
        for name, elements in gradients.items():
            if not self._bucket.has_room_for(elements):
                self._reduce(ready)
            self._bucket.put(name, elements)
            ready = self._now
            if self._bucket.is_due:
                self._reduce(ready)

    def _reduce(self, ready: float) -> None:
        """Reduce what waits, over the shard group and then the replicas, from when it is there."""
        setting, elements = self._setting, sum(self._bucket.empty().values())
        if not elements:
            return
        ready = self._now if self._waits_for_reduction else ready
        self._fabric = max(self._fabric, ready) + self._links.reduce(elements * setting.gradient_bytes)
        if setting.num_replicas > 1:
            across = self._links.replicate(elements * setting.wire_bytes)  # in the last micro step
            self._link = max(self._link, self._fabric) + across / self._accumulation_steps
            if not (self._machine.can_overlap and setting.async_all_reduce):
                self._fabric = self._link
        if self._waits_for_reduction:
            self._now = self._fabric

    def _offload(self, part: Segment) -> None:
        if self._machine.is_gpu and part.layer is not None and part.layer < self._setting.offload_activations:
            self._on_host[part.layer] = part.kept
            self._move_to_or_from_host(part.kept, self._now)

    def _move_to_or_from_host(self, size: int, earliest: float) -> None:
        self._host = max(self._host, earliest) + size / self._machine.host_bytes_per_second


def _update_traffic_seconds(
    trace: StepTrace, setting: MemorySetting, links: "_Links", gathering: Gathering | None
) -> float:
    """What is sent once an update, after the backward."""
    seconds = 0.0
    if setting.stage < 2:
        room = setting.reduce_bucket if setting.stage else ALL_REDUCE_ELEMENTS
        messages = math.ceil(trace.num_weights / room)
        seconds += links.reduce(trace.num_weights * setting.gradient_bytes, messages)
        if setting.num_replicas > 1 and setting.stage == 1:
            seconds += links.replicate(trace.num_weights * setting.wire_bytes)
    if setting.stage in (1, 2):
        seconds += links.gather(trace.num_weights * setting.weight_bytes)
    elif gathering is not None:  # small weights stay, and are gathered once they are updated
        small = sum(trace.weights[name] for name in gathering.persistent)
        seconds += links.gather(small * setting.weight_bytes)
    return seconds


class _Links:
    """Seconds of the dense part's collectives under a setting."""

    def __init__(self, machine: Machine, setting: MemorySetting, nodes: int) -> None:
        self._machine, self._stage = machine, setting.stage
        ranks = nodes * machine.ranks_per_node
        group = ranks if setting.stage == 0 or setting.num_replicas == 1 else setting.shard_size
        self._ring = {"nodes": max(1, group // machine.ranks_per_node) if nodes > 1 else 1, "ranks": group}
        self._replicas = {"nodes": max(1, nodes // self._ring["nodes"])}

    def gather(self, size: float) -> float:
        return self._machine.gathered(size, **self._ring)

    def reduce(self, size: float, messages: int = 1) -> float:
        """Stage 3 reduces and scatters; the others all-reduce, which is twice as much."""
        seconds = self._machine.gathered if self._stage == 3 else self._machine.all_reduced
        return (messages - 1) * seconds(0, **self._ring) + seconds(size, **self._ring)

    def replicate(self, size: float) -> float:
        return self._machine.replicated(size, **self._replicas)


def _optimizer_seconds(trace: StepTrace, setting: MemorySetting, machine: Machine) -> float:
    elements = trace.num_weights / setting.shard_size
    per_element = setting.gradient_bytes + setting.weight_bytes
    per_element += _ADAM_PASSES * (setting.master_bytes + setting.state_bytes)
    on_host = setting.offload_optimizer
    # Without a device of its own a rank copies, within the one memory, what would move.
    host, link = machine.host_memory_bytes_per_second, machine.host_bytes_per_second
    host, link = (host, link) if machine.is_gpu else (machine.memory_bytes_per_second, machine.memory_bytes_per_second)
    seconds = (1 - on_host) * elements * per_element / machine.memory_bytes_per_second
    if on_host:
        moved = setting.gradient_bytes + setting.weight_bytes
        seconds += on_host * elements * (per_element / host + moved / link)
    return seconds
