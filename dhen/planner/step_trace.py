"""Traces what one micro step computes and keeps, by running the model on fake tensors (paper 3.1).

The dense part runs forward and backward on tensors that have shapes but no memory. The activations that autograd keeps
are therefore exact, even for user-defined interactions, and a model of any size can be traced on any machine. Of
consecutive equal layers only three are traced. The middle one stands for the rest, so the time does not grow with
depth.
"""

import contextlib
import functools
import itertools
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop, sdpa_flop
from transformers.modeling_utils import local_torch_dtype

from dhen.dense.activation_checkpointing import checkpoint_layers
from dhen.model.configuration_dhen import DATA_FIELDS, DhenConfig
from dhen.model.gate import LayerGate
from dhen.model.layer import DhenLayer
from dhen.model.mixture_of_experts import ModuleExperts
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.planner.cuda_autocast import cuda_autocast
from dhen.planner.live_memory import LiveMemory

_ALIKE = 3
"""How many of consecutive equal layers are traced, so that the middle one has equal neighbors on both sides."""
_LAYERS = "model.layers."
_UNTRACEABLE = (RuntimeError, AssertionError, TypeError)
"""What torch raises if code reads the values of fake tensors, or mixes them with real tensors."""
EventKind = Literal["enter", "leave", "gradient", "loss", "end"]
# torch has formulas for the kernels of GPUs alone, but the trace runs on tensors of a CPU.
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
register_flop_formula(_ATTENTION, get_raw=True)(sdpa_flop)
register_flop_formula(_ATTENTION_BACKWARD, get_raw=True)(sdpa_backward_flop)


class UntraceableError(ValueError):
    """The model cannot run on fake tensors. The message says why."""


@dataclass(frozen=True)
class Work:
    """One operation: floating-point operations, and bytes read and written."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Event:
    """A point in the step, with the work and memory since the previous event.

    kind: "enter" and "leave" mark a layer, or a module that owns weights, in the forward and in recomputation; "enter"
    also marks the start of its backward, and "leave" its end, if it owns weights. "gradient": a weight's gradient is
    ready. "loss": end of the forward. "end": end of the step. name: of the module or weight. kept: bytes allocated
    minus bytes freed; gradients of weights are freed at once. peak: largest number of live bytes, relative to the
    previous event.
    """

    kind: EventKind
    name: str
    kept: int
    peak: int
    work: tuple[Work, ...]

    @property
    def layer(self) -> int | None:
        return _layer_of(self.name)


@dataclass(frozen=True)
class StepTrace:
    """One micro step. weights: elements by name. modules: names of the weights that each module owns directly. frozen:
    names of weights without gradient and optimizer state. Activations count as if none were.
    """

    events: tuple[Event, ...]
    weights: dict[str, int]
    modules: dict[str, tuple[str, ...]]
    frozen: frozenset[str] = frozenset()

    @property
    def trained(self) -> dict[str, int]:
        return {name: elements for name, elements in self.weights.items() if name not in self.frozen} or {"": 1}

    @property
    def num_weights(self) -> int:
        return sum(self.weights.values())

    @property
    def loss_at(self) -> int:
        """Index of the "loss" event, the end of the forward."""
        return next(index for index, event in enumerate(self.events) if event.kind == "loss")

    def of_compiled_layers(self, weight_bytes: int) -> "StepTrace":
        """The trace if each layer is compiled: stage 3 gathers a layer's weights together, and the gradients of a layer
        arrive together, when its backward ends. weight_bytes: of one element.

        Activations count as those of layers as written. Fused kernels keep fewer.
        """
        events: list[Event] = []
        for layer, group in itertools.groupby(self.events, key=lambda event: event.layer):
            segment = list(group)
            events += segment if layer is None else _as_one(segment, layer_name(layer), self.weights, weight_bytes)
        modules: dict[str, tuple[str, ...]] = {}
        for name, own in self.modules.items():
            whole = name if _layer_of(name) is None else layer_name(_layer_of(name))
            modules[whole] = modules.get(whole, ()) + own
        return replace(self, events=tuple(events), modules=modules)


@dataclass(frozen=True)
class Precision:
    """weights: dtype of the dense part. autocast: dtype of torch.autocast, by CUDA's rules if `is_gpu`; None: off."""

    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    is_gpu: bool = False


