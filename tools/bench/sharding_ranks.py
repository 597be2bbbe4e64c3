"""A rank of tools/bench/sharding.py: builds each scheme, takes steps, measures seconds, bytes and memory."""

import argparse
import gc
import itertools
import json
import os
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import binary_cross_entropy_with_logits

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import DsConfig
from dhen.config.zero_sizes import SIZE_KEYS
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.runtime import topology as job
from dhen.runtime.topology import Topology
from dhen.training.parallelize import lay_out, parallelize
from tools.bench.clock import now
from tools.bench.sharding_schemes import BATCH, JOB_FILE, SCHEMES, Measured, Scheme
from tools.bench.stand_ins import paused, replace_reduce_scatter, run_under_a_cap, status_kib
from tools.cluster import bytes_sent

NUM_DENSE = 8
BYTES = 4  # of an fp32 weight


@dataclass(frozen=True)
class Built:
    """A scheme's model: `step` takes one step, `release` frees its memory."""

    model: nn.Module
    step: Callable[[Any, Any], None]
    release: Callable[[], None]


def measure_all(arguments: argparse.Namespace) -> list[Measured]:
    """Measure all depths; returns the results on rank 0, nothing on others. Communicates; all ranks call it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler logs its start and stop on every rank
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # about writing to the logit, which nobody does
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
    """All schemes at one depth, in turns. Communicates; all ranks call it."""
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
            before, start = bytes_sent(arguments.interface), now(topology.device)
            one.step(dense_BN, labels_B)
            topology.barrier()
            seconds[name].append(now(topology.device) - start)
            if before is not None:
                sent[name].append(bytes_sent(arguments.interface) - before)
    if arguments.trace and "hsdp" in built:
        trace(built["hsdp"].step, dense_BN, labels_B, arguments.output / f"trace-{depth}.json", topology)
    free(*built.values())
    return [
        Measured(
            scheme=name,
            depth=depth,
            nodes=topology.world_size // topology.local_size,
            ranks=topology.world_size,
            model_bytes=model_bytes(config),
            matrix_bytes=matrix_size(config) * BYTES,
            seconds=seconds[name],
            bytes_sent=statistics.median(sent[name]) if sent[name] else None,
        )
        for name in arguments.schemes
    ]


def build_and_warm(
    scheme: Scheme, config: DhenConfig, topology: Topology, compute_seconds: float, dense_BN: Any, labels_B: Any
) -> Built | None:
    """The scheme's model after its first step; None on all ranks if the GPU memory of one is too small.

    Communicates; all ranks call it. Shards are equal, so all ranks run out of memory at the same place. If one does so
    alone, the others wait until the job's timeout ends them.
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
    """Free the memory of these models, and of everything that is not referenced any more."""
    for built in left:
        built.release()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_memory(topology: Topology, arguments: argparse.Namespace) -> NoReturn:
    """Measure one scheme at one depth under the cap; rank 0 writes its peak. Communicates; ends the rank."""
    (depth,), (name,) = arguments.depths, arguments.schemes
    config = model_config(depth, arguments.embeddings)
    dense_BN, labels_B = (torch.rand(*shape, device=topology.device) for shape in ((BATCH, NUM_DENSE), (BATCH,)))
    # Warm up without the cap: what libraries allocate once is not the scheme's, and some hang if they cannot.
    warm = SCHEMES["fsdp" if SCHEMES[name].is_apart else name]  # a process can have only one model of such a scheme
    build(warm, model_config(1, 4), topology, 0.0).step(dense_BN, labels_B)

    def peak_mib() -> float:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before = status_kib("VmRSS")
        built = build(SCHEMES[name], config, topology, 0.0)
        for _ in range(3):
            built.step(dense_BN, labels_B)
        return (status_kib("VmHWM") - before) / 1024

    run_under_a_cap(arguments.memory_cap_mib, arguments.output / JOB_FILE, topology, peak_mib)


def trace(step: Callable, dense_BN: Any, labels_B: Any, path: Path, topology: Topology) -> None:
    """Write rank 0's step as a Chrome trace. Communicates; all ranks call it.

    With pauses it also prints how much of the all-reduces runs during a layer's backward.
    """
    with torch.profiler.profile() as profiler:
        step(dense_BN, labels_B)
    topology.barrier()
    if topology.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        under, total = overlap(json.loads(path.read_text()))
        if total:
            print(f"{path}: {under:.0f} ms of the all-reduces' {total:.0f} ms run during a layer's backward")


