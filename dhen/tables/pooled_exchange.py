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
from dhen.runtime.two_hops import TwoHops
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
    """What each rank looks up, in the order of its output: columns of a feature each, whose number is `table`.

    Together, the blocks cover each of the `num_features * embedding_dim` columns exactly once. Rows are encoded and
    decoded with all blocks in feature order, and one copy takes them to or from the ranks' order on the wire. So
    neither the number of operations nor that of copies depends on the number of ranks.
    """

    lookups_by_rank: Sequence[Sequence[TableShard]]
    num_features: int
    embedding_dim: int
    rank: int
    wires: Wires = Wires()
    device: torch.device = torch.device("cpu")

    @cached_property
    def widths_by_rank(self) -> tuple[tuple[int, ...], ...]:
        """Width of each block, by rank."""
        return tuple(tuple(shard.num_columns for shard in shards) for shards in self.lookups_by_rank)

    @cached_property
    def _blocks(self) -> dict[tuple[int, int], int]:
        """Width of each block by (table, first column), in feature order."""
        blocks = {(shard.table, shard.first_column): shard.num_columns for shard in chain(*self.lookups_by_rank)}
        return dict(sorted(blocks.items()))

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Width of each block, in feature order."""
        return tuple(self._blocks.values())

    @cached_property
    def _received(self) -> "_Places":
        return self._places_of(self.wires.forward)

    @cached_property
    def _sent(self) -> "_Places":
        return self._places_of(self.wires.backward)

    def _places_of(self, wire: Wire) -> "_Places":
        """A row on the wire: of each rank, the values of its blocks, then their scales if the wire has any."""
        starts, index = [0, *accumulate(self.widths)], {block: n for n, block in enumerate(self._blocks)}
        by_rank = []
        for shards in self.lookups_by_rank:
            blocks = [index[shard.table, shard.first_column] for shard in shards]
            first_scales = [starts[-1] + n * wire.scale_size for n in blocks]
            values = [range(starts[n], starts[n + 1]) for n in blocks]
            by_rank.append([*values, *(range(first, first + wire.scale_size) for first in first_scales)])
        return _Places(by_rank, self.device)

    def join(self, flat: Tensor, batch: int, padded_batch: int) -> Tensor:
        """flat: what the ranks encoded for these examples, one after another -> embeddings_BFD.

        Each rank's part is (padded_batch, row size of the rank), of which `batch` examples are real.
        """
        decoded = self.wires.forward.decode(self._received.gather(flat, batch, padded_batch), self.widths)
        return decoded.view(-1, self.num_features, self.embedding_dim)

    def split(self, grad_BFD: Tensor, padded_batch: int, scale: float) -> Tensor:
        """The gradient encoded for each rank, one after another: each (padded_batch, row size of the rank), flat."""
        encoded = self.wires.backward.encode(grad_BFD.flatten(1).float(), self.widths, scale)
        return self._sent.scatter(encoded, padded_batch)


class _Places:
    """Where the columns of rows in feature order lie in what travels: a matrix for each rank, one after another.

    All values move at once, so each is copied only once. They move in units of as many columns as stay together
    everywhere: U units in a row.
    """

    def __init__(self, spans_by_rank: Sequence[Sequence[range]], device: torch.device) -> None:
        """spans_by_rank: the columns, in feature order, that a row has for each rank, in the order on the wire."""
        self._unit = math.gcd(*(len(span) for spans in spans_by_rank for span in spans))
        place_of_unit, before = {}, 0
        for spans in spans_by_rank:
            units = [column // self._unit for span in spans for column in span[:: self._unit]]
            place_of_unit |= {unit: (before, within, len(units)) for within, unit in enumerate(units)}
            before += len(units)
        in_order = [place_of_unit[unit] for unit in range(before)]
        self._is_identity = in_order == [(0, unit, before) for unit in range(before)]
        self._before_U, self._within_U, self._width_U = torch.tensor(in_order).view(-1, 3).t().to(device)
        self._columns = before * self._unit
        self._kept: dict[tuple[str, int, int], Tensor] = {}

    def gather(self, flat: Tensor, batch: int, padded_batch: int) -> Tensor:
        """Rows in feature order, (batch, columns)."""
        if self._is_identity:
            return flat.view(padded_batch, self._columns)[:batch]
        units = flat.view(-1, self._unit).index_select(0, self._kept_for(self._find_rows, batch, padded_batch))
        return units.view(batch, self._columns)

    def scatter(self, rows: Tensor, padded_batch: int) -> Tensor:
        """The inverse of `gather`: rows in feature order -> flat. Padding repeats the first unit, which no id reads."""
        batch = len(rows)
        if batch == 0:
            return rows.new_zeros(padded_batch * self._columns)
        if self._is_identity and batch == padded_batch:
            return rows.contiguous().view(-1)
        places = self._kept_for(self._find_wire, batch, padded_batch)
        return rows.reshape(-1, self._unit).index_select(0, places).view(-1)

    def _kept_for(self, find: Callable[[int, int], Tensor], batch: int, padded_batch: int) -> Tensor:
        """What `find` returned for these sizes. It is kept for two of them, as a run trains and evaluates."""
        key = find.__name__, batch, padded_batch
        if key not in self._kept:
            if len(self._kept) == 2:
                self._kept.clear()
            with torch.inference_mode(False):
                places = find(batch, padded_batch)
                fits = padded_batch * len(self._width_U) <= torch.iinfo(torch.int32).max
                self._kept[key] = places.int() if fits else places
        return self._kept[key]

    def _find_rows(self, batch: int, padded_batch: int) -> Tensor:
        """The place in `flat` of each row's units, (batch * U,)."""
        rows_B1 = torch.arange(batch, device=self._width_U.device)[:, None]
        return (padded_batch * self._before_U + self._within_U + rows_B1 * self._width_U).flatten()

    def _find_wire(self, batch: int, padded_batch: int) -> Tensor:
        """The unit of the rows that lies at each place in `flat`, (padded_batch * U,)."""
        places = self._find_rows(batch, padded_batch)
        units = torch.zeros(padded_batch * len(self._width_U), dtype=torch.int64, device=places.device)
        return units.index_copy_(0, places, torch.arange(len(places), device=places.device))


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
        hops: TwoHops | None = None,
        averaged_over: int | None = None,
        overlap: bool = True,
    ) -> None:
        """hops: exchanges over the group in two hops; None: in one."""
        self._averaged_over = averaged_over or len(layout.lookups_by_rank)
        self._layout, self._batch_size, self._padded_batch = layout, batch_size, padded_batch
        self._group, self._hops, self._wires, self._overlap = group, hops, layout.wires, overlap
        global_batch = max(1, padded_batch * len(layout.lookups_by_rank))
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
        sizes = self._part_sizes(self._wires.forward)
        flat = self._wires.forward.encode(pooled, self._own).reshape(-1)
        self._send(EMBEDDINGS, flat, lambda source, _: sizes[source])

    def receive_embeddings(self) -> Tensor:
        """Second half of the forward."""
        flat, self._receive = self._receive(), None
        return self._layout.join(flat, self._batch_size, self._padded_batch)

    def send_gradient(self, grad_BFD: Tensor) -> None:
        """First half of the backward."""
        sizes = self._part_sizes(self._wires.backward)
        flat = self._layout.split(grad_BFD, self._padded_batch, self._gradient_scale)
        self._send(GRADIENTS, flat, lambda _, target: sizes[target])

    def receive_gradient(self) -> Tensor:
        """Second half of the backward: the gradient of `pooled`, averaged over all ranks."""
        wire, ranks = self._wires.backward, len(self._layout.lookups_by_rank)
        rows = self._receive().view(ranks * self._padded_batch, wire.row_size(self._own))
        self._receive = None
        grad = wire.decode(rows, self._own, self._gradient_scale)
        if ranks == 1:  # nothing was received: it is the caller's own
            return grad / self._averaged_over if self._averaged_over > 1 else grad
        return grad.div_(self._averaged_over)

    def _part_sizes(self, wire: Wire) -> list[int]:
        """Elements that the tables of each rank have for a batch of one rank."""
        return [self._padded_batch * wire.row_size(widths) for widths in self._layout.widths_by_rank]

    def _send(self, name: str, flat: Tensor, size: Callable[[int, int], int]) -> None:
        """size(s, r): number of elements that rank s sends to rank r."""
        own, ranks = self._layout.rank, range(len(self._layout.lookups_by_rank))
        with record_function(name):
            if self._hops is not None:
                self._receive = self._hops.all_to_all(flat, size)
            else:
                sent, received = [size(own, rank) for rank in ranks], [size(rank, own) for rank in ranks]
                self._receive = all_to_all(flat, sent, received, self._group)
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
