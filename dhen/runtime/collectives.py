"""Collectives on tensors whose lengths differ between ranks.

Every function communicates over the given group. All ranks of the group must call the functions in the same order.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

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
