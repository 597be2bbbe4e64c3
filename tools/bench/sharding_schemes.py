"""The sharding schemes of tools/bench/sharding.py, what each sends between nodes in theory, and the results."""

import statistics
from dataclasses import dataclass
from math import inf
from pathlib import Path

from pydantic import TypeAdapter

JOB_FILE, MEASURED_FILE = "job.json", "measured.json"
"""In --output: what rank 0 of one job writes, and the whole benchmark."""
BATCH = 16  # examples per rank and step


@dataclass(frozen=True)
class Scheme:
    """A way to shard the dense part. stage: of ZeRO; None is torch's FSDP2, on a flat or a two-level mesh.

    passes: how often the whole model passes through the ring of all ranks in a step. A hybrid scheme has none: its only
    traffic between nodes is the all-reduce of the shards. keeps_last: the last matrix of the forward pass is still
    gathered when the backward pass starts. is_apart: the scheme changes its process permanently, so each depth is a job
    of its own, which takes no turns with other schemes.
    """

    name: str
    stage: int | None
    passes: int = 0
    is_hybrid: bool = False
    is_async: bool = True
    keeps_last: bool = False
    is_apart: bool = False

    def bytes_sent(self, model_bytes: int, matrix_bytes: int, nodes: int, ranks: int) -> float:
        """Bytes that a node sends per step, in theory."""
        if self.is_hybrid:
            return 2 * model_bytes * (nodes - 1) / nodes
        return (self.passes * model_bytes - self.keeps_last * matrix_bytes) * (ranks - 1) / ranks


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("dp", 0, passes=2),
        Scheme("zero2", 2, passes=3),
        Scheme("fsdp", 3, passes=3, keeps_last=True),
        Scheme("hsdp_sync", 3, is_hybrid=True, is_async=False),
        Scheme("hsdp", 3, is_hybrid=True),
        Scheme("torch_fsdp", None, passes=3),
        Scheme("torch_hsdp", None, is_hybrid=True),
        # Gathers over all ranks in the forward pass and within the node in the backward pass; reduces over all ranks.
        Scheme("hpz", 3, passes=2, is_apart=True),
    )
}


@dataclass(frozen=True)
class Measured:
    """One scheme at one depth. seconds: one value per round; empty if the scheme ran out of memory.

    bytes_sent: what node 0 sent per step; None without the interface that counts it. matrix_bytes: of a layer's largest
    matrix. peak_mib: what rank 0 allocated beyond what it had before the model; None if it was not measured, infinite
    if the scheme ran out of memory.
    """

    scheme: str
    depth: int
    nodes: int
    ranks: int
    model_bytes: int
    matrix_bytes: int
    seconds: list[float]
    bytes_sent: float | None
    peak_mib: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the scheme had enough memory."""
        return bool(self.seconds) and self.peak_mib != inf

    @property
    def step_seconds(self) -> float:
        """Seconds of the median step."""
        return statistics.median(self.seconds)

    @property
    def samples_per_second(self) -> float:
        """Samples per second of all ranks, by the median step."""
        return BATCH * self.ranks / self.step_seconds

    @property
    def bytes_in_theory(self) -> float:
        """What node 0 sends per step, in theory."""
        return SCHEMES[self.scheme].bytes_sent(self.model_bytes, self.matrix_bytes, self.nodes, self.ranks)


@dataclass(frozen=True)
class Benchmark:
    """The results and their conditions: measured.json.

    link_mbit, local_mbit: rates of a node's link and inside a node; None on a cluster that nothing limits. compute_ms:
    the sleep in a layer's forward; its backward sleeps twice as long.
    """

    link_mbit: float | None
    local_mbit: float | None
    compute_ms: float
    results: list[Measured]


def read(path: Path) -> Benchmark:
    """The benchmark in a measured.json."""
    return TypeAdapter(Benchmark).validate_json(path.read_bytes())
