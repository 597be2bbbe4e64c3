"""The planner's description of a machine: memory, rates and links, read from a small YAML file."""

import os
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from dhen.model.names import first_mistake, unknown_name
from dhen.model.ranges import NotNegative, Positive, Size
from dhen.yaml_files import read_yaml

_STRICT = ConfigDict(extra="forbid")
_FOLDER = Path(__file__).parent / "machines"


@checked_dataclass(frozen=True, config=_STRICT)
class Machine:
    """One kind of node. Rates come from data sheets or measurements; a step gets the share given by the efficiencies.

    name, source: description, and where the numbers come from.
    is_gpu: whether each rank has a device with its own memory.
    memory_gib: memory of a rank, without what the system needs. host_memory_gib: host memory of a node.
    flops: floating-point operations per second of matrix products, by dtype: "fp32", "bf16" and, on a GPU, "tf32".
    memory_bytes_per_second: of a rank's memory.
    local_bytes_per_second: one rank's link inside a node, in one direction. is_local_shared: a node's ranks share it.
    node_bytes_per_second: a node's link to other nodes. is_link_per_rank: each rank has a NIC, so it grows with ranks.
    can_overlap: communication overlaps with computation. On a CPU it does not, because both need the cores.
    seconds_per_operation: minimum time of a kernel.
    seconds_per_collective: latency of each hop of a ring.
    seconds_per_module: host time for each module that stage 3 gathers weights for, if nothing hides it.
    seconds_per_step: host time to start a step, by ZeRO stage. A GPU hides it behind a longer step.
    seconds_per_value: host time to load a dense value or an id, hidden likewise.
    host_bytes_per_second: between a rank and the host.
    host_memory_bytes_per_second: of the host's memory, for a rank's part of an offloaded optimizer.
    costs: of the tables, as in dhen.placement.costs of a ds_config.
    """

    name: str
    source: str
    is_gpu: bool
    ranks_per_node: Size
    memory_gib: Positive
    host_memory_gib: NotNegative
    flops: dict[str, Positive]
    memory_bytes_per_second: Positive
    local_bytes_per_second: Positive
    node_bytes_per_second: Positive
    seconds_per_operation: NotNegative = 0.0
    seconds_per_collective: NotNegative = 0.0
    seconds_per_module: NotNegative = 0.0
    seconds_per_step: dict[int, NotNegative] = field(default_factory=dict)
    seconds_per_value: NotNegative = 0.0
    is_local_shared: bool = False
    is_link_per_rank: bool = False
    can_overlap: bool = True
    host_bytes_per_second: NotNegative = 0.0
    host_memory_bytes_per_second: NotNegative = 0.0
    compute_efficiency: Positive = 1.0
    link_efficiency: Positive = 1.0
    costs: str = "gpu"

    def __post_init__(self) -> None:
        """Raises ValueError, which names the missing key."""
        if "fp32" not in self.flops:
            raise ValueError(
                f"flops has only {', '.join(self.flops) or 'no entries'}. Add fp32, and bf16 if its rate differs."
            )
        if self.is_gpu and "tf32" not in self.flops:
            raise ValueError(
                "flops has no tf32. Add it, and the rate without TF32 as fp32, or run tools/calibrate_machine.py again."
            )
        if self.is_gpu and not (self.host_bytes_per_second and self.host_memory_bytes_per_second):
            raise ValueError(
                "host_bytes_per_second or host_memory_bytes_per_second is missing. Give both: offload from a GPU needs "
                "them."
            )

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * 2**30)

    @property
    def host_bytes(self) -> int:
        """A rank's share of its node's host memory."""
        return int(self.host_memory_gib * 2**30 / self.ranks_per_node)

    @property
    def exchange_rates(self) -> tuple[float, float]:
        """Bytes per second that a rank sends in an all-to-all: to ranks of its own node, and to other nodes."""
        sharers = self.ranks_per_node if self.is_local_shared else 1
        rates = self.local_bytes_per_second / sharers, self.node_bytes_per_second / self.ranks_per_node
        return self.link_efficiency * rates[0], self.link_efficiency * rates[1]

    def gathered(self, size: float, *, nodes: int, ranks: int) -> float:
        """Seconds of an all-gather or reduce-scatter of `size` bytes in a ring of `ranks` ranks on `nodes` nodes."""
        return (ranks - 1) * self.seconds_per_collective + self._passed(size, nodes, ranks)

    def all_reduced(self, size: float, *, nodes: int, ranks: int) -> float:
        """Seconds of an all-reduce of `size` bytes among `ranks` ranks on `nodes` nodes."""
        return 2 * (
            self._all_reduce_hops(nodes, ranks) * self.seconds_per_collective + self._passed(size, nodes, ranks)
        )

    def replicated(self, size: float, *, nodes: int) -> float:
        """Seconds to all-reduce a node's shards, `size` bytes in total, over `nodes` nodes. They share its link."""
        passed = size * (nodes - 1) / nodes / self.node_bytes_per_second / self.link_efficiency
        return 2 * (self._all_reduce_hops(nodes, nodes) * self.seconds_per_collective + passed)

    def _passed(self, size: float, nodes: int, ranks: int) -> float:
        """Seconds for the bytes of a ring, without latency."""
        passed = size * (ranks - 1) / ranks
        sharers = ranks / nodes if self.is_local_shared else 1
        local = sharers * passed / self.local_bytes_per_second if ranks > nodes else 0.0
        between = passed / self.node_bytes_per_second if nodes > 1 else 0.0
        return max(local, between) / self.link_efficiency

    def _all_reduce_hops(self, nodes: int, ranks: int) -> int:
        """Hops in one direction. NCCL's trees run along a node's ranks, then halve the nodes; gloo uses a ring."""
        return ranks // nodes - 1 + (nodes - 1).bit_length() if self.is_gpu else ranks - 1


def shipped_machines() -> dict[str, Path]:
    """The files of the built-in machines, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def read_machine(name: str, **changes: Any) -> Machine:
    """Read the built-in machine called `name`, or the file of that name. `changes` replace its values.

    If each rank has its own NIC, the node's link follows a changed ranks_per_node. Raises ValueError.
    """
    path = shipped_machines().get(name, Path(name))
    if not os.path.isfile(path):
        raise ValueError(
            f"{unknown_name('machine', name, shipped_machines())} Or pass a YAML file like those in {_FOLDER}."
        )
    try:
        machine = TypeAdapter(Machine).validate_python(read_yaml(path))
        if machine.is_link_per_rank and "ranks_per_node" in changes:
            link = machine.node_bytes_per_second / machine.ranks_per_node * changes["ranks_per_node"]
            changes = {"node_bytes_per_second": link} | changes
        return replace(machine, **changes)
    except ValidationError as error:
        raise ValueError(f"{path}: {first_mistake(error, known=Machine.__dataclass_fields__)}") from error
