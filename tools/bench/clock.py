"""Time: on a device, of repeated calls, of calls in turns, and on the slowest rank."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

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
    return statistics.median(in_turns({"": call}, topology, 1 + rounds)[""][1:])


def in_turns(calls: Mapping[Any, Callable[[], object]], topology: Topology, rounds: int) -> dict[Any, list[float]]:
    """This rank's seconds of each call, in each round; the calls take turns. Communicates: ranks start together."""
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            topology.barrier()
            start = now(topology.device)
            call()
            seconds[name].append(now(topology.device) - start)
    return seconds
