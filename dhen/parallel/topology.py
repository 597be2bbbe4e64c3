"""Which process this is, and the process groups (paper 3.2): one object, made once, handed to whoever communicates."""

import os
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator


@dataclass(frozen=True)
class Topology:
    """This process's place in the job. `world` is the group of all ranks; `device` is where this rank computes."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    device: torch.device
    world: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for the job: rank 0."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks of the world."""
        devices = [self.device.index] if self.device.type == "cuda" else None
        dist.barrier(group=self.world, device_ids=devices)


def start(timeout_minutes: float = 30.0) -> Topology:
    """Join the job that the launcher started (deepspeed, torchrun, accelerate launch; none means one rank).

    Communicates: all ranks call it, once. gloo on CPU, NCCL on GPUs. On CPU the cores are shared out among the ranks of
    the node unless OMP_NUM_THREADS says otherwise.
    """
    if "RANK" not in os.environ:
        _become_the_only_rank()
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
    on_gpu = get_accelerator().device_name() == "cuda"
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo", timeout=timedelta(minutes=timeout_minutes), verbose=False
    )
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        local_size=local_size,
        device=device,
        world=dist.group.WORLD,
    )


def stop() -> None:
    """Leave the job: ends the process groups, so that the process exits without a complaint."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _become_the_only_rank() -> None:
    """Fill in what a launcher would have set for a job of one rank; port 0 lets the system choose a free one."""
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in alone.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
