"""This process's place in the job, and the process groups (paper 3.2). Passed to all code that communicates."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from dhen.runtime.host_allocator import keep_freed_memory


@dataclass(frozen=True)
class ShardGroups:
    """The process groups of hybrid sharding (paper 3.2.2, figure 5).

    shard: the ranks that hold this rank's replica together. replica: the ranks that hold the same shard in all
    replicas. replica_index: number of the replica that this rank belongs to.
    """

    shard: dist.ProcessGroup
    replica: dist.ProcessGroup
    shard_size: int
    num_replicas: int
    replica_index: int


@dataclass(frozen=True)
class Topology:
    """This process's place in the job. world: the group of all ranks. device: where this rank computes.

    Ranks are numbered node by node, as every launcher does: rank = node * local_size + local_rank. timeout: for the
    collectives of all groups. alike: if this is a place in a group of the job's ranks, the ranks of all such groups.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    device: torch.device
    world: dist.ProcessGroup
    timeout: timedelta
    alike: tuple[range, ...] = ()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which reports for the whole job."""
        return self.rank == 0

    def shard_size(self, shard_group: Literal["world", "node"] | int) -> int:
        """Number of ranks that jointly hold one replica of the dense part: all, those of a node, or that many.

        Communicates over all ranks unless `shard_group` is "world". Raises ValueError if they cannot be divided so.
        """
        return self.world_size if shard_group == "world" else shard_size(shard_group, self._places())

    def has_equal_nodes(self) -> bool:
        """Whether all nodes have as many ranks, numbered node by node. Communicates over all ranks."""
        places = self._places()
        local_size, _ = places[0]
        return places == [[local_size, rank % local_size] for rank in range(self.world_size)]

    def _places(self) -> list[list[int]]:
        """(ranks on its node, local rank) of each rank. Communicates over all ranks."""
        here = torch.tensor([self.local_size, self.local_rank], device=self.device)
        everyone = here.new_empty(2 * self.world_size)
        dist.all_gather_into_tensor(everyone, here, group=self.world)
        return everyone.view(-1, 2).tolist()

    def shard_groups(self, size: int) -> ShardGroups:
        """Create the groups for shards over `size` consecutive ranks. Communicates over the whole job: all of its ranks
        call it.
        """
        alike = self.alike or (range(self.world_size),)
        shards = [of[first : first + size] for of in alike for first in range(0, self.world_size, size)]
        replicas = [of[first::size] for of in alike for first in range(size)]
        # Without an explicit timeout, a new group uses torch's default instead of the job's timeout.
        made = {ranks: dist.new_group(list(ranks), timeout=self.timeout) for ranks in (*shards, *replicas)}
        rank = dist.get_rank()
        shard, replica = (next(made[ranks] for ranks in of if rank in ranks) for of in (shards, replicas))
        return ShardGroups(shard, replica, size, self.world_size // size, self.rank // size)

    def within(self, groups: ShardGroups) -> "Topology":
        """This process's place in its shard group, as if the group were the whole job."""
        size = groups.shard_size
        alike = tuple(range(first, first + size) for first in range(0, self.world_size, size))
        return replace(self, rank=self.rank % size, world_size=size, world=groups.shard, alike=alike)

    def another_group(self, backend: str | None = None) -> dist.ProcessGroup:
        """One more group of the ranks of `world`. Communicates over the whole job: all of its ranks call it."""
        ranks = [list(of_group) for of_group in self.alike] or [None]
        made = [dist.new_group(ranks=each, timeout=self.timeout, backend=backend) for each in ranks]
        return made[dist.get_rank() // self.world_size]

    def barrier(self) -> None:
        devices = [self.device.index] if self.device.type == "cuda" else None
        dist.barrier(group=self.world, device_ids=devices)


def shard_size(shard_group: Literal["node"] | int, places: Sequence[Sequence[int]]) -> int:
    """Number of ranks in a shard group. places: (ranks on its node, local rank) of each rank. Raises ValueError."""
    world_size = len(places)
    sizes = [local_size for local_size, _ in places]
    local_size = sizes[0]
    if len(set(sizes)) > 1:
        unequal = ", ".join(map(str, sorted(set(sizes))))
        raise ValueError(
            f"{shard_group!r}, but the nodes have {unequal} ranks, and all replicas must be sharded alike. Start the "
            'same number of ranks on every node, or use "world".'
        )
    if [local_rank for _, local_rank in places] != [rank % local_size for rank in range(world_size)]:
        raise ValueError(f'{shard_group!r}, but the launcher does not number the ranks node by node. Use "world".')
    size = local_size if shard_group == "node" else shard_group
    fits = [n for n in range(2, world_size + 1) if world_size % n == 0 and (local_size % n == 0 or n % local_size == 0)]
    if size != world_size and size not in fits:
        allowed = ", ".join(map(str, fits))
        raise ValueError(
            f"{shard_group!r} ({size} ranks per group), but this job has {world_size} ranks, {local_size} on each "
            f'node. Use one of {allowed}, or "world". A group of one rank shards nothing.'
        )
    return size


def start(timeout_minutes: float = 30.0) -> Topology:
    """Join the job that the launcher started (deepspeed, torchrun or accelerate launch; without one, a job of 1 rank).

    Communicates: all ranks call it once. Uses NCCL on GPUs and gloo on CPU. On CPU, the ranks of a node share its cores
    evenly unless OMP_NUM_THREADS is set, and freed memory stays with the process. Raises ConnectionError, in one line,
    if this rank cannot join.
    """
    if "RANK" not in os.environ:  # port 0 lets the system choose a free one
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    set_by_launchers = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in set_by_launchers if name not in os.environ]:
        raise ConnectionError(
            f"RANK is set, but not {', '.join(missing)}. Start the script with deepspeed, torchrun or accelerate "
            "launch. For a single rank, unset RANK and start it with python."
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
    on_gpu = get_accelerator().device_name() == "cuda"
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise ConnectionError(
                f"This process sees {torch.cuda.device_count()} GPU(s), but the launcher started {local_size} ranks on "
                "this node. Start one rank per GPU."
            )
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    timeout = timedelta(minutes=timeout_minutes)
    # Also of the groups that DeepSpeed makes, with the default of torch: else they wait for a lost rank for 30 minutes.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    try:
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", timeout=timeout, verbose=False)
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(_why_not_joined(str(error))) from error
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        local_size=local_size,
        device=device,
        world=dist.group.WORLD,
        timeout=timeout,
    )


def _why_not_joined(message: str) -> str:
    """The first line of torch's message and, where the network is to blame, what to do about it."""
    port, first_line = os.environ["MASTER_PORT"], message.strip().partition("\n")[0].rstrip(".")
    if "EADDRINUSE" in message or "address already in use" in message.lower():
        return (
            f"Port {port} of this machine is taken, probably by another job. Use another port, such as "
            f"{int(port) + 1}: --master_port with deepspeed and torchrun, --main_process_port with accelerate."
        )
    place = f"{os.environ['MASTER_ADDR']}:{port}"
    advice = f"Check that all ranks started, and that every node can reach {place}."
    is_network = re.search(r"connect|timed out|timeout|socket|address|host|store", message, re.IGNORECASE)
    who = f"Rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    return f"{who} cannot join the job at {place}: {first_line:.200}.{' ' + advice if is_network else ''}"


def stop() -> None:
    """Leave the job: destroy the process groups, so that the process exits without warnings."""
    if dist.is_initialized():
        dist.destroy_process_group()
