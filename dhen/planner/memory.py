"""Predicts the peak memory of a rank before anything is allocated (paper 3.1).

A micro step is replayed event by event. Activations come from the trace of the model on fake tensors; weights and
gradients follow what DeepSpeed 0.19.8 does under each ZeRO stage. The peak occurs in the micro step, the optimizer's
step or an evaluation. Its parts show what to shrink.

Not counted: workspaces inside kernels, NCCL's buffers, the CUDA context, and fragmentation of the allocator.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dhen.dense.gradient_bucket import is_nearly_full
from dhen.planner.memory_setting import MemorySetting
from dhen.planner.step_trace import Event, StepTrace, layer_name
from dhen.planner.zero3_gathering import Gathering

ALL_REDUCE_ELEMENTS = 500_000_000
"""Stage 0 reduces up to this many gradients in one flat copy, whatever the ds_config says."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of a rank at its peak, by purpose. host: bytes in host memory, if the rank has a device.

    moment: when the peak occurs, such as "backward, model.layers.3" or "optimizer step".
    """

    parts: dict[str, int]
    host: int
    moment: str

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())

    def with_tables(self, on_device: int, on_host: int) -> "MemoryUse":
        """The same with the bytes of a rank's tables."""
        tables = {"tables": on_device} if on_device else {}
        return replace(self, parts=tables | self.parts, host=self.host + on_host)


def predict_memory(trace: StepTrace, setting: MemorySetting, *, evaluation: int = 0, is_gpu: bool = False) -> MemoryUse:
    """Predict a rank's peak memory in training, without tables. Without a GPU, offloaded bytes count like all others.

    evaluation: bytes of activations while a batch is evaluated.
    """
    rank = _Rank(trace, setting, is_gpu=is_gpu)
    moments = (rank.micro_step(), rank.optimizer_step(), rank.evaluation(evaluation))
    parts, moment = max(moments, key=lambda worst: worst[0].total())
    if not is_gpu:
        parts["offloaded"] = rank.host
    return MemoryUse({name: size for name, size in parts.items() if size}, rank.host if is_gpu else 0, moment)


