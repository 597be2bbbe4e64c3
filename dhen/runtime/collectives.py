"""Collectives on tensors whose lengths differ between ranks, and on Python objects.

Every function communicates over the given group. All ranks of the group must call the functions in the same order.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from dhen.runtime.topology import Topology

Value = TypeVar("Value")
Item = TypeVar("Item")
WAITING = "waiting for an all-to-all"
"""Name in a profiler trace."""


def all_to_all(
    tensor: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: dist.ProcessGroup
) -> Callable[[], Tensor]:
    """Start sending `send_sizes[r]` elements of a flat tensor to each rank r.

    Call the result to wait for the received elements, in rank order, as often as you like. Waiting for a GPU's
    collective blocks its current stream, not the host.
    """
    if len(send_sizes) == 1:
        return lambda: tensor
    received = tensor.new_empty(sum(receive_sizes))
    work = dist.all_to_all_single(received, tensor, list(receive_sizes), list(send_sizes), group=group, async_op=True)

    def wait(_keeps_alive: Tensor = tensor) -> Tensor:
        with record_function(WAITING):
            work.wait()
        return received

    return wait


def all_gather_uneven(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the flat tensors of all ranks, which may differ in length. The result is on the CPU."""
    world_size = dist.get_world_size(group)
    sizes = torch.zeros(world_size, dtype=torch.int64, device=tensor.device)
    dist.all_gather_into_tensor(sizes, sizes.new_tensor([len(tensor)]), group=group)
    longest = int(sizes.max())
    everyone = tensor.new_empty(world_size * longest)
    dist.all_gather_into_tensor(everyone, F.pad(tensor, (0, longest - len(tensor))), group=group)
    parts = everyone.view(world_size, longest).cpu()
    return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])


def rank_zeros(topology: Topology, make: Callable[[], Value]) -> Value:
    """Call `make` on rank 0 and return its result on all ranks, or raise its ValueError or OSError. Communicates.

    On its own, a rank could come to another result: its node may have other files, more ranks or another math library.
    """
    answer: list[Value | ValueError | OSError | None] = [None]
    if topology.is_main:
        try:
            answer = [make()]
        except (ValueError, OSError) as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0, group=topology.world, device=topology.device)
    (made,) = answer
    if isinstance(made, (ValueError, OSError)):
        raise made
    return made


def from_all(value: Value, topology: Topology) -> list[Value]:
    """The value of each rank. Communicates; all ranks call it."""
    everyones = [value] * topology.world_size
    dist.all_gather_object(everyones, value, group=topology.world)
    return everyones


def shared_out(items: Sequence[Item], work: Callable[[Item], Value], topology: Topology) -> list[Value]:
    """`work(item)` of each item, which one of the ranks does. Communicates; all ranks call it with equal items.

    Raises the first exception of any rank on all: as it was if it is a ValueError or OSError, else a RuntimeError.
    """
    try:
        mine = [work(item) for item in items[topology.rank :: topology.world_size]]
    except (ValueError, OSError) as error:
        mine = error
    except Exception as error:  # otherwise the other ranks would wait for this one
        mine = RuntimeError(f"{type(error).__name__}: {error}")
    by_rank = from_all(mine, topology)
    for of_rank in by_rank:
        if isinstance(of_rank, Exception):
            raise of_rank
    return [by_rank[index % topology.world_size][index // topology.world_size] for index in range(len(items))]
