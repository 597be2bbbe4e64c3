"""All-to-all between the owners of the embedding tables and the data-parallel batch (paper 3.1, figure 4)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from dhen.runtime.collectives import all_to_all
from dhen.tables.placement.plan import TableShard
from dhen.tables.wire import Wire

EMBEDDINGS, GRADIENTS = "embeddings' all-to-all", "gradients' all-to-all"
"""Names in a profiler trace."""


@dataclass(frozen=True)
class Wires:
    """Wire formats of the pooled embeddings (forward) and of their gradients (backward)."""

    forward: Wire = Wire("fp32")
    backward: Wire = Wire("fp32")


@dataclass(frozen=True)
class PooledLayout:
    """Which table shards each rank looks up, in the order of its output: a block of columns each.

    Together, the blocks cover each of the `num_features * embedding_dim` columns exactly once. Rows are encoded and
    decoded with all blocks in feature order, and reordered by rank for the wire. So the number of operations does not
    depend on the number of ranks.
    """

    shards_by_rank: Sequence[Sequence[TableShard]]
    num_features: int
    embedding_dim: int
    rank: int
    wires: Wires = Wires()
    device: torch.device = torch.device("cpu")

    @cached_property
    def widths_by_rank(self) -> tuple[tuple[int, ...], ...]:
        """Width of each block, by rank."""
        return tuple(tuple(shard.num_columns for shard in shards) for shards in self.shards_by_rank)

    @cached_property
    def _blocks(self) -> dict[tuple[int, int], int]:
        """Width of each block by (table, first column), in feature order."""
        blocks = {(shard.table, shard.first_column): shard.num_columns for shard in chain(*self.shards_by_rank)}
        return dict(sorted(blocks.items()))

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Width of each block, in feature order."""
        return tuple(self._blocks.values())

    @cached_property
    def _to_features(self) -> "_Order":
        unit, order = self._by_rank(self.wires.forward)
        return unit, None if order is None else order.argsort().to(self.device)

    @cached_property
    def _to_ranks(self) -> "_Order":
        unit, order = self._by_rank(self.wires.backward)
        return unit, None if order is None else order.to(self.device)

    def _by_rank(self, wire: Wire) -> "_Order":
        """From feature order: of each rank, the values of its blocks, then their scales if the wire has any."""
        starts, index = [0, *accumulate(self.widths)], {block: n for n, block in enumerate(self._blocks)}
        spans: list[range] = []
        for shards in self.shards_by_rank:
            blocks = [index[shard.table, shard.first_column] for shard in shards]
            spans += [range(starts[n], starts[n + 1]) for n in blocks]
            first_scales = [starts[-1] + n * wire.scale_size for n in blocks]
            spans += [range(first, first + wire.scale_size) for first in first_scales]
        unit = math.gcd(*map(len, spans))
        order = [place // unit for span in spans for place in span[::unit]]
        return unit, None if order == list(range(len(order))) else torch.tensor(order)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """parts[r]: what rank r encoded for these examples, (B, row size of r) -> embeddings_BFD."""
        rows = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        decoded = self.wires.forward.decode(_reordered(rows, self._to_features), self.widths)
        return decoded.view(-1, self.num_features, self.embedding_dim)

    def split(self, grad_BFD: Tensor, padded_batch: int, scale: float) -> Tensor:
        """The gradient encoded for each rank, one after another: each (padded_batch, row size of the rank), flat."""
        wire = self.wires.backward
        encoded = _reordered(wire.encode(grad_BFD.flatten(1).float(), self.widths, scale), self._to_ranks)
        if len(self.shards_by_rank) == 1:
            return encoded.reshape(-1)
        sizes = [size for widths in self.widths_by_rank if (size := wire.row_size(widths))]
        buffer = encoded.new_zeros if len(encoded) < padded_batch else encoded.new_empty
        flat = buffer(padded_batch * sum(sizes))
        parts = _matrices(flat, padded_batch, sizes)
        torch.split_with_sizes_copy(encoded, sizes, dim=1, out=[part[: len(encoded)] for part in parts])
        return flat


_Order = tuple[int, Tensor | None]
"""How to reorder the columns of a row: in units of so many, as `index_select` takes them. None: they are in order."""


def _reordered(rows: Tensor, order: _Order) -> Tensor:
    unit, places = order
    return rows if places is None else rows.unflatten(1, (-1, unit)).index_select(1, places).flatten(1)


def _matrices(flat: Tensor, rows: int, widths: Sequence[int]) -> list[Tensor]:
    """Views of one matrix after another: (rows, width) each."""
    parts = flat.split([rows * width for width in widths])
    return [part.view(rows, width) for part, width in zip(parts, widths, strict=True)]


class PooledExchange:
    """Sends one batch's pooled embeddings from table owners to the data-parallel batch, and their gradients back.

    `pooled` is (world_size * padded_batch, own width), grouped by the rank that the examples belong to, with every
    rank's batch padded to the largest. The result is embeddings_BFD of this rank's own `batch_size` examples.

    `start` begins the all-to-all and `finish` waits for it, so it overlaps with whatever is computed in between. The
    backward mirrors this: the backward of `finish` sends the gradients, and the backward of `start` waits for them.
    With overlap False, both directions wait at once.

    The loss is a mean over each rank's batch, and DeepSpeed averages the dense gradients over ranks. Table gradients
    arrive as a sum over the ranks of the group, so they are divided by `averaged_over`, the number of all ranks, here
    and nowhere else.

    Gradients are of the order of 1 / global batch. For an fp16 wire they are multiplied by the largest power of two
    that is at most the global batch, and divided by it on arrival.
    """

    def __init__(
        self,
        layout: PooledLayout,
        batch_size: int,
        padded_batch: int,
        group: dist.ProcessGroup,
        *,
        averaged_over: int | None = None,
        overlap: bool = True,
    ) -> None:
        self._averaged_over = averaged_over or len(layout.shards_by_rank)
        self._layout, self._batch_size, self._padded_batch = layout, batch_size, padded_batch
        self._group, self._wires, self._overlap = group, layout.wires, overlap
        global_batch = max(1, padded_batch * len(layout.shards_by_rank))
        self._gradient_scale = 2.0 ** (global_batch.bit_length() - 1)
        self._own = layout.widths_by_rank[layout.rank]
        self._receive: Callable[[], Tensor] | None = None

    def start(self, pooled: Tensor) -> Tensor:
        """Start sending. Communicates over the group. Returns a ticket for `finish`; the gradient flows through it."""
        return _Start.apply(pooled, self)

    def finish(self, ticket: Tensor) -> Tensor:
        """Wait for the embeddings from the other ranks. Returns embeddings_BFD."""
        return _Finish.apply(ticket, self)

    def send_pooled(self, pooled: Tensor) -> None:
        """First half of the forward."""
        own, others = self._row_sizes(self._wires.forward)
        self._send(EMBEDDINGS, self._wires.forward.encode(pooled, self._own).reshape(-1), own, others)

    def receive_embeddings(self) -> Tensor:
        """Second half of the forward."""
        parts = _matrices(self._receive(), self._padded_batch, self._row_sizes(self._wires.forward)[1])
        self._receive = None
        return self._layout.join([part[: self._batch_size] for part in parts])

    def send_gradient(self, grad_BFD: Tensor) -> None:
        """First half of the backward."""
        own, others = self._row_sizes(self._wires.backward)
        flat = self._layout.split(grad_BFD, self._padded_batch, self._gradient_scale)
        self._send(GRADIENTS, flat, others, own)

    def receive_gradient(self) -> Tensor:
        """Second half of the backward: the gradient of `pooled`, averaged over all ranks."""
        wire, ranks = self._wires.backward, len(self._layout.shards_by_rank)
        rows = self._receive().view(ranks * self._padded_batch, wire.row_size(self._own))
        self._receive = None
        grad = wire.decode(rows, self._own, self._gradient_scale)
        if ranks == 1:  # nothing was received: it is the caller's own
            return grad / self._averaged_over if self._averaged_over > 1 else grad
        return grad.div_(self._averaged_over)

    def _row_sizes(self, wire: Wire) -> tuple[list[int], list[int]]:
        """Size of an encoded row of this rank, once for each rank, and of each rank's."""
        by_rank = [wire.row_size(widths) for widths in self._layout.widths_by_rank]
        return [wire.row_size(self._own)] * len(by_rank), by_rank

    def _send(self, name: str, flat: Tensor, send_widths: Sequence[int], receive_widths: Sequence[int]) -> None:
        send, receive = ([self._padded_batch * width for width in widths] for widths in (send_widths, receive_widths))
        with record_function(name):
            self._receive = all_to_all(flat, send, receive, self._group)
        if not self._overlap:
            self._receive()


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
