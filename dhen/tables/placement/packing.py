"""Cuts tables by columns and assigns the shards to ranks (paper 3.1). Pure Python, deterministic.

Shards are assigned by longest processing time first (LPT, Graham 1969), within a memory limit. While one rank is much
slower than the others, its costliest table is cut into more equal shards, until cutting no longer helps. Then a bounded
search with a fixed seed tries other numbers of shards for a few tables at a time.
"""

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_TOLERANCE = 1.05
"""Cutting stops when the slowest rank is within this factor of the lower bound."""
_GAIN = 0.99
"""A cut is kept if it brings the slowest rank below this fraction of the best time so far."""
_NEAR = 1.005
"""The search ends when the slowest rank is within this factor of a bound that no plan can beat."""
_TRIES, _TRIED_SHARDS = 5_000, 400_000
"""Limits of the search, which takes less than a second: plans, and shards in all plans together."""
_MOST_CHANGES = 3
"""The search changes the number of shards of at most this many tables at once."""


class NoRoomError(Exception):
    """No rank has room for item number `item`."""

    def __init__(self, item: int) -> None:
        super().__init__(item)
        self.item = item


@dataclass(frozen=True)
class Cut:
    """A table cut into `count` equal shards. seconds, num_bytes: of a single shard."""

    count: int
    seconds: float
    num_bytes: int


@dataclass(frozen=True)
class CuttableTable:
    """A table to place. cuts: its possible cuts, from fewest to most shards.

    ranks: ranks of its shards if the user fixes them; then there is only one cut.
    """

    cuts: tuple[Cut, ...]
    ranks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Packing:
    """The cut of each table and the ranks of its shards. loads: seconds of each rank."""

    cuts: tuple[Cut, ...]
    ranks: tuple[tuple[int, ...], ...]
    loads: tuple[float, ...]

    @property
    def makespan(self) -> float:
        """Seconds of the slowest rank."""
        return max(self.loads)


def longest_first(
    costs: Sequence[float],
    num_ranks: int,
    sizes: Sequence[int] | None = None,
    limit: int | None = None,
    fixed: Mapping[int, int] | None = None,
) -> list[int]:
    """LPT: the rank of each item. Assigns the costliest item first, always to the least loaded rank that has room.

    sizes, limit: memory of each item and of a rank. fixed: rank by item, for items whose rank is given. Without memory
    limits and fixed items, the slowest rank takes at most 4/3 - 1/(3 num_ranks) times the best possible (Graham 1969).
    Raises NoRoomError.
    """
    ranks, fixed = [-1] * len(costs), fixed or {}
    load, used = [0.0] * num_ranks, [0] * num_ranks
    for item, rank in fixed.items():
        ranks[item] = rank
        load[rank] += costs[item]
        used[rank] += sizes[item] if sizes else 0
    least = [(load[rank], rank) for rank in range(num_ranks)]
    heapq.heapify(least)
    for item in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        if ranks[item] >= 0:
            continue
        full = []
        while least and limit is not None and used[least[0][1]] + sizes[item] > limit:
            full.append(heapq.heappop(least))
        if not least:
            raise NoRoomError(item)
        of_rank, rank = least[0]
        ranks[item] = rank
        used[rank] += sizes[item] if sizes else 0
        heapq.heapreplace(least, (of_rank + costs[item], rank))
        for entry in full:
            heapq.heappush(least, entry)
    return ranks