FP32 = Precision()


def trace_step(
    config: DhenConfig,
    batch_size: int,
    precision: Precision = FP32,
    checkpointing: str | int | Sequence[str] = "none",
    num_passes: int = 1,
) -> StepTrace:
    """Trace one micro step of the dense part of `config` with `batch_size` examples.

    checkpointing: `dhen.activation_checkpointing` of a ds_config. num_passes: of each example through the layers.
    Raises ValueError as `checkpoint_layers` does, and UntraceableError if an interaction's code depends on the values
    of its tensors.
    """
    by_kind = not isinstance(checkpointing, str | int)
    depth = len(config.layer_specs)
    recomputed = 0 if by_kind else {"none": 0, "all": depth}.get(checkpointing, checkpointing)
    if recomputed > depth:
        raise ValueError(
            f'{checkpointing}, but the model has {depth} layers. Use "none", "all" or a number up to {depth}.'
        )
    entries, places = _shortened(config, recomputed)
    what = tuple(checkpointing) if by_kind else sum(place[0] < recomputed for place in places)
    with _saying_why():
        trace = _trace(_as_text(config, entries), batch_size, precision, what, num_passes)
    return _lengthened(trace, places)


def training_flops_per_sample(
    config: DhenConfig, batch_size: int = 2, precision: Precision = FP32, num_passes: int = 1
) -> int | None:
    """Floating-point operations of the dense part's forward and backward for one example; None if it is untraceable.

    Counted are matrix products, convolutions and attention, with 2 for a multiply-add, as torch.utils.flop_counter
    does; of a mixture of experts, those of the chosen experts and of the gate. Not counted are the tables, the
    optimizer, what is computed element by element, and recomputation. num_passes: of the example through the layers.
    batch_size and precision change no count, except if experts have different costs: then the larger the batch, the
    closer the count is to the mean. With those of an earlier `trace_step`, this costs nothing.
    """
    try:
        trace = trace_step(config, batch_size, precision, num_passes=num_passes)
    except UntraceableError:
        return None
    return sum(work.flops for event in trace.events for work in event.work) // batch_size


def evaluation_bytes(config: DhenConfig, batch_size: int, precision: Precision = FP32) -> int:
    """Peak bytes of activations while `batch_size` examples are evaluated. Raises UntraceableError."""
    entries, _ = _shortened(config, 0)
    with _saying_why():
        return _evaluation(_as_text(config, entries), batch_size, precision)


@contextlib.contextmanager
def _saying_why() -> Iterator[None]:
    try:
        yield
    except _UNTRACEABLE as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise UntraceableError(f"the model cannot be traced on tensors without values ({why}).") from error


def _as_text(config: DhenConfig, entries: list[dict[str, Any]]) -> str:
    of_data = {name: getattr(config, name) for name in DATA_FIELDS}
    return json.dumps(vars(config.architecture) | of_data | {"layers": entries})


def _shortened(config: DhenConfig, recomputed: int) -> tuple[list[dict[str, Any]], list[range]]:
    """The layers to trace, and for each the layers that it stands for."""
    raw = [{}] * config.num_layers if config.layers is None else config.layers
    num_inputs, keys = config.num_input_embeddings, []
    for index, (entry, spec) in enumerate(zip(raw, config.layer_specs, strict=True)):
        keys.append((json.dumps(entry, sort_keys=True), num_inputs, index < recomputed))
        sizes = [interaction.num_embeddings for interaction in spec.interactions]
        num_inputs = sum(sizes) if spec.ensemble == "concat" else sizes[0]
    entries, places, first = [], [], 0
    for _, group in itertools.groupby(keys):
        count = len(list(group))
        # A head that reads all layers grows with the depth, so no layer can stand for another.
        is_alike = count >= _ALIKE and config.head_inputs == "last"
        counts = [1, count - 2, 1] if is_alike else [1] * count
        for size in counts:
            entries.append(raw[first])
            places.append(range(first, first + size))
            first += size
    return entries, places


