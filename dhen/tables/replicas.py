"""Replicas of the tables, where every table group holds them all (2D sparse parallelism, arXiv 2508.03854).

Tables are sharded over the ranks of a table group, and the groups are replicas, as hybrid sharding has them for the
dense part. The ranks that hold the same shard form a replica group, which this file communicates over. Only rows travel
that the examples of a step used, and all replicas do the same sums in the same order, so they stay equal to the bit.

`SummedGradients`, the default: replicas add up the gradients of the rows before they update them. So they are what one
group over all ranks would be.

`Moves`, for an exchange every k steps: each group updates its replica at once, by its own gradient over the number of
all ranks. After k steps the replicas tell each other how far they moved which rows, and add all moves to the rows as
they were. Until then, a group reads rows that miss what the others did in up to k - 1 steps. SGD's steps add up. Those
of Adagrad do for rows that one group used; for others the sum of squares is that of each group's own gradient, which is
its expected value if these gradients are independent with mean zero. A moving average takes the rows as they were after
the last exchange. (The paper averages the replicas, and scales these sums instead.) The moves may travel during the
next step. What the rows have moved by the time they arrive belongs to the exchange after it.

Shapes: N rows of the tables of one width, C columns, U rows that were used, R replicas.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from dhen.tables.averaged_tables import AveragedTables
from dhen.tables.row_uses import MOST_USES, RowUses
from dhen.tables.stochastic_rounding import round_stochastically
from dhen.tables.widths import Width, by_width
from dhen.tables.wire import Wire

ROWS = "rows' all-gather"
"""Name of the exchange in a profiler trace."""
_Parts = Sequence[Tensor]
"""Tensors about some rows of one width: the rows, counted within the width, in ascending order; then one value or more
for each of them."""


class _Gathering:
    """Parts on their way to all replicas. Their sizes leave first, because messages are as long as the longest."""

    def __init__(self, group: "ReplicaGroup", own: Sequence[_Parts], uses: int) -> None:
        self._group, self._own, self._message = group, own, None
        seed = int(torch.randint(1 << 31, ()))  # each rank's random state is in its checkpoints
        numbers = [*(len(rows) for rows, *_ in own), uses, seed]
        self._numbers = group.start_all_gather(torch.tensor(numbers, device=group.uses.counts.device))

    def send_parts(self) -> None:
        """Wait for the sizes, and send the parts, unless that is done."""
        if self._message is not None:
            return
        *self._sizes_WR, self.uses_R, self.seeds_R = self._numbers().t().tolist()
        message = torch.cat([part.reshape(-1).view(torch.uint8) for parts in self._own for part in parts])
        row_bytes = [sum(part.itemsize * math.prod(part.shape[1:]) for part in parts) for parts in self._own]
        self.longest = max(sum(map(int.__mul__, sizes, row_bytes)) for sizes in zip(*self._sizes_WR, strict=True))
        self._message = self._group.start_all_gather(F.pad(message, (0, self.longest - len(message))))

    def receive(self) -> list[list[_Parts]]:
        """Wait for the parts of all replicas, by width."""
        self.send_parts()
        parts_WR: list[list[_Parts]] = [[] for _ in self._own]
        for message, sizes in zip(self._message(), zip(*self._sizes_WR, strict=True), strict=True):
            first = 0
            for parts, size, of_width in zip(self._own, sizes, parts_WR, strict=True):
                of_width.append([])
                for part in parts:
                    shape = (size, *part.shape[1:])
                    last = first + math.prod(shape) * part.itemsize
                    of_width[-1].append(message[first:last].clone().view(part.dtype).view(shape))  # aligned
                    first = last
        return parts_WR


class ReplicaGroup:
    """The ranks that hold the same shards as this one.

    average: of this rank's tables, if there is one. generator: draws the same numbers on all of them, others after each
    exchange. bytes_sent: by this rank to each other one.
    """

    def __init__(self, weights: Sequence[Tensor], uses: RowUses, group: dist.ProcessGroup) -> None:
        """weights: of all tables of this rank, as FBGEMM stores them."""
        self.widths, self.uses, self._group = by_width(weights), uses, group
        uses.halves_itself = False  # at a moment of its own, it would differ from its replicas
        self.average: AveragedTables | None = None
        self.generator = torch.Generator(uses.counts.device)
        self.bytes_sent = self._added = 0
        self._gathering: _Gathering | None = None

    def start_exchange(self, own: Sequence[_Parts], uses: int) -> None:
        """Send parts to all replicas. Communicates over the group, in the background.

        uses: number of ids that they stand for.
        """
        with record_function(ROWS):
            self._gathering = _Gathering(self, own, uses)

    def go_on(self) -> None:
        """Send what had to wait, if an exchange has started. Call it once between start and end, on all replicas."""
        if self._gathering is not None:
            with record_function(ROWS):
                self._gathering.send_parts()

    def received(self) -> list[list[_Parts]]:
        """The parts of all replicas, by width, of the exchange that has started. Waits for them."""
        gathering, self._gathering = self._gathering, None
        with record_function(ROWS):
            parts_WR = gathering.receive()
        self.bytes_sent += gathering.longest
        self.generator.manual_seed(gathering.seeds_R[0])
        self._added += sum(gathering.uses_R)
        return parts_WR

    def end_exchange(self) -> None:
        """Halve the counts of uses on all replicas if one may be too large."""
        if self._added >= MOST_USES:
            self.uses.halve()
            self._added = 0

    def before_update(self, of_width: Width, rows: Tensor) -> None:
        """Bring the average of these rows of a width up to date."""
        if self.average is not None:
            self.average.before_update(rows + of_width.first_row)

    def uses_of(self, of_width: Width) -> Tensor:
        """How often each row of a width was used, (N,): a view."""
        return self.uses.counts[of_width.first_row : of_width.first_row + len(of_width.weight)]

    def start_all_gather(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Send a tensor of one dimension to all replicas. The result waits, and returns theirs: (R, length)."""
        replicas = dist.get_world_size(self._group)
        if not len(tensor):  # no replica used a row
            return lambda: tensor.expand(replicas, 0)
        everyones = tensor.new_empty(replicas, len(tensor))
        work = dist.all_gather_into_tensor(everyones.view(-1), tensor, group=self._group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return everyones

        return wait


def _added_up(parts_R: Sequence[_Parts]) -> tuple[Tensor, list[Tensor]]:
    """All rows of the replicas, and the sums of what they say about each, replica after replica."""
    rows = torch.cat([rows for rows, *_ in parts_R]).unique()
    sums = [values.new_zeros(len(rows), *values.shape[1:]) for values in parts_R[0][1:]]
    for own_rows, *parts in parts_R:
        places = torch.searchsorted(rows, own_rows)
        for total, part in zip(sums, parts, strict=True):
            total.index_add_(0, places, part)
    return rows, sums


def _numbered(rows: Tensor, of_width: Width) -> Tensor:
    """Row numbers in the dtype in which they are sent."""
    return rows.to(torch.int32 if len(of_width.weight) <= torch.iinfo(torch.int32).max else torch.int64)


class SummedGradients:
    """Adds up the gradients of rows over the replicas, before they are updated."""

    def __init__(self, group: ReplicaGroup) -> None:
        self._group, self.generator = group, group.generator

    def add_up(self, own: Sequence[_Parts]) -> list[_Parts]:
        """By width: rows in ascending order, their gradients (U, C), and how many ids used each -> the same of all
        replicas. Counts the uses. Communicates over the group.
        """
        group, result = self._group, []
        messages = [
            (_numbered(rows, of_width), gradients, counts.int())
            for of_width, (rows, gradients, counts) in zip(group.widths, own, strict=True)
        ]
        group.start_exchange(messages, sum(int(counts.sum()) for *_, counts in own))
        for of_width, parts_R in zip(group.widths, group.received(), strict=True):
            rows, (gradients, counts) = _added_up(parts_R)
            group.before_update(of_width, rows)
            group.uses_of(of_width).index_add_(0, rows, counts)
            result.append((rows, gradients, counts))
        group.end_exchange()
        return result


@dataclass
class _Moved:
    """The rows of one width that this replica has used since the last exchange started, as they were before.

    tensors: weights, states and uses. is_used: (N,). rows: (U,), counted within the width. before: by tensor.
    """

    of_width: Width
    tensors: list[Tensor]
    is_used: Tensor
    rows: list[Tensor] = field(default_factory=list)
    before: list[list[Tensor]] = field(default_factory=list)

    def remember(self, rows: Tensor) -> None:
        """Keep the values of these rows, which may repeat, unless they are kept already."""
        rows = rows.unique()
        rows = rows[~self.is_used[rows]]
        self.is_used[rows] = True
        self.rows.append(rows)
        self.before.append([tensor[rows] for tensor in self.tensors])

    def take(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Returns the rows, how their tensors were before, and how far each has moved. Forgets them."""
        if not self.rows:  # no step since
            self.remember(torch.empty(0, dtype=torch.int64, device=self.is_used.device))
        rows, before = torch.cat(self.rows), [torch.cat(of_tensor) for of_tensor in zip(*self.before, strict=True)]
        moves = [_exact(tensor[rows]) - _exact(old) for tensor, old in zip(self.tensors, before, strict=True)]
        self.is_used[rows] = False
        self.rows.clear()
        self.before.clear()
        return rows, before, moves

    def put_back(self, rows: Tensor, before: Sequence[Tensor]) -> None:
        """Let the rows be as they were."""
        for tensor, old in zip(self.tensors, before, strict=True):
            tensor[rows] = old

    def move(self, rows: Tensor, moves: Sequence[Tensor], rounding: Callable[[Tensor], Tensor] | None) -> None:
        """Add moves to the rows. rounding: of fp16 weights; None: to nearest."""
        for tensor, move in zip(self.tensors, moves, strict=True):
            after = _exact(tensor[rows]) + move
            is_rounded = tensor.dtype == torch.float16 and rounding is not None
            tensor[rows] = rounding(after) if is_rounded else after.to(tensor.dtype)


def _exact(values: Tensor) -> Tensor:
    return values if values.dtype == torch.int32 else values.float()


class Moves:
    """Adds up how far the replicas have moved their rows since the last exchange.

    states: of all tables, by kind. wire: format of the weights' moves; those of states and uses are exact. rounds:
    whether fp16 weights are rounded stochastically.
    """

    def __init__(
        self, group: ReplicaGroup, states: Sequence[Sequence[Tensor]], wire: Wire, *, rounds: bool = True
    ) -> None:
        self._group, self._wire, self._rounds = group, wire, rounds
        self._sent: list[tuple[Tensor, list[Tensor]]] | None = None
        self._widths = []
        for of_width in group.widths:
            counts = group.uses_of(of_width)
            tensors = [of_width.weight, *map(of_width.joined, states), counts]
            self._widths.append(_Moved(of_width, tensors, torch.zeros_like(counts, dtype=torch.bool)))

    def before_update(self, rows: Tensor) -> None:
        """Remember the rows that are about to change. rows: counted over all tables; some may repeat."""
        for moved in self._widths:
            own = rows - moved.of_width.first_row
            moved.remember(own[(own >= 0) & (own < len(moved.is_used))] if len(self._widths) > 1 else own)

    @torch.no_grad()
    def start(self) -> None:
        """Send the moves since the last start. Communicates over the group, in the background; all of its ranks call
        it, and then `end` before the next start.
        """
        group, own, self._sent = self._group, [], []
        for moved in self._widths:
            rows, before, (weight, *others) = moved.take()
            self._sent.append((rows, before))
            encoded = self._wire.encode(weight, [weight.shape[1]])
            own.append((_numbered(rows, moved.of_width), encoded, *others))
        group.start_exchange(own, group.uses.added)
        group.uses.added = 0

    @torch.no_grad()
    def end(self) -> None:
        """Add the moves of all replicas to the rows, if they were sent. Waits for them."""
        if self._sent is None:
            return
        group, later = self._group, []
        for moved, sent, parts_R in zip(self._widths, self._sent, group.received(), strict=True):
            rows, before, moves = moved.take()  # since the start, which no other replica knows yet
            moved.put_back(rows, before)
            later.append((rows, moves))
            moved.put_back(*sent)
            width = moved.of_width.weight.shape[1]
            decoded_R = [(rows, self._wire.decode(sent, [width]), *others) for rows, sent, *others in parts_R]
            rows, sums = _added_up(decoded_R)
            group.before_update(moved.of_width, rows)
            moved.move(rows, sums, partial(round_stochastically, generator=group.generator) if self._rounds else None)
        self._sent = None
        group.end_exchange()
        for moved, (rows, moves) in zip(self._widths, later, strict=True):
            moved.remember(rows)
            moved.move(rows, moves, round_stochastically if self._rounds else None)