class Packer:
    """Packs tables onto ranks, with at most `limit` bytes per rank."""

    def __init__(self, tables: Sequence[CuttableTable], num_ranks: int, limit: int | None = None) -> None:
        self._tables, self._num_ranks, self._limit = tables, num_ranks, limit
        self.unsliceable = max((table.cuts[-1].seconds for table in tables), default=0.0)
        """Seconds of the slowest shard that cannot be cut further. The rank that holds it takes at least as long."""
        # Every cut adds to the total, so the mean over ranks is lowest when no table is cut.
        uncut = math.fsum(table.cuts[0].count * table.cuts[0].seconds for table in tables)
        self._bound = max(uncut / num_ranks, self.unsliceable)

    def pack(self) -> Packing:
        """Make the plan. Raises NoRoomError with a table's number if the tables do not fit however they are cut."""
        return self._refined(self._cut_where_it_helps())

    def assign(self, choice: Sequence[int]) -> Packing:
        """Cut each table as `choice` says and place the shards by LPT on their costs. If a shard finds no room, use
        LPT on their sizes, which packs more tightly. Raises NoRoomError with the table's number."""
        cuts = [table.cuts[number] for table, number in zip(self._tables, choice, strict=True)]
        owners = [table for table, cut in enumerate(cuts) for _ in range(cut.count)]
        seconds = [cuts[table].seconds for table in owners]
        sizes = [cuts[table].num_bytes for table in owners]
        given = [
            rank for table, cut in zip(self._tables, cuts, strict=True) for rank in table.ranks or [-1] * cut.count
        ]
        fixed = {item: rank for item, rank in enumerate(given) if rank >= 0}
        try:
            ranks = longest_first(seconds, self._num_ranks, sizes, self._limit, fixed)
        except NoRoomError:
            try:
                ranks = longest_first(sizes, self._num_ranks, sizes, self._limit, fixed)
            except NoRoomError as error:
                raise NoRoomError(owners[error.item]) from None
        loads = [0.0] * self._num_ranks
        for rank, cost in zip(ranks, seconds, strict=True):
            loads[rank] += cost
        rest = iter(ranks)
        return Packing(tuple(cuts), tuple(tuple(next(rest) for _ in range(cut.count)) for cut in cuts), tuple(loads))

    def _assign_within_memory(self, choice: list[int]) -> Packing:
        """`assign`, but cut tables further if they do not fit, updating `choice`. Raises NoRoomError."""
        while True:
            try:
                return self.assign(choice)
            except NoRoomError as error:
                # Cut the table that found no room, or else the one with the largest shards: small shards pack better.
                choice[self._to_cut(error.item, choice)] += 1

    def _to_cut(self, table: int, choice: Sequence[int]) -> int:
        if self._can_be_cut(table, choice):
            return table
        others = [other for other in range(len(self._tables)) if self._can_be_cut(other, choice)]
        if not others:
            raise NoRoomError(table)
        return max(others, key=lambda other: (self._tables[other].cuts[choice[other]].num_bytes, -other))

    def _can_be_cut(self, table: int, choice: Sequence[int]) -> bool:
        return choice[table] + 1 < len(self._tables[table].cuts)

    def _cut_where_it_helps(self) -> tuple[list[int], Packing]:
        """Cut the slowest rank's costliest table, as long as that makes the slowest rank faster."""
        choice = [0] * len(self._tables)
        best = plan = self._assign_within_memory(choice)
        chosen = list(choice)
        patience = most = 2 * self._num_ranks + 16
        while patience and best.makespan > _TOLERANCE * max(math.fsum(best.loads) / self._num_ranks, self.unsliceable):
            longest = plan.loads.index(plan.makespan)
            tables = [table for table, ranks in enumerate(plan.ranks) if longest in ranks]
            tables = [table for table in tables if self._can_be_cut(table, choice)]
            if not tables:
                break
            choice[max(tables, key=lambda table: (plan.cuts[table].seconds, -table))] += 1
            try:
                plan = self._assign_within_memory(choice)
            except NoRoomError:  # cut for cost, the shards may no longer fit; the best plan so far does
                break
            if plan.makespan < _GAIN * best.makespan:
                best, chosen, patience = plan, list(choice), most
            else:
                patience -= 1
        return chosen, best

    def _refined(self, found: tuple[list[int], Packing]) -> Packing:
        """Improve the plan by repeatedly trying other cuts for a few tables, with a fixed seed."""
        choice, best = found
        left = _TRIED_SHARDS
        for changed in itertools.islice(self._changed_cuts(choice), _TRIES):
            left -= sum(cut.count for cut in best.cuts)
            if left < 0 or best.makespan <= _NEAR * self._bound:
                break
            try:
                plan = self.assign(changed)
            except NoRoomError:
                continue
            # Accept equally good plans too: they can lead to better ones.
            if (plan.makespan, math.fsum(plan.loads)) <= (best.makespan, math.fsum(best.loads)):
                best, choice[:] = plan, changed
        return best

    def _changed_cuts(self, choice: list[int]) -> Iterator[list[int]]:
        """Yield variants of the current `choice` forever, each with one to three tables cut differently."""
        cuttable = [table for table, of_table in enumerate(self._tables) if len(of_table.cuts) > 1]
        draw = random.Random(0)
        while cuttable:
            changed = list(choice)
            for table in draw.sample(cuttable, min(draw.randint(1, _MOST_CHANGES), len(cuttable))):
                others = [n for n in range(len(self._tables[table].cuts)) if n != choice[table]]
                changed[table] = draw.choice(others)
            yield changed
