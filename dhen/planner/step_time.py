"""Predicts the time of a step from the work of four resources that overlap.

Four resources work in parallel, and each does one thing at a time: compute, the fabric between the ranks that ZeRO
shards over, the link between replicas, and the link to the host. The forward takes as long as the busiest of them, and
so does the backward. On top comes what nothing hides, such as the first weights and the last gradients. An operation
takes the time of its floating-point operations or of its bytes, whichever is longer. A GPU waits for its host where
starting the step or loading its rows takes longer than the step. The model is meant to rank
techniques, not to predict milliseconds: it leaves out congestion, stragglers, and kernels that share the GPU with
communication.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dhen.planner.machine import Machine
from dhen.planner.memory import ALL_REDUCE_ELEMENTS, gathering_of
from dhen.planner.memory_setting import MemorySetting
from dhen.planner.step_trace import Event, StepTrace, Work
from dhen.planner.zero3_gathering import Gathering

_ADAM_PASSES = 2
"""Adam reads and writes master weights and states."""


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one step. compute: forward, backward and recomputation. waiting: communication that is not hidden.

    optimizer: including copies to and from the host. tables: lookups, updates and all-to-all of the slowest rank.
    host: starting the step and loading its rows, as far as nothing hides them.
    """

    compute: float
    waiting: float
    optimizer: float
    tables: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.waiting + self.optimizer + self.tables + self.host


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
    num_values: float = 0.0,
) -> StepSeconds:
    """Seconds of a micro step on `nodes` nodes of the machine, with all their ranks in the job.

    accumulation_steps: micro steps per update; each micro step carries an equal share of the update's time.
    num_values: dense values and ids that a rank loads per micro step.
    """
    links = _Links(machine, setting, nodes)
    gathering = gathering_of(trace, setting) if setting.stage == 3 else None
    forward, backward = trace.events[: trace.loss_at + 1], trace.events[trace.loss_at + 1 :]
    forward_compute, forward_gathers = _pass_seconds(forward, machine, dtype, links, gathering)
    backward_compute, backward_gathers = _pass_seconds(backward, machine, dtype, links, gathering)
    gradients = {event.name: trace.weights[event.name] for event in backward if event.kind == "gradient"}
    total = _forward_seconds(forward_compute, forward_gathers, machine)
    total += _backward_seconds(backward_compute, sum(backward_gathers), links, gradients, accumulation_steps)
    total += _waiting_for_copies(trace, setting, machine, dtype)
    compute, update = forward_compute + backward_compute, _update_traffic_seconds(trace, links, gathering)
    seconds = StepSeconds(
        compute=compute,
        waiting=total - compute + update / accumulation_steps,
        optimizer=_optimizer_seconds(trace, setting, machine) / accumulation_steps,
        tables=table_seconds,
    )
    start, load = machine.seconds_per_step.get(setting.stage, 0.0), num_values * machine.seconds_per_value
    host = max(0.0, start - seconds.total, load - seconds.total) if machine.is_gpu else start + load
    return replace(seconds, host=host)


def _pass_seconds(
    events: Sequence[Event], machine: Machine, dtype: str, links: "_Links", gathering: Gathering | None
) -> tuple[float, list[float]]:
    """Seconds of the forward's or the backward's operations, and of each of stage 3's all-gathers in it."""
    compute = _compute_of(events, machine, dtype)
    if gathering is None:
        return compute, []
    before = len(gathering.sent)
    for event in events:
        gathering.follow(event)
    modules = sum(event.kind == "enter" and event.name in gathering.modules for event in events)
    gathers = [links.gather(elements) for elements in gathering.sent[before:]]
    return compute + modules * machine.seconds_per_module, gathers


def _waiting_for_copies(trace: StepTrace, setting: MemorySetting, machine: Machine, dtype: str) -> float:
    """Offloaded activations leave until the backward reaches their layers, and come back while these compute."""
    layers = range(setting.offload_activations if machine.is_gpu else 0)
    if not layers:
        return 0.0
    copies = sum(each.kept for each in trace.events[: trace.loss_at] if each.layer in layers)
    copies /= machine.host_bytes_per_second
    theirs = _compute_of([each for each in trace.events[trace.loss_at :] if each.layer in layers], machine, dtype)
    others = _compute_of(trace.events, machine, dtype) - theirs
    return max(0.0, copies - others) + max(0.0, copies - theirs)