def overlap(trace: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds of all-reduces during a layer's backward (its pause), and of all all-reduces.

    Both are 0 without pauses or without gloo's all-reduces.
    """
    spans = {"gloo:all_reduce": [], "PauseBackward": []}
    for event in trace["traceEvents"]:
        if event.get("name") in spans and event.get("ph") == "X":
            spans[event["name"]].append((event["ts"], event["ts"] + event["dur"]))
    if not spans["PauseBackward"]:
        return 0.0, 0.0
    # A much later one is the job's own barrier or norm.
    reduces = [(first, last) for first, last in spans["gloo:all_reduce"] if first < spans["PauseBackward"][-1][1] + 1e5]
    marks = sorted({mark for span in (*reduces, *spans["PauseBackward"]) for mark in span})
    total = under = 0.0
    for first, last in itertools.pairwise(marks):
        if any(start <= first and last <= end for start, end in reduces):
            total += last - first
            under += any(start <= first and last <= end for start, end in spans["PauseBackward"]) * (last - first)
    return under / 1e3, total / 1e3


def model_config(depth: int, embeddings: int) -> DhenConfig:
    """Layers of one size, each with a flattened cross of (embeddings * 16)^2 weights and a linear interaction."""
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
    """Weights in a layer's largest matrix."""
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
    if compute_seconds:
        for layer in model.model.layers:
            layer.forward = paused(layer.forward, compute_seconds, 2 * compute_seconds)

    def step(dense_BN: Any, labels_B: Any) -> None:
        update(binary_cross_entropy_with_logits(score(dense_BN), labels_B))

    return Built(model, step, release)


def build_deepspeed(scheme: Scheme, config: DhenConfig, topology: Topology) -> tuple[Any, Callable, Callable, Callable]:
    """This project: ZeRO over all ranks, or HSDP."""
    model = parallelize(lay_out(config, topology, ds_config_of(scheme, topology)))
    return (
        model.engine.module,
        lambda dense_BN: model.score(dense_BN.new_empty(len(dense_BN), 0, config.embedding_dim), dense_BN),
        model.step,
        lambda: release_engine(model.engine),
    )


def ds_config_of(scheme: Scheme, topology: Topology) -> DsConfig:
    """The ds_config of a ZeRO scheme. Its sizes are "auto"."""
    sizes = SIZE_KEYS if scheme.stage == 3 else SIZE_KEYS[:1]
    zero: dict[str, Any] = {"stage": scheme.stage} | dict.fromkeys(sizes, "auto")
    if scheme.name == "hpz":  # refused in a user's ds_config: two hpZ models in one process break each other
        zero["zero_hpz_partition_size"] = topology.local_size
    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}},
        "zero_optimization": zero,
    }
    is_one_node = topology.local_size == topology.world_size
    section = DhenSection(
        shard_group="node" if scheme.is_hybrid and not is_one_node else "world", async_all_reduce=scheme.is_async
    )
    return DsConfig("tools/bench/sharding.py", settings, section)


def release_engine(engine: deepspeed.DeepSpeedEngine) -> None:
    """Free what the engine holds. Hooks still refer to its optimizers, so this empties them."""
    engine.destroy()
    for parameter in engine.module.parameters():
        if hasattr(parameter, "ds_tensor"):
            parameter.data = parameter.ds_tensor.data = parameter.new_empty(0)
    for optimizer in (getattr(engine.optimizer, "optimizer", None), engine.optimizer):  # torch's, and ZeRO's
        if optimizer is not None:
            vars(optimizer).clear()


def build_torch(scheme: Scheme, config: DhenConfig, topology: Topology) -> tuple[Any, Callable, Callable, Callable]:
    """torch's FSDP2 as torch documents it: each layer, then the whole model."""
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def score(dense_BN: Any) -> Any:
        return model(inputs_embeds=dense_BN.new_empty(len(dense_BN), 0, config.embedding_dim), dense=dense_BN).logits

    def update(loss: Any) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, score, update, lambda: None
