"""Predicts the time of a step by simulating compute, communication, recomputation and offload layer by layer.

Four resources work in parallel, and each does one thing at a time: compute, the fabric between the ranks that ZeRO
shards over, the link between replicas, and the link to the host. An operation takes the time of its floating-point
operations or of its bytes, whichever is longer. The model is meant to rank techniques, not to predict milliseconds: it
leaves out congestion, stragglers, and kernels that share the GPU with communication.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dhen.planner.machine import Machine
from dhen.planner.memory import ALL_REDUCE_ELEMENTS, gathering_of
from dhen.planner.memory_setting import MemorySetting
from dhen.planner.step_trace import StepTrace, Work
from dhen.planner.zero3_gathering import Gathering

_ADAM_PASSES = 2
"""Adam reads and writes master weights and states."""


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one step. compute: forward, backward and recomputation. waiting: communication that is not hidden.

    optimizer: including copies to and from the host. tables: lookups, updates and all-to-all of the slowest rank.
    """

    compute: float
    waiting: float
    optimizer: float
    tables: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.compute + self.waiting + self.optimizer + self.tables


@dataclass
class Segment:
    """The forward or backward of a layer; layer None is the part of the model before or after the layers.

    work: its operations. asked: elements of each all-gather that stage 3 starts here. needed: numbers of the
    all-gathers that it waits for, counted over the whole step. entries: how many modules with weights are entered.
    gradients: elements by weight. kept: bytes of activations that stay live.
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
    """Divide the trace into layers, first the forward, then the backward."""
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
    """Seconds of the operations in sequence, with matrix products in `dtype`."""
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
    """Seconds of a micro step on `nodes` nodes of the machine, with all their ranks in the job.

    accumulation_steps: micro steps per update; each micro step carries an equal share of the update's time.
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
    """When each resource becomes free: compute, the fabric that ZeRO shards over, the link between replicas, and the
    link to the host.
    """

    def __init__(self, machine: Machine, setting: MemorySetting, links: "_Links", accumulation_steps: int) -> None:
        self._machine, self._setting, self._links = machine, setting, links
        self._accumulation_steps = accumulation_steps
        is_serial = not machine.is_gpu or not machine.can_overlap  # gloo's reduce-scatter blocks
        self._waits_for_reduction = is_serial or (setting.stage == 2 and not setting.overlap_comm)
        self._now = self._fabric = self._link = self._host = 0.0
        self._began = 0.0  # start of the current or previous segment
        self._bucket = setting.gradient_bucket()
        self._gathered: list[float] = []  # end of each all-gather
        self._on_host: dict[int, int] = {}  # bytes of offloaded activations by layer
        self.compute = 0.0

    def run(self, part: Segment, seconds: float) -> None:
        """Compute the segment for `seconds`, once its weights and activations have arrived."""
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
        """Start the segment's all-gathers, and wait for the weights that it needs."""
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
        """Reduce the remaining gradients. Returns when all resources are free."""
        if self._bucket.waiting:
            self._reduce(self._bucket.elements, self._now)
        return max(self._now, self._fabric, self._link, self._host)

    def _take(self, gradients: Mapping[str, int]) -> None:
        """Reduce gradients in buckets.

        A bucket with no room for the segment's first gradient can be reduced from the segment's start.
        """
        ready = self._began
        for name, elements in gradients.items():
            for due in self._bucket.take(name, elements):
                self._reduce(sum(due.values()), self._now if name in due else ready)
            ready = self._now

    def _reduce(self, elements: int, ready: float) -> None:
        """Reduce gradients over the shard group, then over the replicas, starting at `ready` or later."""
        setting = self._setting
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
    """Seconds of the communication that happens once per update, after the backward."""
    seconds = 0.0
    if setting.stage < 2:
        room = setting.reduce_bucket if setting.stage else ALL_REDUCE_ELEMENTS
        messages = math.ceil(trace.num_weights / room)
        seconds += links.reduce(trace.num_weights * setting.gradient_bytes, messages)
        if setting.num_replicas > 1 and setting.stage == 1:
            seconds += links.replicate(trace.num_weights * setting.wire_bytes)
    if setting.stage in (1, 2):
        seconds += links.gather(trace.num_weights * setting.weight_bytes)
    elif gathering is not None:  # small weights stay gathered, so they are gathered again after each update
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
        """Stage 3 reduce-scatters; the other stages all-reduce, which sends twice as much."""
        seconds = self._machine.gathered if self._stage == 3 else self._machine.all_reduced
        return (messages - 1) * seconds(0, **self._ring) + seconds(size, **self._ring)

    def replicate(self, size: float) -> float:
        return self._machine.replicated(size, **self._replicas)


def _optimizer_seconds(trace: StepTrace, setting: MemorySetting, machine: Machine) -> float:
    elements = trace.num_weights / setting.shard_size
    per_element = setting.gradient_bytes + setting.weight_bytes
    per_element += _ADAM_PASSES * (setting.master_bytes + setting.state_bytes)
    on_host = setting.offload_optimizer
    # On CPU, offload copies within the same memory.
    host, link = machine.host_memory_bytes_per_second, machine.host_bytes_per_second
    host, link = (host, link) if machine.is_gpu else (machine.memory_bytes_per_second, machine.memory_bytes_per_second)
    seconds = (1 - on_host) * elements * per_element / machine.memory_bytes_per_second
    if on_host:
        moved = setting.gradient_bytes + setting.weight_bytes
        seconds += on_host * elements * (per_element / host + moved / link)
    return seconds