class _Rank:
    """What one rank holds between steps, and what a step adds."""

    def __init__(self, trace: StepTrace, setting: MemorySetting, *, is_gpu: bool) -> None:
        self._trace, self._setting, self._is_gpu = trace, setting, is_gpu
        self._most_gathered = 0
        size = setting.shard_size
        self._shard = sum(-(-elements // size) for elements in trace.trained.values())
        self._largest = max(trace.trained.values())
        optimizer = self._shard * (setting.state_bytes + (0 if setting.shares_masters else setting.master_bytes))
        on_host = int(optimizer * setting.offload_optimizer)
        stepped = int(min(self._shard, setting.sub_group) * setting.offload_optimizer)
        self._host_temporaries = 0 if setting.temporaries == "none" else 2 * stepped * setting.master_bytes
        self.host = on_host + _Activations(trace, setting.offload_activations).on_host
        if is_gpu:
            self.host += self._host_temporaries
        self.rest = Counter(optimizer=optimizer - on_host)
        if setting.stage < 3:
            self.rest["weights"] = trace.num_weights * setting.weight_bytes
            if on_host:
                # The shard's gradients as they are produced and as the optimizer uses them, and one gradient to copy.
                self.host += self._shard * (setting.gradient_bytes + setting.master_bytes)
                self.host += self._largest * setting.gradient_bytes
                self.rest["buckets"] = self._largest * setting.gradient_bytes
            return
        gradients = self._shard * setting.gradient_bytes
        weights = sum(-(-elements // size) for elements in trace.weights.values()) * setting.weight_bytes
        if on_host:
            self.host += gradients + int(self._shard * setting.offload_optimizer) * setting.master_bytes
        if setting.offload_param:
            self.host += weights
        else:
            self.rest["weights"] = weights

    def micro_step(self) -> tuple[Counter[str], str]:
        """The peak in the forward and backward: what is held then, and when."""
        setting = self._setting
        flow = {2: _Stage2, 3: _Stage3}.get(setting.stage, _Accumulated)(setting, self._trace.trained)
        activations = _Activations(self._trace, setting.offload_activations)
        gathering = gathering_of(self._trace, setting) if setting.stage == 3 else None
        worst: tuple[int, dict[str, int], str] = (0, {}, "")

        def note(moment: str, activations: int, gathered: int, flow_bytes: tuple[int, int]) -> None:
            nonlocal worst
            gradients, buckets = flow_bytes
            total = activations + gathered + gradients + buckets
            if total > worst[0]:
                parts = {"activations": activations, "gathered": gathered, "gradients": gradients, "buckets": buckets}
                worst = (total, parts, moment)

        is_backward = False
        for event in self._trace.events:
            is_backward |= event.kind == "loss"
            peak = activations.pass_by(event, is_backward=is_backward)
            gathered = gathering.elements * setting.weight_bytes if gathering else 0
            where = "backward" if is_backward else "forward"
            note(f"{where}, {event.name or event.kind}", peak, gathered, flow.held)
            if event.kind == "gradient" and event.name not in self._trace.frozen:
                elements = self._trace.weights[event.name]
                if gathering and is_nearly_full(elements, setting.reduce_bucket):
                    gathering.release(event.name)
                    gathered = gathering.elements * setting.weight_bytes
                note(f"reduction, {event.name}", activations.now, gathered, flow.take(event.name, elements))
            if gathering:
                self._most_gathered = max(self._most_gathered, gathering.peak * setting.weight_bytes)
                gathering.follow(event)
                note(f"gathering, {event.name}", activations.now, gathering.peak * setting.weight_bytes, flow.held)
        gathered = gathering.elements * setting.weight_bytes if gathering else 0
        note("reduction of the last gradients", activations.now, gathered, flow.finish())
        return self.rest + Counter(worst[1]), worst[2]

    def optimizer_step(self) -> tuple[Counter[str], str]:
        setting = self._setting
        at_once = min(self._shard, setting.sub_group) if setting.stage == 3 else self._shard
        if setting.stage == 0:
            gradients, temporary = self._shard * 4, self._temporaries(self._largest, self._shard) * 4
        elif setting.offload_optimizer:
            here = at_once - int(at_once * setting.offload_optimizer)
            gradients, temporary = here * setting.master_bytes, self._temporaries(here, here) * setting.master_bytes
            if not self._is_gpu:
                temporary += self._host_temporaries
        else:
            gradients = at_once * setting.master_bytes
            temporary = self._temporaries(at_once, at_once) * setting.master_bytes
            # The gradients are joined into one tensor, which is then converted to the dtype of the masters.
            is_converted = setting.gradient_bytes != setting.master_bytes
            joined = at_once * setting.gradient_bytes if is_converted else 0
            if setting.stage < 3:
                most = max(_shares(self._trace.trained, setting.shard_size).values())
                joined += most * setting.gradient_bytes
            else:  # without a conversion, the optimizer reads the buffer of the gradients
                gradients = self._shard * setting.gradient_bytes + is_converted * gradients
            temporary = max(temporary, joined)
        return self.rest + Counter(gradients=gradients, optimizer=temporary), "optimizer step"

    def evaluation(self, activations: int) -> tuple[Counter[str], str]:
        """The peak in an evaluation, with the training state in memory. Call it after `micro_step`."""
        return self.rest + Counter(activations=activations, gathered=self._most_gathered), "evaluation"

    def _temporaries(self, largest: int, together: int) -> int:
        """Number of extra elements that the optimizer's step holds."""
        return {"one": 2 * largest, "all": together, "none": 0}[self._setting.temporaries]


def _shares(weights: Mapping[str, int], shard_size: int) -> dict[str, int]:
    """By weight: elements of all weights that a rank with a part of it has parts of; the maximum over these ranks."""
    shard = -(-sum(weights.values()) // shard_size)
    spans, first = {}, 0
    for name, elements in weights.items():
        spans[name] = range(first // shard, (first + elements - 1) // shard + 1)
        first += elements
    of_rank = [0] * shard_size
    for name, ranks in spans.items():
        for rank in ranks:
            of_rank[rank] += weights[name]
    return {name: max(of_rank[rank] for rank in ranks) for name, ranks in spans.items()}


def gathering_of(trace: StepTrace, setting: MemorySetting) -> Gathering:
    """Stage 3's gathering of weights, at the start of the traced step."""
    visits = [event.name for event in trace.events if event.kind == "enter" and event.name in trace.modules]
    return Gathering(trace.weights, trace.modules, visits, setting.limits, setting.shard_size)


class _Activations:
    """Bytes of activations on the device. Those of the first `offloaded` layers are there only for their backward."""

    def __init__(self, trace: StepTrace, offloaded: int) -> None:
        self.now = 0
        self._kept: dict[int, int] = {}
        for event in trace.events[: trace.loss_at]:
            if event.layer is not None and event.layer < offloaded:
                self._kept[event.layer] = self._kept.get(event.layer, 0) + event.kept
        self.on_host = sum(self._kept.values())

    def pass_by(self, event: Event, *, is_backward: bool) -> int:
        """Replay the event and return the peak before it."""
        if is_backward and event.kind == "enter" and event.layer is not None:
            for layer in (event.layer, event.layer - 1):  # this layer, and the next one in the backward
                self.now += self._kept.pop(layer, 0)
        peak = self.now + event.peak
        self.now += event.kept
        if not is_backward and event.kind == "leave" and event.name == layer_name(event.layer):
            self.now -= self._kept.get(event.layer, 0)
        return peak


class _Accumulated:
    """Gradients of stages 0 and 1: all are kept until the end of the backward, then reduced."""

    def __init__(self, setting: MemorySetting, weights: Mapping[str, int]) -> None:
        self._setting, self._share = setting, max(_shares(weights, setting.shard_size).values())
        self._most = sum(weights.values())
        self._elements = self._most if setting.accumulates else 0
        self._bucket = setting.reduce_bucket * (2 if setting.overlap_comm else 1) if setting.stage else 0

    @property
    def held(self) -> tuple[int, int]:
        """Bytes of gradients, and of the buckets that reduce them."""
        buckets = self._bucket if self._elements else 0
        return self._elements * self._setting.gradient_bytes, buckets * self._setting.gradient_bytes

    def take(self, name: str, elements: int) -> tuple[int, int]:
        """Add a gradient. Returns what is held meanwhile."""
        del name
        self._elements = min(self._elements + elements, self._most)
        return self.held

    def finish(self) -> tuple[int, int]:
        """What is held while the last gradients are reduced."""
        gradients, buckets = self.held
        extra = self._share if self._setting.stage else min(self._elements, ALL_REDUCE_ELEMENTS)
        return gradients, buckets + extra * self._setting.gradient_bytes


class _Stage2:
    """Gradients of stage 2: they are copied into a bucket, and a full bucket is reduced through another copy.

    A rank allocates room for the gradients of all weights that it owns part of when the first of them is reduced. Ranks
    differ; this tracks the one that needs the most at any time.
    """

    def __init__(self, setting: MemorySetting, weights: Mapping[str, int]) -> None:
        self._setting, self._shares = setting, _shares(weights, setting.shard_size)
        self._bucket = setting.gradient_bucket()
        self._large = self._share = 0
        self._summed = max(self._shares.values()) if setting.accumulates else 0  # sums of earlier micro steps

    @property
    def held(self) -> tuple[int, int]:
        """Bytes of gradients, and of buckets."""
        buckets = (2 if self._setting.overlap_comm else 1) * self._setting.reduce_bucket
        share = 0 if self._setting.offload_optimizer else self._share + self._summed
        return (self._large + share) * self._setting.gradient_bytes, buckets * self._setting.gradient_bytes

    def take(self, name: str, elements: int) -> tuple[int, int]:
        """Add a gradient. Returns what is held meanwhile."""
        held = self.held
        for due in self._bucket.take(name, elements):
            gradients, buckets = self._reduce(due)
            held = gradients + elements * self._setting.gradient_bytes, buckets
        if elements > self._bucket.room:
            self._large = elements
        return held

    def finish(self) -> tuple[int, int]:
        """What is held while the last gradients are reduced."""
        return self._reduce(self._bucket.empty())

    def _reduce(self, due: dict[str, int]) -> tuple[int, int]:
        gradients, buckets = self.held
        self._share = max([self._share, *(self._shares[name] for name in due)])
        self._large = 0
        return gradients, buckets + sum(due.values()) * self._setting.gradient_bytes


class _Stage3:
    """Gradients of stage 3 (LeanStage3): they are reduced from where they are; several are joined in a copy.

    The shards' buffer is allocated at the first reduction. Under HSDP, the all-reduce over replicas works in the buffer
    or, as `MemorySetting.wire_copy` says, on copies, which are there until the end of the backward; then the buffer is
    allocated at the end.
    """

    def __init__(self, setting: MemorySetting, weights: Mapping[str, int]) -> None:
        self._setting, self._bucket = setting, setting.gradient_bucket()
        self._shard = sum(-(-elements // setting.shard_size) for elements in weights.values())
        self._is_allocated = setting.accumulates
        self._is_copied = setting.num_replicas > 1 and setting.wire_copy
        self._on_wire = 0

    @property
    def held(self) -> tuple[int, int]:
        """Bytes of gradients, and of shards in the all-reduce over replicas."""
        setting = self._setting
        buffer = self._shard if self._is_allocated and not setting.offload_optimizer else 0
        wire = self._on_wire // setting.shard_size * setting.wire_bytes if self._is_copied else 0
        return (self._bucket.elements + buffer) * setting.gradient_bytes, wire

    def take(self, name: str, elements: int) -> tuple[int, int]:
        """Add a gradient. Returns what is held meanwhile."""
        reductions = self._bucket.take(name, elements)
        held = [self._reduce(due, reductions[number:]) for number, due in enumerate(reductions)]
        return max([self.held, *held], key=sum)

    def finish(self) -> tuple[int, int]:
        """What is held while the last gradients are reduced."""
        due = self._bucket.empty()
        held = self._reduce(due, [due])
        self._is_allocated = True
        return max(held, self.held, key=sum)

    def _reduce(self, due: dict[str, int], alive: Sequence[dict[str, int]]) -> tuple[int, int]:
        """Reduce `due` while the gradients in `alive` are in memory. Returns what is held meanwhile."""
        setting, elements = self._setting, sum(due.values())
        self._is_allocated = self._is_allocated or not self._is_copied
        gradients = self.held[0] + sum(sum(each.values()) for each in alive) * setting.gradient_bytes
        is_joined = len(due) > 1 or elements % setting.shard_size
        self._on_wire += elements
        return gradients, self.held[1] + (elements if is_joined else 0) * setting.gradient_bytes
