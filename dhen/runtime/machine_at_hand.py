"""The machine that this job runs on, as the planner sees it: its memory, and the rates of the nearest shipped file."""

import contextlib
import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist

from dhen.parallel.machine import Machine, read_machine
from dhen.parallel.topology import Topology

_HOST_SHARE = 0.9
"""Of a host's memory, what the system and the process itself leave."""
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_LARGE_A100 = 60 * 2**30
_FALLBACK = "a100-80gb"
logger = logging.getLogger(__name__)


def rank_memory_bytes(topology: Topology) -> int:
    """What a rank may fill: what is free on its GPU, or its share of the host; of the rank that has least. Call it
    before anything is built. Communicates; all ranks call it."""
    if topology.device.type == "cuda":
        has, _ = torch.cuda.mem_get_info(topology.device)
    else:
        has = int(_HOST_SHARE * host_bytes() / topology.local_size)
    least = torch.tensor(has, dtype=torch.int64, device=topology.device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=topology.world)
    return int(least)


def machine_at_hand(topology: Topology, memory_bytes: int) -> Machine:
    """The node that this rank is on, each of its ranks with `memory_bytes`."""
    name, changes = "cpu", {"ranks_per_node": topology.local_size, "memory_gib": memory_bytes / 2**30}
    if topology.device.type == "cuda":
        device = torch.cuda.get_device_name(topology.device)
        name = machine_of_gpu(device, torch.cuda.get_device_properties(topology.device).total_memory)
        changes["host_memory_gib"] = _HOST_SHARE * host_bytes() / 2**30
        if name is None:
            logger.info("auto: no machine is known for %s: planned with the rates of %s", device, _FALLBACK)
            name = _FALLBACK
    return read_machine(name, **changes)


def machine_of_gpu(device: str, memory_bytes: int) -> str | None:
    """The shipped machine of a GPU that CUDA calls `device`; None where there is none.

    >>> machine_of_gpu("NVIDIA A100-SXM4-40GB", 42_000_000_000)
    'a100-40gb'
    >>> machine_of_gpu("NVIDIA GH200 480GB", 103_000_000_000)  # another host link and host
    """
    name = device.lower()
    if "a100" in name:
        return "a100-80gb" if memory_bytes > _LARGE_A100 else "a100-40gb"
    return next((known for known in ("h100", "h200") if known in name and f"g{known}" not in name), None)


def host_bytes() -> int:
    """Of this node's memory, or of what a container lets its processes have."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(path.read_text()))
    return min(limits)
