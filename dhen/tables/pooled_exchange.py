"""All-to-all between the ranks that own the embedding tables and the data-parallel batch (paper 3.2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from dhen.tables.wire import Wire

EMBEDDINGS, GRADIENTS = "embeddings' all-to-all", "gradients' all-to-all"
WAITING = "waiting for an all-to-all"
"""Names in a profiler's trace."""


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

    @cached_property
    def widths_by_rank(self) -> tuple[tuple[int, ...], ...]:
        """Columns of each block that a rank computes for each example, by rank."""
        return tuple(tuple(block.width for block in blocks) for blocks in self.blocks_by_rank)

    @cached_property
    def _runs(self) -> tuple["_Run", ...]:
        """Blocks in the features' order; those that are side by side on one rank too are one run."""
        runs: list[_Run] = []
        places = [
            (block.feature * self.embedding_dim + block.first, rank, sum(widths[:index]), block.width)
            for rank, (blocks, widths) in enumerate(zip(self.blocks_by_rank, self.widths_by_rank, strict=True))
            for index, block in enumerate(blocks)
        ]
        for column, rank, start, width in sorted(places):
            before = runs[-1] if runs else None
            if before is not None and (before.rank, before.start + before.width) == (rank, start):
                runs[-1] = _Run(before.column, rank, before.start, before.width + width)
            else:
                runs.append(_Run(column, rank, start, width))
        return tuple(runs)

    @cached_property
    def _runs_by_rank(self) -> tuple[tuple["_Run", ...], ...]:
        """The same in the order in which each rank has them."""
        return tuple(
            tuple(sorted((run for run in self._runs if run.rank == rank), key=lambda run: run.start))
            for rank in range(len(self.blocks_by_rank))
        )

    @property
    def is_one_part_in_order(self) -> bool:
        """Whether a single rank computes all, in the features' order."""
        return len(self.blocks_by_rank) == len(self._runs) == 1

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """parts[r]: (B, width of r) -> embeddings_BFD, in one copy, or none where one part is all in order."""
        pieces = [parts[run.rank].narrow(1, run.start, run.width) for run in self._runs]
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return joined.view(-1, self.num_features, self.embedding_dim)

    def split(self, x_BFD: Tensor, out: Sequence[Tensor]) -> None:
        """The reverse of `join`: copy x_BFD's columns into out[r]: (B, width of r)."""
        columns = x_BFD.reshape(-1, self.num_features * self.embedding_dim)
        for part, runs in zip(out, self._runs_by_rank, strict=True):
            if runs:
                torch.cat([columns.narrow(1, run.column, run.width) for run in runs], dim=1, out=part)


@dataclass(frozen=True)
class _Run:
    """Columns [column, column + width) of all features' embeddings side by side: from `start` of `rank`'s part."""

    column: int
    rank: int
    start: int
    width: int


@dataclass(frozen=True)
class Wires:
    """What pooled embeddings travel as, and their gradients in the backward."""

    forward: Wire = Wire("fp32")
    backward: Wire = Wire("fp32")


