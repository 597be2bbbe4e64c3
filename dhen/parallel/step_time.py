"""How long a step takes: compute, communication by link, recomputation and offload, simulated layer by layer.

Compute, the fabric inside a node and the link between nodes are three resources, each doing one thing at a time. Every
operation of the trace takes as long as its floating-point operations or its bytes need, whichever is more. A layer's
weights are gathered while the layer before it computes. It is meant to tell which technique is faster, not by how many
milliseconds: congestion, stragglers and kernels that share the GPU with communication are left out.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from dhen.parallel.gathering import Gathering
from dhen.parallel.machine import Machine
from dhen.parallel.memory import MemorySetting, gathering_of
from dhen.parallel.step_trace import StepTrace, Work

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

    work: its operations. kept: bytes of activations that became alive. gathered: elements of weights that stage 3 asks
    for in it, in so many messages, at so many entries of modules. gradients: elements of each that it yields.
    """

    layer: int | None
    is_backward: bool
    work: list[Work] = field(default_factory=list)
    gathered: int = 0
    messages: int = 0
    entries: int = 0
    gradients: list[int] = field(default_factory=list)
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
            segment.gradients.append(trace.weights[event.name])
        if gathering is not None and (owner.get(event.name) or event.name) in trace.modules:
            before = gathering.sent, gathering.messages
            if event.kind == "enter":
                segment.entries += 1
                gathering.enter(event.name)
            elif event.kind == "leave":
                gathering.leave(event.name)
            elif event.name == trace.modules[owner[event.name]][-1]:
                gathering.leave(owner[event.name])
            segment.gathered += gathering.sent - before[0]
            segment.messages += gathering.messages - before[1]
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
    parts = segments(trace, gathering)
    links, bucket = _Links(machine, setting, nodes), _Bucket(setting)
    compute = fabric_free = link_free = host_free = now = 0.0
    kept: dict[int, int] = {}  # by the layers whose activations wait on the host
    before = 0.0
    for part in parts:
        seconds = compute_seconds(part.work, machine, dtype)
        compute += seconds
        ahead = now - before if machine.can_overlap else now  # when the part before began to compute
        if part.messages:
            fabric_free = max(fabric_free, ahead) + links.gather(part.gathered * setting.weight_bytes, part.messages)
            if setting.offload_param and machine.is_gpu:
                fabric_free += part.gathered / setting.shard_size * setting.weight_bytes / machine.host_bytes_per_second
            now = max(now, fabric_free)
        if part.layer in kept:
            host_free = max(host_free, ahead) + kept.pop(part.layer) / machine.host_bytes_per_second
            now = max(now, host_free)
        now += seconds + part.entries * machine.seconds_per_module
        before = seconds
        if machine.is_gpu and not part.is_backward and (part.layer or 0) < setting.offload_activations:
            if part.layer is not None:
                kept[part.layer] = part.kept
                host_free = max(host_free, now) + part.kept / machine.host_bytes_per_second
            continue
        if not part.is_backward or setting.stage < 2:
            continue
        for reduced in bucket.take(part.gradients) + (bucket.finish() if part is parts[-1] else []):
            fabric_free = max(fabric_free, now) + links.reduce(reduced * setting.gradient_bytes)
            if not machine.is_gpu or (setting.stage == 2 and not setting.overlap_comm):
                now = fabric_free  # gloo's reduce-scatter is waited for
            if setting.num_replicas > 1:
                across = links.replicate(reduced * setting.wire_bytes)  # in the last micro step
                link_free = max(link_free, fabric_free) + across / accumulation_steps
                if not machine.can_overlap:
                    now = link_free
    update = 0.0
    if setting.stage < 2:
        update += links.reduce(trace.num_weights * setting.gradient_bytes)
        if setting.num_replicas > 1 and setting.stage == 1:
            update += links.replicate(trace.num_weights * setting.wire_bytes)
    if setting.stage in (1, 2):
        update += links.gather(trace.num_weights * setting.weight_bytes, 1)
    elif gathering is not None:  # small weights stay, and are gathered once they are updated
        small = sum(trace.weights[name] for name in gathering.persistent)
        update += links.gather(small * setting.weight_bytes, 1)
    waiting = max(now, fabric_free, link_free, host_free) - compute + update / accumulation_steps
    return StepSeconds(
        compute, waiting, _optimizer_seconds(trace, setting, machine) / accumulation_steps, table_seconds
    )


class _Bucket:
    """Gradients of stages 2 and 3, in elements, which are reduced a bucket at a time."""

    def __init__(self, setting: MemorySetting) -> None:
        self._room = setting.reduce_bucket
        self._is_early = setting.stage == 3 and setting.num_replicas > 1
        self._filled = 0

    def take(self, gradients: Iterable[int]) -> list[int]:
        """The buckets that are full once these have come; under HSDP three quarters are enough."""
        full = []
        for elements in gradients:
            if self._filled + elements > self._room:
                full += self.finish()
            self._filled += elements
            if self._is_early and 4 * self._filled >= 3 * self._room:
                full += self.finish()
        return full

    def finish(self) -> list[int]:
        """What isn't reduced yet."""
        last, self._filled = self._filled, 0
        return [last] if last else []


class _Links:
    """Seconds of the dense part's collectives under a setting."""

    def __init__(self, machine: Machine, setting: MemorySetting, nodes: int) -> None:
        self._machine, self._nodes = machine, nodes
        self._stage = setting.stage
        ranks = nodes * machine.ranks_per_node
        group = ranks if setting.stage == 0 or setting.num_replicas == 1 else setting.shard_size
        self._ring = {"nodes": max(1, group // machine.ranks_per_node) if nodes > 1 else 1, "ranks": group}
        self._replicas = {"nodes": max(1, nodes // self._ring["nodes"])}

    def gather(self, size: float, messages: int) -> float:
        more = (messages - 1) * self._machine.gathered(0, **self._ring)
        return more + self._machine.gathered(size, **self._ring)

    def reduce(self, size: float) -> float:
        """Stage 3 reduces and scatters; the others all-reduce, which is twice as much."""
        passes = 1 if self._stage == 3 else 2
        return passes * self._machine.gathered(size, **self._ring)

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
