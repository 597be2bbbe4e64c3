"""Parts of tools/gpu_check.py that need no FBGEMM: the machine's rates, the dense step, where its time goes, memory.

A part calls `report(case, **figures)` for each result as it comes.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from dhen.dense.activation_checkpointing import checkpoint_layers
from dhen.dense.activation_offload import offload_layers
from dhen.dense.compiled_layers import compile_layers
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.planner.step_trace import training_flops_per_sample
from tools.bench.clock import now
from tools.calibrate_machine import copy_rate, product_rate, seconds_per_start

NUM_DENSE = 13
PRODUCT_RATE, COPY_RATE = "bf16 product TFLOP/s", "copy GB/s"
"""Figures of `measure_machine` that other parts compare themselves with."""
_STEPS, _ROUNDS, _WARM = 4, 3, 3
KINDS = {
    "compiled": ("triton",),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "bmm", "addmm", "aten::mm"),
    "Adam": ("adam",),
    "gather and scatter": ("index", "gather", "scatter"),
    "copies and casts": ("memcpy", "copy", "catarray", "aten::cat"),
    "norms": ("norm",),
    "sums": ("reduce",),
    "elementwise": ("elementwise", "vectorized", "memset", "fill"),
}
"""Kinds of kernels by parts of their names; the first that fits counts."""


Report = Callable[..., None]
"""Takes a result: what was measured, and its figures by name."""


@contextlib.contextmanager
def one_case(case: str, device: torch.device, report: Report) -> Iterator[None]:
    """Forget the memory of the case before. If this one fails, report why and go on with the next."""
    torch._dynamo.reset()
    forget_peak(device)
    try:
        yield
    except Exception as error:
        report(case, error=f"{type(error).__name__}: {error}"[:300])


@dataclass(frozen=True)
class Size:
    """How large the work is. embeddings: of x0 and of each layer's output. over_arch: AdvancedDLRM's MLP.

    rows: most rows of a table. table_batch: examples per lookup. dim: D of the dense part and of the tables.
    """

    embeddings: int = 200
    dim: int = 128
    batch: int = 8192
    depths: tuple[int, ...] = (1, 2, 4, 8, 16)
    over_arch: tuple[int, ...] = (2048,)
    product: int = 8192
    rows: int = 1_000_000
    table_batch: int = 65536

    @property
    def middle(self) -> int:
        """The depth of what is measured at one depth."""
        return self.depths[len(self.depths) // 2]


FULL = Size()
TINY = Size(6, 8, 16, (1, 2), (16,), 128, 100, 32)


def dense_config(size: Size, depth: int, over_arch: Sequence[int] | None = None) -> DhenConfig:
    """AdvancedDLRM and linear, each of which outputs half of the embeddings."""
    dlrm = {"kind": "advanced_dlrm", "over_arch": list(over_arch or size.over_arch)}
    return DhenConfig(
        num_dense_features=NUM_DENSE,
        sparse_features=[{"name": f"C{index}", "num_embeddings": 10} for index in range(size.embeddings - 1)],
        embedding_dim=size.dim,
        num_layers=depth,
        num_embeddings_out=size.embeddings // 2,
        interactions=[dlrm, "linear"],
    )


Memory = Literal["none", "recompute", "offload"]


def dense_step(
    config: DhenConfig,
    batch: int,
    device: torch.device,
    *,
    is_compiled: bool = False,
    weights: torch.dtype = torch.float32,
    memory: Memory = "none",
) -> Callable[[], Tensor]:
    """A training step with AdamW: bf16 by autocast, or with weights in bf16. Gradients reach the embeddings too.

    memory: what is done to the activations of all layers.
    """
    torch.manual_seed(0)
    with device:
        model = DhenForClickPrediction(config, with_tables=False).to(weights)
        embeddings_BFD = torch.randn(batch, len(config.tables), config.embedding_dim, dtype=weights, requires_grad=True)
        dense_BN, labels_B = torch.randn(batch, NUM_DENSE, dtype=weights), torch.rand(batch).round()
    compile_layers(model, "layers" if is_compiled else "none", device)
    checkpoint_layers(model, "all" if memory == "recompute" else "none")
    offload_layers(model, "all" if memory == "offload" else "none", device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=weights == torch.float32):
            loss = model(inputs_embeds=embeddings_BFD, dense=dense_BN, labels=labels_B).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        embeddings_BFD.grad = None
        return loss.detach()

    return step


def step_seconds(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds per step once warm: median over rounds of several steps without a wait between them, and the first's."""
    first = now(device)
    step()
    first = now(device) - first
    for _ in range(_WARM):
        step()
    rounds = []
    for _ in range(_ROUNDS):
        start = now(device)
        for _ in range(_STEPS):
            step()
        rounds.append((now(device) - start) / _STEPS)
    return sorted(rounds)[_ROUNDS // 2], first


def peak_gib(device: torch.device) -> float | None:
    """Peak of the device's allocated memory since `forget_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def forget_peak(device: torch.device) -> None:
    """Return what is cached and start a new peak."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.init()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measure_machine(size: Size, device: torch.device, rates: dict[str, float], report: Report) -> None:
    """Rates that the other parts are compared with: matrix products by dtype, a copy in memory, a kernel's start."""
    names = ("bf16", "tf32", "fp32") if device.type == "cuda" else ("bf16", "fp32")
    flops = {f"{name} product TFLOP/s": product_rate(name, device, size.product) / 1e12 for name in names}
    starts = {"microseconds per kernel": seconds_per_start(device) * 1e6}
    report("rates", **flops, **{COPY_RATE: copy_rate(device) / 1e9}, **starts)


Case = tuple[str, DhenConfig, dict[str, Any]]
"""A dense step: its name, its model, and options of `dense_step`."""


def measure_dense(size: Size, device: torch.device, rates: dict[str, float], report: Report) -> None:
    """The dense step by depth, as written and compiled; then with small MLPs, and with bf16 weights."""
    middle = size.middle
    cases: list[Case] = [(f"{depth} layers", dense_config(size, depth), {}) for depth in size.depths]
    cases.append((f"{middle} layers, over arch of 64", dense_config(size, middle, (64,)), {}))
    cases.append((f"{middle} layers, bf16 weights", dense_config(size, middle), {"weights": torch.bfloat16}))
    for name, config, options in cases:
        compiled = (f"{name}, compiled", config, options | {"is_compiled": True})
        measure_steps([(name, config, options), compiled], size, device, rates, report)


def measure_activations(size: Size, device: torch.device, rates: dict[str, float], report: Report) -> None:
    """Time and memory of the dense step where activations are kept, recomputed, or offloaded to the host."""
    config = dense_config(size, size.middle)
    kinds = ("none", "recompute", "offload")
    cases = [(f"{size.middle} layers, {memory}", config, {"memory": memory}) for memory in kinds]
    measure_steps(cases, size, device, rates, report)


def measure_steps(
    cases: Sequence[Case], size: Size, device: torch.device, rates: dict[str, float], report: Report
) -> None:
    """The dense step in each case."""
    for case, config, options in cases:
        with one_case(case, device, report):
            seconds, first = step_seconds(dense_step(config, size.batch, device, **options), device)
            figures = speed(config, size.batch, seconds, rates)
            report(case, **figures, **{"first step s": first, "GiB": peak_gib(device)})


def speed(config: DhenConfig, batch: int, seconds: float, rates: dict[str, float]) -> dict[str, float | None]:
    """Samples and operations per second of a step, and their share of the machine's bf16 matrix products."""
    flops = training_flops_per_sample(config)
    tflops = None if flops is None else flops * batch / seconds / 1e12
    peak = rates.get(PRODUCT_RATE)
    share = None if peak is None or tflops is None else tflops / peak
    return {"ms": seconds * 1e3, "samples/s": batch / seconds, "TFLOP/s": tflops, "share of peak": share}


def measure_time(size: Size, device: torch.device, rates: dict[str, float], report: Report) -> None:
    """Where the time of the dense step goes: the share of each kind of kernel, and of the gaps between kernels."""
    for name, is_compiled in (("as written", False), ("compiled", True)):
        torch._dynamo.reset()
        step = dense_step(dense_config(size, size.middle), size.batch, device, is_compiled=is_compiled)
        step_seconds(step, device)
        shares = shares_of_kernels(step, device)
        of_kinds = dict.fromkeys([*KINDS, "other"], 0.0)
        for kernel, share in shares.items():
            of_kinds[kind_of(kernel)] += share
        of_kinds["no kernel"] = max(0.0, 1.0 - sum(of_kinds.values()))
        slowest = sorted(shares, key=lambda kernel: -shares[kernel])[:12]
        report(
            f"{size.middle} layers, {name}",
            **{kind: round(share, 4) for kind, share in of_kinds.items() if share},
            slowest={kernel[:120]: round(shares[kernel], 4) for kernel in slowest},
        )


def shares_of_kernels(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Each kernel's share of the time of several steps; on a CPU, each operation's."""
    on_device = device.type == "cuda"
    seconds: list[float] = []

    def steps() -> None:
        start = now(device)
        for _ in range(_STEPS):
            step()
        seconds.append(now(device) - start)

    events = profiled(steps, [ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU])
    spent = {each.key: each.self_device_time_total if on_device else each.self_cpu_time_total for each in events}
    return {kernel: microseconds / 1e6 / seconds[-1] for kernel, microseconds in spent.items()}


def profiled(call: Callable[[], object], activities: Sequence[ProfilerActivity]) -> EventList:
    """The events of a call, by name. It is called twice: starting the profiler for the first time takes seconds."""
    for _ in range(2):
        with profile(activities=activities) as profiler:
            call()
    return profiler.key_averages()


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name.

    >>> kind_of("nvjet_tst_128x256_64x4"), kind_of("triton_poi_fused_add_0"), kind_of("unheard_of")
    ('matrix products', 'compiled', 'other')
    """
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
