"""Time: on a device, of repeated calls, on the slowest rank, and of the spans in a trace."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dhen.runtime.topology import Topology


def now(device: torch.device) -> float:
    """Seconds, once the device has done everything that was started on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def largest(topology: Topology, values: Any) -> Any:
    """The largest of the ranks' values: of a number, or of each number in nested lists. Communicates; all call it."""
    values = torch.tensor(values, dtype=torch.float64, device=topology.device)
    dist.all_reduce(values, dist.ReduceOp.MAX, group=topology.world)
    return values.tolist()


def median_seconds(call: Callable[[], object], topology: Topology, rounds: int) -> float:
    """This rank's median over `rounds` calls, after one that warms up. Communicates: ranks start each call together."""
    times = []
    for _ in range(rounds + 1):
        topology.barrier()
        start = now(topology.device)
        call()
        times.append(now(topology.device) - start)
    return statistics.median(times[1:])


def covered(spans: Iterable[tuple[float, float]], end: float) -> np.ndarray:
    """Whether a span covers each microsecond from 0 to `end`: bool. Spans are (first, last) microseconds."""
    is_covered = np.zeros(round(end), dtype=bool)
    for first, last in spans:
        is_covered[round(first) : round(last)] = True
    return is_covered
