"""All-to-all between the owners of the embedding tables and the data-parallel batch (paper 3.1, figure 4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from dhen.tables.placement.plan import TableShard
from dhen.tables.wire import Wire

EMBEDDINGS, GRADIENTS = "embeddings' all-to-all", "gradients' all-to-all"
WAITING = "waiting for an all-to-all"
"""Names in a profiler trace."""


@dataclass(frozen=True)
class PooledLayout:
    """Which table shards each rank looks up, in the order of its output: a block of columns each.

    Together, the blocks cover each of the `num_features * embedding_dim` columns exactly once.
    """

    shards_by_rank: Sequence[Sequence[TableShard]]
    num_features: int
    embedding_dim: int
    rank: int

    @cached_property
    def widths_by_rank(self) -> tuple[tuple[int, ...], ...]:
        """Width of each block, by rank."""
        return tuple(tuple(shard.num_columns for shard in shards) for shards in self.shards_by_rank)

    @cached_property
    def _runs(self) -> tuple["_Run", ...]:
        """Blocks in feature order. Blocks that are also adjacent on their rank are merged into one run."""
        runs: list[_Run] = []
        places = [
            (shard.table * self.embedding_dim + shard.first_column, rank, sum(widths[:index]), shard.num_columns)
            for rank, (shards, widths) in enumerate(zip(self.shards_by_rank, self.widths_by_rank, strict=True))
            for index, shard in enumerate(shards)
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
        """The runs of each rank, in the order of its output."""
        return tuple(
            tuple(sorted((run for run in self._runs if run.rank == rank), key=lambda run: run.start))
            for rank in range(len(self.shards_by_rank))
        )

    @property
    def is_one_part_in_order(self) -> bool:
        """Whether a single rank computes all blocks, in feature order."""
        return len(self.shards_by_rank) == len(self._runs) == 1

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """parts[r]: (B, width of r) -> embeddings_BFD. Copies once, or not at all if one part is all in order."""
        pieces = [parts[run.rank].narrow(1, run.start, run.width) for run in self._runs]
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return joined.view(-1, self.num_features, self.embedding_dim)

    def split(self, x_BFD: Tensor, out: Sequence[Tensor]) -> None:
        """The inverse of `join`: copy the columns of x_BFD into out[r]: (B, width of r)."""
        columns = x_BFD.reshape(-1, self.num_features * self.embedding_dim)
        for part, runs in zip(out, self._runs_by_rank, strict=True):
            if runs:
                torch.cat([columns.narrow(1, run.column, run.width) for run in runs], dim=1, out=part)


@dataclass(frozen=True)
class _Run:
    """Columns [column, column + width) of the concatenated embeddings. They begin at `start` in the part of `rank`."""

    column: int
    rank: int
    start: int
    width: int


@dataclass(frozen=True)
class Wires:
    """Wire formats of the pooled embeddings (forward) and of their gradients (backward)."""

    forward: Wire = Wire("fp32")
    backward: Wire = Wire("fp32")


class PooledExchange:
    """Sends one batch's pooled embeddings from table owners to the data-parallel batch, and their gradients back.

    `pooled` is (world_size * padded_batch, own width), grouped by the rank that the examples belong to, with every
    rank's batch padded to the largest. The result is embeddings_BFD of this rank's own `batch_size` examples.

    `start` begins the all-to-all and `finish` waits for it, so it overlaps with whatever is computed in between. The
    backward mirrors this: the backward of `finish` sends the gradients, and the backward of `start` waits for them.
    With overlap False, both directions wait at once.

    The loss is a mean over each rank's batch, and DeepSpeed averages the dense gradients over ranks. Table gradients
    arrive as a sum over ranks, so they are divided by the world size here, and nowhere else.

    Gradients are of the order of 1 / global batch. For an fp16 wire they are multiplied by the largest power of two
    that is at most the global batch, and divided by it on arrival.
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
        global_batch = max(1, padded_batch * len(layout.shards_by_rank))
        self._gradient_scale = 2.0 ** (global_batch.bit_length() - 1)
        self._under_way: _UnderWay | None = None

    def start(self, pooled: Tensor) -> Tensor:
        """Start sending. Communicates over the group. Returns a ticket for `finish`; the gradient flows through it."""
        return _Start.apply(pooled, self)

    def finish(self, ticket: Tensor) -> Tensor:
        """Wait for the embeddings from the other ranks. Returns embeddings_BFD."""
        return _Finish.apply(ticket, self)

    def send_pooled(self, pooled: Tensor) -> None:
        """First half of the forward."""
        wire, blocks = self._wires.forward, self._layout.widths_by_rank
        own = blocks[self._layout.rank]
        sent = wire.encode(pooled, own)
        send_widths, receive_widths = [wire.row_size(own)] * len(blocks), [wire.row_size(widths) for widths in blocks]
        self._send(EMBEDDINGS, sent.reshape(-1), send_widths, receive_widths)

    def receive_embeddings(self) -> Tensor:
        """Second half of the forward."""
        wire, blocks = self._wires.forward, self._layout.widths_by_rank
        parts = self._receive([wire.row_size(widths) for widths in blocks])
        return self._layout.join(
            [wire.decode(part[: self._batch_size], widths) for part, widths in zip(parts, blocks, strict=True)]
        )

    def send_gradient(self, grad_BFD: Tensor) -> None:
        """First half of the backward."""
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
        """The gradient split by destination rank and padded: one flat buffer, and a view of it for each rank."""
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
        """Second half of the backward: the gradient of `pooled`, averaged over ranks."""
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
        """What has arrived: one matrix for each width, with `count` padded batches of rows."""
        self._wait()
        under_way, self._under_way = self._under_way, None
        rows = count * self._padded_batch
        parts = under_way.received.split([rows * width for width in widths])
        return [part.view(rows, width) for part, width in zip(parts, widths, strict=True)]


@dataclass(frozen=True)
class _UnderWay:
    """An all-to-all in progress. handle: None in a job of one rank. sent: kept alive until the all-to-all is done."""

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