@functools.lru_cache(maxsize=64)
def _trace(
    config: str, batch_size: int, precision: Precision, what: int | tuple[str, ...], num_passes: int
) -> StepTrace:
    with _on_fake_tensors(config, batch_size, precision) as (model, inputs):
        checkpoint_layers(model, what)
        with _Recorder([*model.parameters(), *model.buffers(), *inputs.values()]) as recorder:
            recorder.watch(model)
            with torch.autocast("cpu", precision.autocast, enabled=precision.autocast is not None):
                loss = model(**inputs, num_passes=num_passes).loss
            recorder.record("loss", "")
            loss.backward()
            recorder.record("end", "")
    weights = {name: weight.numel() for name, weight in model.named_parameters()}
    owned = {
        name: tuple(f"{name}.{weight}" for weight, _ in module.named_parameters(recurse=False))
        for name, module in model.named_modules()
    }
    return StepTrace(tuple(recorder.events), weights, {name: own for name, own in owned.items() if own})


@functools.lru_cache(maxsize=64)
def _evaluation(config: str, batch_size: int, precision: Precision) -> int:
    with (
        _on_fake_tensors(config, batch_size, precision) as (model, inputs),
        torch.autocast("cpu", precision.autocast, enabled=precision.autocast is not None),
        torch.no_grad(),
        LiveMemory([*model.parameters(), *model.buffers(), *inputs.values()]) as memory,
    ):
        model.eval()(**inputs)
        return memory.peak


@contextlib.contextmanager
def _on_fake_tensors(
    config: str, batch_size: int, precision: Precision
) -> Iterator[tuple[DhenForClickPrediction, dict[str, Tensor]]]:
    """The dense part and a batch on fake tensors."""
    rules = cuda_autocast() if precision.autocast and precision.is_gpu else contextlib.nullcontext()
    with FakeTensorMode(), rules, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with local_torch_dtype(precision.weights):  # .to() cannot change fake weights
            model = DhenForClickPrediction(DhenConfig(**json.loads(config)), with_tables=False)
        for module in model.modules():  # what depends on values
            if isinstance(module, LayerGate):
                module.skips = False
            elif isinstance(module, ModuleExperts):
                module.is_even = True
        num_sparse, dim = len(model.config.lookups), model.config.embedding_dim
        embeddings_BFD = torch.empty(batch_size, num_sparse, dim, requires_grad=num_sparse > 0)
        dense_BN = torch.empty(batch_size, model.config.num_dense_features)
        labels = torch.empty(batch_size, *([1 + len(model.config.tasks)] if model.config.tasks else []))
        yield model, {"inputs_embeds": embeddings_BFD, "dense": dense_BN, "labels": labels}


