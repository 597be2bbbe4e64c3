"""Collectives on tensors whose lengths differ between ranks.

Every function communicates over the given group. All ranks of the group must call the functions in the same order.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def all_to_all(
    tensor: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Send `send_sizes[r]` elements of a flat tensor to each rank r. Returns the received elements, in rank order."""
    if len(send_sizes) == 1:
        return tensor
    received = tensor.new_empty(sum(receive_sizes))
    dist.all_to_all_single(received, tensor, list(receive_sizes), list(send_sizes), group=group)
    return received


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