def _compute_of(events: Iterable[Event], machine: Machine, dtype: str) -> float:
    return compute_seconds((work for event in events for work in event.work), machine, dtype)


def _forward_seconds(compute: float, gathers: Sequence[float], machine: Machine) -> float:
    """The weights of the first layer arrive before it begins, and if nothing overlaps, all others do, too."""
    exposed = sum(gathers[:1] if machine.can_overlap else gathers)
    return max(compute + exposed, sum(gathers))


def _backward_seconds(
    compute: float, gathers: float, links: "_Links", gradients: Mapping[str, int], accumulation_steps: int
) -> float:
    """Stages 2 and 3 reduce gradients bucket by bucket, over the shard group and then over the replicas.

    Nothing hides the last bucket, which is full when all is computed, and replicas begin when the first one is full.
    """
    machine, setting, overlaps = links.machine, links.setting, links.machine.can_overlap
    reduce, across = [0.0], [0.0]
    if setting.stage >= 2:
        bucket = setting.gradient_bucket()
        due = [each for name, elements in gradients.items() for each in bucket.take(name, elements)]
        sizes = [sum(each.values()) for each in (*due, bucket.empty()) if each]
        reduce = [links.reduce(elements * setting.gradient_bytes) for elements in sizes]
        # only in the last micro step
        across = [links.replicate(elements * setting.wire_bytes) / accumulation_steps for elements in sizes]
    if not (overlaps and setting.async_all_reduce):
        reduce, across = [sum(each) for each in zip(reduce, across, strict=True)], [0.0]
    waits = not machine.is_gpu or not overlaps or (setting.stage == 2 and not setting.overlap_comm)  # gloo blocks
    compute += (sum(reduce) if waits else reduce[-1]) + (0.0 if overlaps else gathers)
    busiest = max(compute, gathers + sum(reduce))
    return max(busiest + across[-1], busiest / len(across) + sum(across))


class _Links:
    """Seconds of the dense part's collectives under a setting, each of `size` bytes in all."""

    def __init__(self, machine: Machine, setting: MemorySetting, nodes: int) -> None:
        self.machine, self.setting = machine, setting
        ranks = nodes * machine.ranks_per_node
        group = ranks if setting.stage == 0 or setting.num_replicas == 1 else setting.shard_size
        self._ring = {"nodes": max(1, group // machine.ranks_per_node) if nodes > 1 else 1, "ranks": group}
        self._replicas = {"nodes": max(1, nodes // self._ring["nodes"])}

    def gather(self, elements: int) -> float:
        """An all-gather of weights. A GPU fetches its own share from the host first, if it is there."""
        size = elements * self.setting.weight_bytes
        seconds = self.machine.gathered(size, **self._ring)
        if self.setting.offload_param and self.machine.is_gpu:
            seconds += size / self.setting.shard_size / self.machine.host_bytes_per_second
        return seconds

    def reduce(self, size: float, messages: int = 1) -> float:
        """Stage 3 reduce-scatters; the other stages all-reduce, which sends twice as much. messages: that share it."""
        seconds = self.machine.gathered if self.setting.stage == 3 else self.machine.all_reduced
        return (messages - 1) * seconds(0, **self._ring) + seconds(size, **self._ring)

    def replicate(self, size: float) -> float:
        """An all-reduce over the replicas."""
        return self.machine.replicated(size, **self._replicas)


def _update_traffic_seconds(trace: StepTrace, links: _Links, gathering: Gathering | None) -> float:
    """Seconds of the communication that happens once per update, after the backward."""
    setting, seconds = links.setting, 0.0
    if setting.stage < 2:
        room = setting.reduce_bucket if setting.stage else ALL_REDUCE_ELEMENTS
        messages = math.ceil(trace.num_weights / room)
        seconds += links.reduce(trace.num_weights * setting.gradient_bytes, messages)
        if setting.stage == 1:
            seconds += links.replicate(trace.num_weights * setting.wire_bytes)
    if setting.stage in (1, 2):
        seconds += links.gather(trace.num_weights)
    elif gathering is not None:  # small weights stay gathered, so they are gathered again after each update
        seconds += links.gather(sum(gathering.persistent.values()))
    return seconds


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
