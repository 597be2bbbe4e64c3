"""The grid of tools/bench/plan.py: model, machine, techniques, and the points that are measured."""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dhen.model.configuration_dhen import DhenConfig
from dhen.planner.machine import Machine
from dhen.planner.minimum_set import Job
from dhen.planner.technique import SCHEMES, Technique

POINTS_FILE, TRAINED_FILE = "points.json", "trained.json"
BATCH, NUM_DENSE, TABLES, ROWS = 64, 13, 8, 1000
TECHNIQUES = (
    "dp", "dp+recompute", "zero1", "zero1+recompute", "zero2", "zero2+recompute", "zero2+offload", "hsdp",
    "hsdp+recompute", "hsdp+offload", "zero3", "zero3+recompute", "zero3+offload", "zero3+recompute+offload",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One technique at one depth: peak bytes of the fullest rank and seconds per step, measured and predicted."""

    depth: int
    technique: str
    peak: int
    seconds: float
    predicted_peak: int
    predicted_seconds: float

    @property
    def error(self) -> float:
        """Relative error of the predicted peak."""
        return self.predicted_peak / self.peak - 1


def techniques(depth: int, names: Iterable[str]) -> Iterator[Technique]:
    """The techniques with these names. One that recomputes does so in all layers; stage 3 offloads parameters too."""
    for name in names:
        scheme, *more = name.split("+")
        offload = "parameters" if SCHEMES[scheme] == 3 else "optimizer"
        yield Technique(scheme, depth if "recompute" in more else 0, offload if "offload" in more else "none")


def machine_of(arguments: argparse.Namespace) -> Machine:
    """The cluster of tools/cluster.py with the accelerator that the pauses stand for. Its links are not measured."""
    return Machine(
        name=f"{arguments.nodes} network namespaces",
        source="tools/cluster.py",
        is_gpu=False,
        ranks_per_node=arguments.ranks_per_node,
        memory_gib=(arguments.cap_mib or 1024) / 1024,
        host_memory_gib=0,
        flops={"fp32": arguments.gflops * 1e9},
        memory_bytes_per_second=2e9,
        local_bytes_per_second=(arguments.local_mbit or 1e5) * 125e3,
        node_bytes_per_second=(arguments.link_mbit or 1e5) * 125e3,
        is_local_shared=True,
        seconds_per_module=1e-3,
        costs="cpu",
    )


def job_of(depth: int, arguments: argparse.Namespace, machine: Machine | None = None) -> Job:
    """The model of the grid at a depth. machine: by default without measured links."""
    config = DhenConfig(
        num_dense_features=NUM_DENSE,
        sparse_features=[{"name": f"C{index}", "num_embeddings": ROWS} for index in range(TABLES)],
        embedding_dim=arguments.embedding_dim,
        num_layers=depth,
        num_embeddings_out=arguments.num_embeddings_out,
        interactions=["advanced_dlrm", "self_attention", "linear", "deep_cross_flattened"],
    )
    return Job(config, BATCH, machine or machine_of(arguments), nodes=arguments.nodes)
