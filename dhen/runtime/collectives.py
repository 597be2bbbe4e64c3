"""Collectives on tensors whose length differs from rank to rank.

Every function here communicates over the group it is given; all ranks of that group call it in the same order.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def all_to_all(
    tensor: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Send `send_sizes[r]` elements of a flat tensor to each rank r; returns what came, in the order of the senders."""
    if len(send_sizes) == 1:
        return tensor
    received = tensor.new_empty(sum(receive_sizes))
    dist.all_to_all_single(received, tensor, list(receive_sizes), list(send_sizes), group=group)
    return received


def all_gather_uneven(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' flat tensors one after another, on the CPU; they may differ in length."""
    world_size = dist.get_world_size(group)
    sizes = torch.zeros(world_size, dtype=torch.int64, device=tensor.device)
    dist.all_gather_into_tensor(sizes, sizes.new_tensor([len(tensor)]), group=group)
    longest = int(sizes.max())
    everyone = tensor.new_empty(world_size * longest)
    dist.all_gather_into_tensor(everyone, F.pad(tensor, (0, longest - len(tensor))), group=group)
    parts = everyone.view(world_size, longest).cpu()
    return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])
