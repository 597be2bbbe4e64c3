"""All-to-all between the ranks that own the embedding tables and the data-parallel batch (paper 3.2.1).

Every function here communicates over the group it is given; all ranks of that group call it in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def all_to_all(
    tensor: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Send `send_sizes[r]` elements of a flat tensor to each rank r; returns what came, in the order of the senders."""
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


@dataclass(frozen=True)
class ColumnBlock:
    """Where one shard's output goes: columns [first, last) of feature `feature`'s embedding."""

    feature: int
    first: int
    last: int

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.last - self.first


@dataclass(frozen=True)
class PooledLayout:
    """Which column blocks each rank computes, in the order in which it lays them side by side.

    Together the blocks cover every column of all `num_features` embeddings of `embedding_dim` columns once.
    """

    blocks_by_rank: tuple[tuple[ColumnBlock, ...], ...]
    num_features: int
    embedding_dim: int
    rank: int

    def width(self, rank: int) -> int:
        """Columns that `rank` computes for each example."""
        return sum(block.width for block in self.blocks_by_rank[rank])

    @property
    def widths(self) -> list[int]:
        """`width` of all ranks."""
        return [self.width(rank) for rank in range(len(self.blocks_by_rank))]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """parts[r]: (B, width of r) -> embeddings_BFD, in one copy."""
        pieces = []
        for part, blocks in zip(parts, self.blocks_by_rank, strict=True):
            at = 0
            for block in blocks:
                pieces.append((block.feature, block.first, part[:, at : at + block.width]))
                at += block.width
        pieces.sort(key=lambda piece: piece[:2])
        joined = torch.cat([piece[2] for piece in pieces], dim=1)
        return joined.view(-1, self.num_features, self.embedding_dim)

    def split(self, x_BFD: Tensor, out: Sequence[Tensor]) -> None:
        """The reverse of `join`: copy x_BFD's columns into out[r]: (B, width of r)."""
        for part, blocks in zip(out, self.blocks_by_rank, strict=True):
            if blocks:
                torch.cat([x_BFD[:, block.feature, block.first : block.last] for block in blocks], dim=1, out=part)


class PooledExchange(torch.autograd.Function):
    """The bridge for pooled embeddings: from table owners to the data-parallel batch, and gradients the other way.

    forward: pooled, (world_size * padded_batch, own width), grouped by the rank whose examples they are, every rank's
    batch padded to the largest -> embeddings_BFD of this rank's own `batch_size` examples.
    backward: the loss is a mean over each rank's batch, and the dense gradients are averaged over ranks; table
    gradients arrive as a sum over ranks, so they are divided by the world size here, and nowhere else.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        pooled: Tensor,
        layout: PooledLayout,
        batch_size: int,
        padded_batch: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """Communicates over `group`. Returns embeddings_BFD."""
        ctx.layout, ctx.padded_batch, ctx.group = layout, padded_batch, group
        widths = layout.widths
        send = [padded_batch * widths[layout.rank]] * len(widths)
        receive = [padded_batch * width for width in widths]
        received = all_to_all(pooled.contiguous().view(-1), send, receive, group)
        parts = [part.view(padded_batch, width) for part, width in zip(received.split(receive), widths, strict=True)]
        return layout.join([part[:batch_size] for part in parts])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_BFD: Tensor) -> tuple[Tensor | None, ...]:
        """Communicates over the same group. Returns the gradient of `pooled`, averaged over ranks."""
        layout, padded_batch = ctx.layout, ctx.padded_batch
        widths = layout.widths
        batch_size = grad_BFD.shape[0]
        send = [padded_batch * width for width in widths]
        buffer = grad_BFD.new_zeros if batch_size < padded_batch else grad_BFD.new_empty
        flat = buffer(sum(send))
        parts = [
            part.view(padded_batch, width)[:batch_size] for part, width in zip(flat.split(send), widths, strict=True)
        ]
        layout.split(grad_BFD, parts)
        receive = [padded_batch * widths[layout.rank]] * len(widths)
        received = all_to_all(flat, send, receive, ctx.group).div_(len(widths))
        return received.view(padded_batch * len(widths), widths[layout.rank]), None, None, None, None
