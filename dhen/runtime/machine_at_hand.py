"""The machine that this job runs on: how much memory a rank may use."""

import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist

from dhen.runtime.topology import Topology

HOST_SHARE = 0.9
"""Share of the host's memory that the system and the process itself leave free."""
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def rank_memory_bytes(topology: Topology) -> int:
    """Bytes that a rank may use: the free memory of its GPU, or its share of the host's. The minimum over all ranks.

    Call it before anything is allocated. Communicates; all ranks call it.
    """
    if topology.device.type == "cuda":
        has, _ = torch.cuda.mem_get_info(topology.device)
    else:
        has = int(HOST_SHARE * host_bytes() / topology.local_size)
    least = torch.tensor(has, dtype=torch.int64, device=topology.device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=topology.world)
    return int(least)


def host_bytes() -> int:
    """Memory of this node, or the limit of the container that this process runs in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # the file is missing, or says "max"
            limits.append(int(path.read_text()))
    return min(limits)