class PooledExchange:
    """The bridge for pooled embeddings: from table owners to the data-parallel batch, and gradients the other way.

    One batch: pooled, (world_size * padded_batch, own width), grouped by the rank whose examples they are, every rank's
    batch padded to the largest -> embeddings_BFD of this rank's own `batch_size` examples.

    `start` begins the all-to-all and `finish` waits for it, so that what is computed in between runs under it. In the
    backward it is the other way round: the gradients leave where `finish` was, and are waited for where `start` was.
    overlap False waits at once, both ways.

    The loss is a mean over each rank's batch, and the dense gradients are averaged over ranks; table gradients arrive
    as a sum over ranks, so they are divided by the world size here, and nowhere else.

    Gradients are about 1 / global batch; on an fp16 wire they are multiplied by the power of two at or below the global
    batch, and divided by it where they arrive.
    """

    def __init__(
        self,
        layout: PooledLayout,
        batch_size: int,
        padded_batch: int,
        group: dist.ProcessGroup,
        wires: Wires,
        *,
        overlap: bool = True,
    ) -> None:
        self._layout, self._batch_size, self._padded_batch = layout, batch_size, padded_batch
        self._group, self._wires, self._overlap = group, wires, overlap
        global_batch = max(1, padded_batch * len(layout.blocks_by_rank))
        self._gradient_scale = 2.0 ** (global_batch.bit_length() - 1)
        self._under_way: _UnderWay | None = None

    def start(self, pooled: Tensor) -> Tensor:
        """Begin to send. Communicates over the group. Returns a ticket for `finish`, which carries the gradient."""
        return _Start.apply(pooled, self)

    def finish(self, ticket: Tensor) -> Tensor:
        """Wait for the others' embeddings: embeddings_BFD."""
        return _Finish.apply(ticket, self)

    def send_pooled(self, pooled: Tensor) -> None:
        """Forward, first half."""
        wire, blocks = self._wires.forward, self._layout.widths_by_rank
        own = blocks[self._layout.rank]
        sent = wire.encode(pooled, own)
        sizes = [wire.row_size(own)] * len(blocks), [wire.row_size(widths) for widths in blocks]
        self._send(EMBEDDINGS, sent.reshape(-1), *sizes)

    def receive_embeddings(self) -> Tensor:
        """Forward, second half."""
        wire, blocks = self._wires.forward, self._layout.widths_by_rank
        parts = self._receive([wire.row_size(widths) for widths in blocks])
        return self._layout.join(
            [wire.decode(part[: self._batch_size], widths) for part, widths in zip(parts, blocks, strict=True)]
        )

    def send_gradient(self, grad_BFD: Tensor) -> None:
        """Backward, first half."""
        wire, blocks = self._wires.backward, self._layout.widths_by_rank
        flat, parts = self._split(grad_BFD)
        if wire.dtype != "fp32":
            encoded = [
                wire.encode(part, widths, self._gradient_scale) for part, widths in zip(parts, blocks, strict=True)
            ]
            flat = torch.cat([part.reshape(-1) for part in encoded])
        own = wire.row_size(blocks[self._layout.rank])
        self._send(GRADIENTS, flat, [wire.row_size(widths) for widths in blocks], [own] * len(blocks))

    def _split(self, grad_BFD: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A gradient by the ranks that it goes to, padded: all of it side by side in memory, and each rank's part."""
        rows, padded = grad_BFD.shape[0], self._padded_batch
        widths = [sum(of_rank) for of_rank in self._layout.widths_by_rank]
        if self._layout.is_one_part_in_order:
            flat = grad_BFD.reshape(-1).float()
            return flat, [flat.view(rows, *widths)]
        buffer = grad_BFD.new_zeros if rows < padded else grad_BFD.new_empty
        flat = buffer(padded * sum(widths), dtype=torch.float32)
        sizes = [padded * width for width in widths]
        parts = [part.view(padded, width) for part, width in zip(flat.split(sizes), widths, strict=True)]
        self._layout.split(grad_BFD, [part[:rows] for part in parts])
        return flat, parts

    def receive_gradient(self) -> Tensor:
        """Backward, second half: the gradient of `pooled`, averaged over ranks."""
        wire, blocks = self._wires.backward, self._layout.widths_by_rank
        own = blocks[self._layout.rank]
        (rows,) = self._receive([wire.row_size(own)], count=len(blocks))
        grad = wire.decode(rows, own, self._gradient_scale)
        return grad.div_(len(blocks)) if len(blocks) > 1 else grad

    def _send(self, name: str, flat: Tensor, send_widths: Sequence[int], receive_widths: Sequence[int]) -> None:
        send, receive = ([self._padded_batch * width for width in widths] for widths in (send_widths, receive_widths))
        if len(send) == 1:
            self._under_way = _UnderWay(None, flat, flat)
            return
        received = flat.new_empty(sum(receive))
        with record_function(name):
            handle = dist.all_to_all_single(received, flat, receive, send, group=self._group, async_op=True)
        self._under_way = _UnderWay(handle, received, flat)
        if not self._overlap:
            self._wait()

    def _wait(self) -> None:
        if self._under_way.handle is not None:
            with record_function(WAITING):
                self._under_way.handle.wait()

    def _receive(self, widths: Sequence[int], count: int = 1) -> list[Tensor]:
        """What came, in matrices of these widths and `count` padded batches of rows."""
        self._wait()
        under_way, self._under_way = self._under_way, None
        rows = count * self._padded_batch
        parts = under_way.received.split([rows * width for width in widths])
        return [part.view(rows, width) for part, width in zip(parts, widths, strict=True)]


@dataclass(frozen=True)
class _UnderWay:
    """An all-to-all that was begun; one rank alone has no handle. sent: kept until it is over."""

    handle: dist.Work | None
    received: Tensor
    sent: Tensor


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, pooled: Tensor, exchange: PooledExchange) -> Tensor:
        ctx.exchange = exchange
        exchange.send_pooled(pooled)
        return pooled.new_empty(0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, _: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.receive_gradient(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, ticket: Tensor, exchange: PooledExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.receive_embeddings()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_BFD: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.send_gradient(grad_BFD)
        return grad_BFD.new_empty(0), None
