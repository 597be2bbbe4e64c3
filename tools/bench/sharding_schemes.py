"""The sharding schemes that are compared, what each sends between nodes in theory, and what was measured of them."""

import json
import statistics
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

BATCH = 16
"""Examples of a rank's step."""


@dataclass(frozen=True)
class Scheme:
    """A way to share the dense part. stage None is torch's FSDP2, on a flat or a two-level mesh.

    passes: how often the whole model crosses the ring of all ranks in a step; hybrid schemes cross nodes in an
    all-reduce of the shards alone. keeps_last: the matrix at which the forward turns round isn't gathered again.
    is_apart: it changes its process for good, so each depth has a job of its own and isn't interleaved with the others.
    """

    name: str
    stage: int | None
    passes: int = 0
    is_hybrid: bool = False
    is_async: bool = True
    keeps_last: bool = False
    is_apart: bool = False

    def bytes_sent(self, model_bytes: int, matrix_bytes: int, nodes: int, ranks: int) -> float:
        """What leaves a node in a step, in theory."""
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
        # Gathered over all ranks in the forward and within the node in the backward, reduced over all ranks.
        Scheme("hpz", 3, passes=2, is_apart=True),
    )
}


@dataclass(frozen=True)
class Measured:
    """One scheme at one depth. seconds: of a step, one a round; none where it ran out of memory.

    bytes_sent: that left node 0 in a step; None without the interface whose counter says it. matrix_bytes: of one
    layer's largest matrix. peak_mib: of rank 0 over what it had before the model, None if it wasn't asked for;
    infinite where it ran out of memory.
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
        """Whether it ran in the memory that it had."""
        return bool(self.seconds) and self.peak_mib != inf

    @property
    def samples_per_second(self) -> float:
        """Of all ranks together, at the median step."""
        return BATCH * self.ranks / statistics.median(self.seconds)

    @property
    def bytes_in_theory(self) -> float:
        """What a ring moves."""
        return SCHEMES[self.scheme].bytes_sent(self.model_bytes, self.matrix_bytes, self.nodes, self.ranks)


@dataclass(frozen=True)
class Benchmark:
    """What was measured, and under what: measured.json.

    link_mbit, local_mbit: rates of a node's link and inside it, None where nothing limited them. compute_ms: the sleep
    in a layer's forward; its backward has twice that.
    """

    link_mbit: float | None
    local_mbit: float | None
    compute_ms: float
    results: list[Measured]

    def write(self, path: Path) -> None:
        """Write measured.json."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read(path: Path) -> Benchmark:
    """The benchmark that measured.json holds."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Benchmark(**values | {"results": [Measured(**result) for result in values["results"]]})
