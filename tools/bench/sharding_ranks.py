"""What a rank of tools/bench/sharding.py does: build each scheme, take steps, count seconds, bytes and memory."""

import argparse
import ctypes
import gc
import itertools
import json
import os
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import binary_cross_entropy_with_logits

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import DsConfig
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.runtime import topology as job
from dhen.runtime.topology import Topology
from dhen.training.parallelize import parallelize
from tools.bench.sharding_schemes import BATCH, SCHEMES, Measured, Scheme

NUM_DENSE = 8
BYTES = 4  # of an fp32 weight
OUT_OF_MEMORY = 12


@dataclass(frozen=True)
class Built:
    """A scheme's model: `step` takes one step, `release` gives its memory back."""

    step: Callable[[Any, Any], None]
    release: Callable[[], None]


def work(arguments: argparse.Namespace) -> list[Measured]:
    """Measure all depths on this rank; rank 0 returns what was measured. Communicates; all ranks call it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's start and stop on every rank
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # that the logit is a view: nobody writes to it
    topology = job.start(timeout_minutes=5)
    if topology.device.type == "cpu":
        replace_reduce_scatter()
    if arguments.memory:
        measure_memory(topology, arguments)
    results: list[Measured] = []
    for depth in arguments.depths:
        results += measure(topology, depth, arguments)
    job.stop()
    return results if topology.is_main else []


def measure(topology: Topology, depth: int, arguments: argparse.Namespace) -> list[Measured]:
    """All schemes at one depth, interleaved. Communicates; all ranks call it."""
    config = model_config(depth, arguments.embeddings)
    generator = torch.Generator().manual_seed(topology.rank)
    dense_BN = torch.randn(BATCH, NUM_DENSE, generator=generator).to(topology.device)
    labels_B = torch.randint(0, 2, (BATCH,), generator=generator).float().to(topology.device)
    built: dict[str, Built] = {}
    for name in arguments.schemes:
        one = build_and_warm(SCHEMES[name], config, topology, arguments.compute_ms / 1e3, dense_BN, labels_B)
        if one is not None:
            built[name] = one
    seconds: dict[str, list[float]] = {name: [] for name in arguments.schemes}
    sent: dict[str, list[int]] = {name: [] for name in arguments.schemes}
    for _ in range(arguments.rounds):
        for name, one in built.items():
            topology.barrier()
            before, start = bytes_sent(arguments.interface), time.perf_counter()
            one.step(dense_BN, labels_B)
            if topology.device.type == "cuda":
                torch.cuda.synchronize()
            topology.barrier()
            seconds[name].append(time.perf_counter() - start)
            if before is not None:
                sent[name].append(bytes_sent(arguments.interface) - before)
    if arguments.trace and "hsdp" in built:
        trace(built["hsdp"].step, dense_BN, labels_B, Path(arguments.output) / f"trace-{depth}.json", topology)
    free(*built.values())
    nodes, ranks = topology.world_size // topology.local_size, topology.world_size
    sizes = (model_bytes(config), matrix_size(config) * BYTES)
    return [
        Measured(
            name, depth, nodes, ranks, *sizes, seconds[name], statistics.median(sent[name]) if sent[name] else None
        )
        for name in arguments.schemes
    ]


def build_and_warm(
    scheme: Scheme, config: DhenConfig, topology: Topology, compute_seconds: float, dense_BN: Any, labels_B: Any
) -> Built | None:
    """The scheme's model after its first step; None where the GPUs' memory doesn't hold it.

    Communicates; all ranks call it, and leave a scheme together. Shards are equal, so they run out of memory at the
    same place; should one do so alone, the others wait for it until the job's timeout ends them.
    """
    torch.manual_seed(0)
    built, failed = None, False
    try:
        built = build(scheme, config, topology, compute_seconds)
        built.step(dense_BN, labels_B)
    except torch.OutOfMemoryError:
        failed = True
    flag = torch.tensor(float(failed), device=topology.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=topology.world)
    if flag.item():
        free(*([] if built is None else [built]))
        return None
    return built


def free(*left: Built) -> None:
    """Give back the memory of what is left, and of what nobody holds any more."""
    for built in left:
        built.release()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_memory(topology: Topology, arguments: argparse.Namespace) -> NoReturn:
    """One scheme at one depth alone in the process, under the cap: rank 0 writes its peak. Communicates; ends the rank.

    A rank that can't allocate writes that it couldn't, and ends the job.
    """
    (depth,), (name,) = arguments.depths, arguments.schemes
    peak_file = Path(arguments.output) / f"peak-{name}-{depth}.json"
    config = model_config(depth, arguments.embeddings)
    dense_BN, labels_B = (torch.rand(*shape, device=topology.device) for shape in ((BATCH, NUM_DENSE), (BATCH,)))
    # Warm: what libraries allocate once isn't the scheme's, and some hang rather than fail where they can't.
    warm = SCHEMES["fsdp" if SCHEMES[name].is_apart else name]  # a process can have one model of such a scheme
    build(warm, model_config(1, 4), topology, 0.0).step(dense_BN, labels_B)
    before = start_memory(arguments.memory_cap_mib, topology.device)
    try:
        built = build(SCHEMES[name], config, topology, 0.0)
        for _ in range(3):
            built.step(dense_BN, labels_B)
        peak = peak_memory(topology.device) - before
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        peak_file.write_text("null")
        os._exit(OUT_OF_MEMORY)
    if topology.is_main:
        peak_file.write_text(json.dumps(peak))
    topology.barrier()
    os._exit(0)


def start_memory(cap_mib: float, device: torch.device) -> float:
    """MiB in use now, from which on `cap_mib` more are allowed; 0 is no cap."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        if cap_mib:
            share = cap_mib * 2**20 / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(share, device)
        return torch.cuda.memory_allocated(device) / 2**20
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    if cap_mib:
        limit = int(status_kib("VmData") * 1024 + cap_mib * 2**20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    return status_kib("VmRSS") / 1024


def peak_memory(device: torch.device) -> float:
    """MiB at the worst moment since `start_memory`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return status_kib("VmHWM") / 1024


def status_kib(key: str) -> int:
    """A line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def trace(step: Callable, dense_BN: Any, labels_B: Any, path: Path, topology: Topology) -> None:
    """One step as a Chrome trace of rank 0. Communicates; all ranks call it.

    How much runs at once is told only by the pauses, so without them the trace speaks for itself.
    """
    with torch.profiler.profile() as profiler:
        step(dense_BN, labels_B)
    topology.barrier()
    if topology.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        under, total = overlap(json.loads(path.read_text()))
        if total:
            print(f"{path}: {under:.0f} of the all-reduces' {total:.0f} ms run while a layer's backward computes")


def overlap(trace: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds in which an all-reduce and a layer's backward (its pause) run at once, and of all all-reduces.

    Zeros without pauses, or without gloo's all-reduces.
    """
    spans = {"gloo:all_reduce": [], "PauseBackward": []}
    for event in trace["traceEvents"]:
        if event.get("name") in spans and event.get("ph") == "X":
            spans[event["name"]].append((event["ts"], event["ts"] + event["dur"]))
    if not spans["PauseBackward"]:
        return 0.0, 0.0
    # Those of more than a number: the last one is the job's own barrier or norm.
    reduces = [(first, last) for first, last in spans["gloo:all_reduce"] if first < spans["PauseBackward"][-1][1] + 1e5]
    marks = sorted({mark for span in (*reduces, *spans["PauseBackward"]) for mark in span})
    total = under = 0.0
    for first, last in itertools.pairwise(marks):
        if any(start <= first and last <= end for start, end in reduces):
            total += last - first
            under += any(start <= first and last <= end for start, end in spans["PauseBackward"]) * (last - first)
    return under / 1e3, total / 1e3


def model_config(depth: int, embeddings: int) -> DhenConfig:
    """Layers of one size: (embeddings * 16)^2 weights of a flattened cross, and a linear interaction's."""
    half = embeddings // 2
    interactions = [
        {"kind": "deep_cross_flattened", "num_embeddings": half},
        {"kind": "linear", "num_embeddings": embeddings - half},
    ]
    return DhenConfig(
        num_dense_features=NUM_DENSE, num_dense_embeddings=embeddings, dense_mlp=[], head_mlp=[16], num_layers=depth,
        embedding_dim=16, interactions=interactions,
    )  # fmt: skip


def matrix_size(config: DhenConfig) -> int:
    """Weights of a layer's largest matrix."""
    return (config.num_dense_embeddings * config.embedding_dim) ** 2


def model_bytes(config: DhenConfig) -> int:
    """Bytes of all weights."""
    with torch.device("meta"):
        model = DhenForClickPrediction(config, with_tables=False)
    return sum(parameter.numel() for parameter in model.parameters()) * BYTES


def build(scheme: Scheme, config: DhenConfig, topology: Topology, compute_seconds: float) -> Built:
    """The scheme's model. Communicates; all ranks call it."""
    make = build_torch if scheme.stage is None else build_deepspeed
    model, score, update, release = make(scheme, config, topology)
    for layer in model.model.layers:
        add_pauses(layer, compute_seconds)

    def step(dense_BN: Any, labels_B: Any) -> None:
        update(binary_cross_entropy_with_logits(score(dense_BN), labels_B))

    return Built(step, release)


def build_deepspeed(scheme: Scheme, config: DhenConfig, topology: Topology) -> tuple[Any, Callable, Callable, Callable]:
    """The project's own way: ZeRO over all ranks, or HSDP."""
    layer = matrix_size(config)
    zero: dict[str, Any] = {"stage": scheme.stage, "reduce_bucket_size": layer + layer // 4}
    if scheme.stage == 3:
        # A model of any depth in the memory of two layers: all is gathered again in the backward, as theory counts it.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
        zero |= {"stage3_prefetch_bucket_size": layer, "stage3_max_live_parameters": 2 * layer}
    if scheme.name == "hpz":  # refused in a user's ds_config: two of them in one process spoil each other
        zero["zero_hpz_partition_size"] = topology.local_size
    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": zero,
    }
    is_one_node = topology.local_size == topology.world_size
    section = DhenSection(
        shard_group="node" if scheme.is_hybrid and not is_one_node else "world", async_all_reduce=scheme.is_async
    )
    model = parallelize(config, topology, DsConfig("tools/bench/sharding.py", settings, section))
    return (
        model.engine.module,
        lambda dense_BN: model.score(dense_BN.new_empty(len(dense_BN), 0, config.embedding_dim), dense_BN),
        model.step,
        lambda: release_engine(model.engine),
    )


def release_engine(engine: deepspeed.DeepSpeedEngine) -> None:
    """Free what the engine holds. Hooks still refer to its stage 3 afterwards, so that is emptied."""
    engine.destroy()
    for parameter in engine.module.parameters():
        if hasattr(parameter, "ds_tensor"):
            parameter.data = parameter.ds_tensor.data = parameter.new_empty(0)
    if engine.optimizer is not None:
        vars(engine.optimizer).clear()


def build_torch(scheme: Scheme, config: DhenConfig, topology: Topology) -> tuple[Any, Callable, Callable, Callable]:
    """torch's own FSDP2, as its users apply it: each layer, then the whole."""
    nodes = topology.world_size // topology.local_size
    kind = topology.device.type
    if scheme.is_hybrid:
        mesh = init_device_mesh(kind, (nodes, topology.local_size), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (topology.world_size,))
    model = DhenForClickPrediction(config, with_tables=False).to(topology.device)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def score(dense_BN: Any) -> Any:
        return model(inputs_embeds=dense_BN.new_empty(len(dense_BN), 0, config.embedding_dim), dense=dense_BN).logits

    def update(loss: Any) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, score, update, lambda: None


def add_pauses(layer: Any, seconds: float) -> None:
    """Let the layer's forward take `seconds` longer, and its backward twice that."""
    if seconds:
        layer.forward = paused(layer.forward, seconds, 2 * seconds)


def paused(function: Callable, forward: float, backward: float) -> Callable:
    """`function` and its backward, so many seconds later."""

    class Pause(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            time.sleep(forward)
            ctx.save_for_backward(x.new_empty(0))  # a recomputation stops at the last tensor that is saved
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            time.sleep(backward)
            return gradient

    return lambda *inputs: Pause.apply(function(*inputs))


def bytes_sent(interface: str) -> int | None:
    """Bytes that have left this node over `interface`; None where it has none of that name."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.strip().partition(":")
        if name == interface:
            return int(counters.split()[8])
    return None


def replace_reduce_scatter() -> None:
    """Let a ring of sends stand for gloo's reduce_scatter_tensor, which moves as many bytes as an all-reduce."""

    def ring(output: Any, input: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        group = group or dist.group.WORLD
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        after = dist.get_global_rank(group, (rank + 1) % size)
        before = dist.get_global_rank(group, (rank - 1) % size)
        chunks = list(input.view(size, -1).unbind())
        passed = chunks[(rank - 1) % size].clone()
        for hop in range(2, size + 1):
            received = passed.clone()
            sending = dist.isend(passed, after, group)
            dist.recv(received, before, group)
            sending.wait()
            passed = received.add_(chunks[(rank - hop) % size])
        output.view(-1).copy_(passed)
        if op == dist.ReduceOp.AVG:
            output.div_(size)
        return Done() if async_op else None

    class Done:
        def wait(self) -> None:
            pass

    dist.reduce_scatter_tensor = dist.reduce_scatter_single = ring
    deepspeed.comm.reduce_scatter_fn = lambda output, inputs, group=None, **_: ring(output, inputs, group=group)
