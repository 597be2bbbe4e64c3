"""A rank of tools/bench/sharding.py: builds each scheme, takes steps, measures seconds, bytes and memory."""

import argparse
import gc
import json
import os
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import binary_cross_entropy_with_logits

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import DsConfig
from dhen.config.zero_sizes import SIZE_KEYS
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.runtime.topology import Topology
from dhen.training.parallelize import lay_out, parallelize, weights_of
from tools.bench.clock import covered, largest, now
from tools.bench.sharding_schemes import BATCH, JOB_FILE, SCHEMES, Measured, Scheme
from tools.bench.stand_ins import paused, replace_reduce_scatter, run_under_a_cap, status_kib
from tools.cluster import bytes_sent

NUM_DENSE = 8
BYTES = 4  # of an fp32 weight


@dataclass(frozen=True)
class Built:
    """A scheme's model: `step` takes one step on this rank's batch, `release` frees its memory."""

    model: nn.Module
    step: Callable[[], None]
    release: Callable[[], None]


def measure_all(topology: Topology, arguments: argparse.Namespace) -> list[Measured]:
    """Measure all depths, or end the rank after measuring memory. Communicates; all ranks call it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler logs its start and stop on every rank
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # about writing to the logit, which nobody does
    if topology.device.type == "cpu":
        replace_reduce_scatter()
    if arguments.memory:
        measure_memory(topology, arguments)
    return [result for depth in arguments.depths for result in measure(topology, depth, arguments)]


def measure(topology: Topology, depth: int, arguments: argparse.Namespace) -> list[Measured]:
    """All schemes at one depth, in turns. Communicates; all ranks call it."""
    config = model_config(depth, arguments.embeddings)
    compute_seconds = arguments.compute_ms / 1e3
    warm = {name: build_and_warm(SCHEMES[name], config, topology, compute_seconds) for name in arguments.schemes}
    built = {name: one for name, one in warm.items() if one is not None}
    seconds: dict[str, list[float]] = {name: [] for name in arguments.schemes}
    sent: dict[str, list[int]] = {name: [] for name in arguments.schemes}
    for _ in range(arguments.rounds):
        for name, one in built.items():
            topology.barrier()
            before, start = bytes_sent(arguments.interface), now(topology.device)
            one.step()
            topology.barrier()
            seconds[name].append(now(topology.device) - start)
            if before is not None:
                sent[name].append(bytes_sent(arguments.interface) - before)
    if arguments.trace and "hsdp" in built:
        trace(built["hsdp"].step, arguments.output / f"trace-{depth}.json", topology)
    free(*built.values())
    return [
        Measured(
            scheme=name,
            depth=depth,
            nodes=topology.world_size // topology.local_size,
            ranks=topology.world_size,
            model_bytes=model_bytes(config),
            matrix_bytes=(config.num_dense_embeddings * config.embedding_dim) ** 2 * BYTES,
            seconds=seconds[name],
            bytes_sent=statistics.median(sent[name]) if sent[name] else None,
        )
        for name in arguments.schemes
    ]


def build_and_warm(scheme: Scheme, config: DhenConfig, topology: Topology, compute_seconds: float) -> Built | None:
    """The scheme's model after its first step; None on all ranks if the GPU memory of one is too small.

    Communicates; all ranks call it. Shards are equal, so all ranks run out of memory at the same place. If one does so
    alone, the others wait until the job's timeout ends them.
    """
    torch.manual_seed(0)
    built, failed = None, False
    try:
        built = build(scheme, config, topology, compute_seconds)
        built.step()
    except torch.OutOfMemoryError:
        failed = True
    if largest(topology, failed):
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
    # Warm up without the cap: what libraries allocate once is not the scheme's, and some hang if they cannot.
    warm = SCHEMES["fsdp" if SCHEMES[name].is_apart else name]  # a process can have only one model of such a scheme
    build(warm, model_config(1, 4), topology).step()

    def peak_mib() -> float:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before = status_kib("VmRSS")
        built = build(SCHEMES[name], config, topology)
        for _ in range(3):
            built.step()
        return (status_kib("VmHWM") - before) / 1024

    run_under_a_cap(arguments.memory_cap_mib, arguments.output / JOB_FILE, topology, peak_mib)


def trace(step: Callable[[], None], path: Path, topology: Topology) -> None:
    """Write rank 0's step as a Chrome trace. Communicates; all ranks call it.

    With pauses it also prints how much of the all-reduces runs during a layer's backward.
    """
    with torch.profiler.profile() as profiler:
        step()
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
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    origin = min(event["ts"] for event in events)
    reduces, backwards = (
        [(e["ts"] - origin, e["ts"] - origin + e["dur"]) for e in events if e.get("name") == name]
        for name in ("gloo:all_reduce", "PauseBackward")
    )
    if not backwards:
        return 0.0, 0.0
    end = max(last for _, last in (*reduces, *backwards))
    # A much later one is the job's own barrier or norm.
    is_reducing = covered((span for span in reduces if span[0] < backwards[-1][1] + 1e5), end)
    is_under = is_reducing & covered(backwards, end)
    return float(is_under.sum()) / 1e3, float(is_reducing.sum()) / 1e3


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


def model_bytes(config: DhenConfig) -> int:
    """Bytes of all weights."""
    return sum(weights_of(config).values()) * BYTES


def build(scheme: Scheme, config: DhenConfig, topology: Topology, compute_seconds: float = 0.0) -> Built:
    """The scheme's model. Communicates; all ranks call it."""
    make = build_torch if scheme.stage is None else build_deepspeed
    model, score, update, release = make(scheme, config, topology)
    if compute_seconds:
        for layer in model.model.layers:
            layer.forward = paused(layer.forward, compute_seconds, 2 * compute_seconds)

    generator = torch.Generator().manual_seed(topology.rank)
    dense_BN = torch.randn(BATCH, NUM_DENSE, generator=generator).to(topology.device)
    labels_B = torch.randint(0, 2, (BATCH,), generator=generator).float().to(topology.device)

    def step() -> None:
        update(binary_cross_entropy_with_logits(score(dense_BN), labels_B))

    return Built(model, step, release)


def build_deepspeed(scheme: Scheme, config: DhenConfig, topology: Topology) -> tuple[Any, Callable, Callable, Callable]:
    """This project: ZeRO over all ranks, or HSDP."""
    model = parallelize(lay_out(config, topology, ds_config_of(scheme, topology)))
    return model.engine.module, partial(model.score, None), model.step, partial(release_engine, model.engine)


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

    def update(loss: Any) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, lambda dense_BN: model(dense=dense_BN).logits, update, lambda: None
