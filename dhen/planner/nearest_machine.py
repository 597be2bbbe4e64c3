"""The planner's description of this job's machine: its actual memory, and the rates of the closest built-in machine."""

import logging

import torch

from dhen.planner.machine import Machine, read_machine
from dhen.runtime.machine_at_hand import HOST_SHARE, host_bytes
from dhen.runtime.topology import Topology

_LARGE_A100 = 60 * 2**30
_FALLBACK = "a100-80gb"
logger = logging.getLogger(__name__)


def machine_at_hand(topology: Topology, memory_bytes: int) -> Machine:
    """This rank's node, with `memory_bytes` for each rank."""
    name, changes = "cpu", {"ranks_per_node": topology.local_size, "memory_gib": memory_bytes / 2**30}
    if topology.device.type == "cuda":
        name = gpu_at_hand(topology)
        changes["host_memory_gib"] = HOST_SHARE * host_bytes() / 2**30
        if name is None:
            name, device = _FALLBACK, torch.cuda.get_device_name(topology.device)
            logger.info("auto: no rates are known for %s, so the plan uses those of %s", device, name)
    return read_machine(name, **changes)


def gpu_at_hand(topology: Topology) -> str | None:
    """The built-in machine for this rank's GPU; None if there is none, and on a CPU."""
    if topology.device.type != "cuda":
        return None
    device = torch.cuda.get_device_properties(topology.device)
    return machine_of_gpu(device.name, device.total_memory)


def machine_of_gpu(device: str, memory_bytes: int) -> str | None:
    """The built-in machine for a GPU that CUDA calls `device`; None if there is none.

    >>> machine_of_gpu("NVIDIA A100-SXM4-40GB", 42_000_000_000)
    'a100-40gb'
    >>> machine_of_gpu("NVIDIA GH200 480GB", 103_000_000_000)  # not an H200: its host and host link differ
    """
    name = device.lower()
    if "a100" in name:
        return "a100-80gb" if memory_bytes > _LARGE_A100 else "a100-40gb"
    return next((known for known in ("h100", "h200") if known in name and f"g{known}" not in name), None)