class _Recorder(LiveMemory):
    """Live memory divided into events, with the operations between them."""

    def __init__(self, external: Sequence[Tensor]) -> None:
        super().__init__(external)
        self.events: list[Event] = []
        self._work: list[Work] = []
        self._before = 0
        self._without_gradient: dict[str, int] = {}
        self._ended: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
        moved = 0 if func.is_view else _bytes_of(args) + _bytes_of(kwargs) + _bytes_of(result)
        if flops or moved:
            self._work.append(Work(flops, moved))
        return result

    def record(self, kind: EventKind, name: str) -> None:
        """Record an event with everything since the last one.

        A module's backward, which has ended with its last gradient, is left when the next part of the step is done.
        """
        if self._ended is not None:
            ended, self._ended = self._ended, None
            self.record("leave", ended)
        work = tuple(self._work)
        self.events.append(Event(kind, name, self.bytes - self._before, self.peak - self._before, work))
        self._work, self._before = [], self.bytes
        self.reset_peak()

    def watch(self, model: nn.Module) -> None:
        """Record an event at each layer, at each module that owns weights, and at each weight's gradient."""
        for name, module in model.named_modules():
            self._without_gradient[name] = len(list(module.parameters(recurse=False)))
            if isinstance(module, DhenLayer) or self._without_gradient[name]:
                module.register_forward_pre_hook(functools.partial(self._enter, name))
                module.register_forward_hook(functools.partial(self._leave, name))
        for name, weight in model.named_parameters():
            weight.register_post_accumulate_grad_hook(functools.partial(self._gradient, name))

    def _enter(self, name: str, *_: Any) -> None:
        self.record("enter", name)

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self.record("leave", name)
        first = next((each for each in tree_iter(output) if isinstance(each, Tensor) and each.requires_grad), None)
        if first is not None:
            first.register_hook(functools.partial(self._enter, name))

    def _gradient(self, name: str, weight: Tensor) -> None:
        weight.grad = None
        self.record("gradient", name)
        module = name.rpartition(".")[0]
        self._without_gradient[module] -= 1
        if not self._without_gradient[module]:
            self._ended = module


def _bytes_of(values: Any) -> int:
    return sum(v.numel() * v.element_size() for v in tree_iter(values) if isinstance(v, Tensor))


def _lengthened(trace: StepTrace, places: Sequence[range]) -> StepTrace:
    """The trace of the whole model: repeats each traced layer, forward and backward, for the layers it stands for."""
    events: list[Event] = []
    is_backward = False
    for short, group in itertools.groupby(trace.events, key=lambda event: event.layer):
        segment = list(group)
        is_backward |= any(event.kind == "loss" for event in segment)
        layers = [None] if short is None else places[short]
        for layer in reversed(layers) if is_backward else layers:
            events += [replace(event, name=_renamed(event.name, layer)) for event in segment]
    weights = {new: size for name, size in trace.weights.items() for new in _names(name, places)}
    modules = {
        new: tuple(own)
        for name, weights_of in trace.modules.items()
        for new, *own in zip(_names(name, places), *(_names(weight, places) for weight in weights_of), strict=True)
    }
    return StepTrace(tuple(events), weights, modules)


def _as_one(events: Iterable[Event], layer: str, weights: Mapping[str, int], weight_bytes: int) -> Iterator[Event]:
    """A layer's events without those of the modules inside it, and with its gradients at the end."""
    kept, peak, gradients = 0, 0, []
    work: tuple[Work, ...] = ()
    for event in events:
        peak, kept, work = max(peak, kept + event.peak), kept + event.kept, work + event.work
        if event.kind == "gradient":
            gradients.append(event.name)
            kept += weights[event.name] * weight_bytes
        elif event.name == layer:
            yield replace(event, kept=kept, peak=peak, work=work)
            kept, peak, work = 0, 0, ()
    for name in gradients:
        yield Event("gradient", name, kept - weights[name] * weight_bytes, max(peak, kept), work)
        kept, peak, work = 0, 0, ()


def _names(name: str, places: Sequence[range]) -> list[str]:
    """The names in the whole model that correspond to `name` in the traced model."""
    short = _layer_of(name)
    return [name] if short is None else [_renamed(name, layer) for layer in places[short]]


def layer_name(layer: int | None) -> str:
    return f"{_LAYERS}{layer}"


def _layer_of(name: str) -> int | None:
    return int(name.removeprefix(_LAYERS).partition(".")[0]) if name.startswith(_LAYERS) else None


def _renamed(name: str, layer: int | None) -> str:
    if layer is None:
        return name
    _, dot, rest = name.removeprefix(_LAYERS).partition(".")
    return f"{_LAYERS}{layer}{dot}{rest}"
