"""The machine that this job runs on: the memory that a rank may fill."""

import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist

from dhen.runtime.topology import Topology

HOST_SHARE = 0.9
"""Of a host's memory, what the system and the process itself leave."""
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def rank_memory_bytes(topology: Topology) -> int:
    """What a rank may fill: what is free on its GPU, or its share of the host; of the rank that has least. Call it
    before anything is built. Communicates; all ranks call it."""
    if topology.device.type == "cuda":
        has, _ = torch.cuda.mem_get_info(topology.device)
    else:
        has = int(HOST_SHARE * host_bytes() / topology.local_size)
    least = torch.tensor(has, dtype=torch.int64, device=topology.device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=topology.world)
    return int(least)


def host_bytes() -> int:
    """Of this node's memory, or of what a container lets its processes have."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(path.read_text()))
    return min(limits)
