"""Time on a device, and on the slowest rank."""

import time

import torch
import torch.distributed as dist

from dhen.runtime.topology import Topology


def now(device: torch.device) -> float:
    """Seconds, once the device has done everything that was started on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def slowest(topology: Topology, seconds: float) -> float:
    """The largest of the ranks' seconds. Communicates; all ranks call it."""
    largest = torch.tensor(seconds, dtype=torch.float64, device=topology.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=topology.world)
    return float(largest)
