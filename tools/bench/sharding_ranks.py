"""The sharding schemes of tools/bench/sharding.py, and a rank's work: builds each scheme, measures its steps."""

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NoReturn

import torch
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
from tools.bench.clock import in_turns
from tools.bench.launch import JOB_FILE
from tools.bench.small_work import OPTIMIZER
from tools.bench.stand_ins import paused, replace_reduce_scatter, run_under_a_cap, status_kib
from tools.cluster import bytes_sent

BATCH = 16  # examples per rank and step
NUM_DENSE = 8
BYTES = 4  # of an fp32 weight


@dataclass(frozen=True)
class Scheme:
    """A way to shard the dense part. stage: of ZeRO; None is torch's FSDP2, on a flat or a two-level mesh.

    passes: how often the whole model passes through the ring of all ranks in a step. A hybrid scheme has none: its only
    traffic between nodes is the all-reduce of the shards. keeps_last: the last matrix of the forward pass is still
    gathered when the backward pass starts.
    """

    stage: int | None
    passes: int = 0
    is_hybrid: bool = False
    is_async: bool = True
    keeps_last: bool = False

    def bytes_sent(self, model_bytes: int, matrix_bytes: int, nodes: int, ranks: int) -> float:
        """Bytes that a node sends per step, in theory."""
        if self.is_hybrid:
            return 2 * model_bytes * (nodes - 1) / nodes
        return (self.passes * model_bytes - self.keeps_last * matrix_bytes) * (ranks - 1) / ranks


SCHEMES = {
    "dp": Scheme(0, passes=2),
    "zero2": Scheme(2, passes=3),
    "fsdp": Scheme(3, passes=3, keeps_last=True),
    "hsdp_sync": Scheme(3, is_hybrid=True, is_async=False),
    "hsdp": Scheme(3, is_hybrid=True),
    "torch_fsdp": Scheme(None, passes=3),
    "torch_hsdp": Scheme(None, is_hybrid=True),
}


@dataclass(frozen=True)
class Measured:
    """One scheme at one depth. seconds: one value per round.

    bytes_sent: what node 0 sent per step. matrix_bytes: of a layer's largest matrix. peak_mib: what rank 0 allocated
    beyond what it had before the model; None if it was not measured, infinite if the cap is too low.
    """

    scheme: str
    depth: int
    nodes: int
    ranks: int
    model_bytes: int
    matrix_bytes: int
    seconds: list[float]
    bytes_sent: float
    peak_mib: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the scheme had enough memory under the cap."""
        return self.peak_mib != inf

    @property
    def samples_per_second(self) -> float:
        """Samples per second of all ranks, by the median step."""
        return BATCH * self.ranks / statistics.median(self.seconds)

    @property
    def bytes_in_theory(self) -> float:
        """What node 0 sends per step, in theory."""
        return SCHEMES[self.scheme].bytes_sent(self.model_bytes, self.matrix_bytes, self.nodes, self.ranks)


def measure(topology: Topology, arguments: argparse.Namespace) -> list[Measured]:
    """Measure all schemes at one depth, in turns. With --memory: measure memory, and end the rank. Communicates; all
    ranks call it.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # about writing to the logit, which nobody does
    replace_reduce_scatter()
    if arguments.memory:
        measure_memory(topology, arguments)
    (depth,) = arguments.depths
    config = model_config(depth, arguments.embeddings)
    steps = {name: build(SCHEMES[name], config, topology, arguments.compute_ms / 1e3) for name in arguments.schemes}
    for take_step in steps.values():
        take_step()  # warms up
    sent: dict[str, list[int]] = {name: [] for name in arguments.schemes}

    def count_and_step(name: str) -> None:
        before = bytes_sent()
        steps[name]()
        topology.barrier()
        sent[name].append(bytes_sent() - before)

    seconds = in_turns({name: partial(count_and_step, name) for name in steps}, topology, arguments.rounds)
    return [
        Measured(
            scheme=name,
            depth=depth,
            nodes=topology.world_size // topology.local_size,
            ranks=topology.world_size,
            model_bytes=sum(weights_of(config).values()) * BYTES,
            matrix_bytes=(config.num_dense_embeddings * config.embedding_dim) ** 2 * BYTES,
            seconds=seconds[name],
            bytes_sent=statistics.median(sent[name]),
        )
        for name in arguments.schemes
    ]


def measure_memory(topology: Topology, arguments: argparse.Namespace) -> NoReturn:
    """Measure one scheme at one depth under the cap; rank 0 writes its peak. Communicates; ends the rank."""
    (depth,), (name,) = arguments.depths, arguments.schemes
    config = model_config(depth, arguments.embeddings)
    # Warm up without the cap: what libraries allocate once is not the scheme's, and some hang if they cannot.
    build(SCHEMES[name], model_config(1, 4), topology)()

    def peak_mib() -> float:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before = status_kib("VmRSS")
        take_step = build(SCHEMES[name], config, topology)
        for _ in range(3):
            take_step()
        return (status_kib("VmHWM") - before) / 1024

    run_under_a_cap(arguments.memory_cap_mib, arguments.output / JOB_FILE, topology, peak_mib)


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


def build(scheme: Scheme, config: DhenConfig, topology: Topology, compute_seconds: float = 0.0) -> Callable[[], None]:
    """A training step of the scheme on this rank's batch. Communicates; all ranks call it."""
    torch.manual_seed(0)
    make = build_torch if scheme.stage is None else build_deepspeed
    layers, score, update = make(scheme, config, topology)
    if compute_seconds:
        for layer in layers:
            layer.forward = paused(layer.forward, compute_seconds, 2 * compute_seconds)

    generator = torch.Generator().manual_seed(topology.rank)
    dense_BN = torch.randn(BATCH, NUM_DENSE, generator=generator)
    labels_B = torch.randint(0, 2, (BATCH,), generator=generator).float()

    def step() -> None:
        update(binary_cross_entropy_with_logits(score(dense_BN), labels_B))

    return step


def build_deepspeed(scheme: Scheme, config: DhenConfig, topology: Topology) -> tuple[Any, Callable, Callable]:
    """This project: ZeRO over all ranks, or HSDP. The sizes of ZeRO's buckets are "auto"."""
    sizes = SIZE_KEYS if scheme.stage == 3 else SIZE_KEYS[:1]
    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "optimizer": OPTIMIZER,
        "zero_optimization": {"stage": scheme.stage} | dict.fromkeys(sizes, "auto"),
    }
    section = DhenSection(shard_group="node" if scheme.is_hybrid else "world", async_all_reduce=scheme.is_async)
    model = parallelize(lay_out(config, topology, DsConfig("tools/bench/sharding.py", settings, section)))
    return model.engine.module.model.layers, partial(model.score, None), model.step


def build_torch(scheme: Scheme, config: DhenConfig, topology: Topology) -> tuple[Any, Callable, Callable]:
    """torch's FSDP2 as torch documents it: each layer, then the whole model."""
    nodes = topology.world_size // topology.local_size
    if scheme.is_hybrid:
        mesh = init_device_mesh("cpu", (nodes, topology.local_size), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (topology.world_size,))
    model = DhenForClickPrediction(config, with_tables=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def update(loss: Any) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model.model.layers, lambda dense_BN: model(dense=dense_BN).logits, update
