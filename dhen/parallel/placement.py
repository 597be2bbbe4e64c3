"""Which rank holds which part of which embedding table (paper 3.1). Pure Python; the same on all ranks.

Every shard has a cost in seconds a step (table_costs.py). Shards go to ranks by longest processing time first (LPT,
Graham 1969), within a limit of memory. Where that leaves one rank far above the others, the table that holds it back is
cut into more equal column shards, until cutting helps no more.
"""

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dhen.model.configuration_dhen import SparseFeature
from dhen.model.names import unknown_name
from dhen.parallel.table_costs import Costs, StepSetting, replicated_seconds, shard_seconds

_COLUMNS = 4
"""FBGEMM wants multiples of so many columns."""
_TOLERANCE = 1.05
"""Cutting stops when the longest rank is within this of the lower bound."""
_GAIN = 0.99
"""Cuts are kept if they bring the longest rank down to this."""


class PlacementError(ValueError):
    """Tables that can't be placed; the message says what they need, what there is, and what to do."""


@dataclass(frozen=True)
class TableShard:
    """Columns [first_column, last_column) of table number `table`, all rows of it, on `rank`.

    num_bytes: of its weights and optimizer state. seconds: what a step is expected to spend on it.
    """

    table: int
    name: str
    num_embeddings: int
    first_column: int
    last_column: int
    rank: int
    num_bytes: int = 0
    seconds: float = 0.0

    @property
    def num_columns(self) -> int:
        """Width of the shard."""
        return self.last_column - self.first_column


@dataclass(frozen=True)
class Placement:
    """Every shard of every table, by rank and then by table. The same on all ranks.

    replicated: tables that every rank has whole, in its dense part.
    """

    shards: tuple[TableShard, ...]
    world_size: int
    replicated: tuple[str, ...] = ()

    def of_rank(self, rank: int) -> tuple[TableShard, ...]:
        """The shards that `rank` holds."""
        return tuple(shard for shard in self.shards if shard.rank == rank)

    def bytes_of_rank(self, rank: int) -> int:
        """Bytes of weights and optimizer states on `rank`."""
        return sum(shard.num_bytes for shard in self.of_rank(rank))

    def seconds_of_rank(self, rank: int) -> float:
        """What a step is expected to spend on `rank`'s shards."""
        return math.fsum(shard.seconds for shard in self.of_rank(rank))

    @property
    def makespan(self) -> float:
        """Seconds a step of the longest rank."""
        return max(self.seconds_of_rank(rank) for rank in range(self.world_size))

    @property
    def lower_bound(self) -> float:
        """Seconds that no placement of these shards can be below: the mean rank, or the longest shard."""
        seconds = [shard.seconds for shard in self.shards]
        return max(math.fsum(seconds) / self.world_size, *seconds, 0.0)

    def cuts(self) -> dict[str, int]:
        """Number of column shards of each table, 0 where it is replicated."""
        cuts = dict.fromkeys(self.replicated, 0)
        for shard in self.shards:
            cuts[shard.name] = cuts.get(shard.name, 0) + 1
        return cuts

    def as_dict(self) -> dict[str, Any]:
        """For placement.json in the run folder."""
        return asdict(self) | {"makespan": self.makespan, "lower_bound": self.lower_bound}

    def as_table(self) -> str:
        """The placement for a reader: one line a rank, and the imbalance."""
        cuts = self.cuts()
        mean = math.fsum(shard.seconds for shard in self.shards) / self.world_size
        lines = ["rank  shards       MiB  ms a step  of mean  tables (with columns where a table is cut)"]
        for rank in range(self.world_size):
            own, seconds = self.of_rank(rank), self.seconds_of_rank(rank)
            names = [
                f"{s.name}[{s.first_column}:{s.last_column}]" if cuts[s.name] > 1 else s.name for s in own
            ]  # fmt: skip
            lines.append(
                f"{rank:>4} {len(own):>7} {self.bytes_of_rank(rank) / 2**20:>9.2f} {1e3 * seconds:>10.3f} "
                f"{seconds / mean if mean else 0:>8.2f}  {', '.join(names) or '-'}"
            )
        if self.replicated:
            lines.append(f" all {len(self.replicated):>7}  in the dense part, replicated: {', '.join(self.replicated)}")
        if self.lower_bound:
            lines.append(f"the longest rank is {self.makespan / self.lower_bound:.2f} times the lower bound")
        return "\n".join(lines)


@dataclass(frozen=True)
class PlacementOptions:
    """What a user may decide instead of the plan.

    max_column_shards: of one table; None: as many as its columns allow. by_hand: ranks of a table by its name, one for
    each of its column shards. memory_bytes: of a rank, for weights and optimizer states; None: no limit. cuts: number
    of column shards by table, fixed, as those of a checkpoint. replicate_below_rows: smaller tables are replicated
    where that is cheaper. replicated: the tables that are, fixed; None: the plan decides.
    """

    max_column_shards: int | None = None
    by_hand: Mapping[str, Sequence[int]] = field(default_factory=dict)
    memory_bytes: int | None = None
    cuts: Mapping[str, int] = field(default_factory=dict)
    replicate_below_rows: int = 0
    replicated: Collection[str] | None = None


class NoRoomError(Exception):
    """Item number `item` fits on no rank."""

    def __init__(self, item: int) -> None:
        super().__init__(item)
        self.item = item


def longest_first(
    costs: Sequence[float],
    num_ranks: int,
    sizes: Sequence[int] | None = None,
    limit: int | None = None,
    fixed: Mapping[int, int] | None = None,
) -> list[int]:
    """LPT: the rank of each item. The costliest item first, each to the rank with the least cost so far that has room.

    sizes, limit: of memory, an item's and a rank's. fixed: items whose rank is given. Its longest rank is at most
    4/3 - 1/(3 num_ranks) times the best possible (Graham 1969), where memory and fixed items don't interfere. Raises
    NoRoomError.
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


@dataclass(frozen=True)
class _Assignment:
    """Shards and their ranks, before they are made into a Placement. pieces: (table, number of its shard)."""

    cuts: tuple[int, ...]
    pieces: list[tuple[int, int]]
    ranks: list[int]
    loads: list[float]

    @property
    def makespan(self) -> float:
        return max(self.loads)


class _Planner:
    """Cuts and places; keeps what a table costs at each number of column shards."""

    def __init__(
        self,
        tables: Sequence[SparseFeature],
        embedding_dim: int,
        setting: StepSetting,
        costs: Costs,
        ids_per_bag: Mapping[str, float],
        options: PlacementOptions,
    ) -> None:
        self.tables, self.dim, self.setting, self.options = tables, embedding_dim, setting, options
        self._costs, self._ids_per_bag = costs, ids_per_bag
        self._fixed = dict(options.cuts) | {name: len(ranks) for name, ranks in options.by_hand.items()}
        self._seconds: dict[tuple[int, int], float] = {}

    def seconds(self, table: int, cut: int) -> float:
        """Of one of `cut` column shards of a table."""
        if (table, cut) not in self._seconds:
            feature, columns = self.tables[table], self.dim // cut
            ids = self._ids_per_bag.get(feature.name, 1.0)
            found = shard_seconds(self._costs, self.setting, feature.num_embeddings, columns, ids)
            self._seconds[table, cut] = found.total
        return self._seconds[table, cut]

    def num_bytes(self, table: int, cut: int) -> int:
        """Of one of `cut` column shards of a table."""
        return self.setting.shard_bytes(self.tables[table].num_embeddings, self.dim // cut)

    def next_cut(self, table: int, cut: int) -> int | None:
        """The next number of equal shards of a table; None where it can't be cut further."""
        if self.tables[table].name in self._fixed:
            return None
        units = self.dim // _COLUMNS
        most = min(units, self.options.max_column_shards or units)
        return next((more for more in range(cut + 1, most + 1) if units % more == 0), None)

    def assign(self, cuts: Sequence[int]) -> _Assignment:
        """LPT of these shards. Raises NoRoomError with the table's number."""
        pieces = [(table, piece) for table, cut in enumerate(cuts) for piece in range(cut)]
        seconds = [self.seconds(table, cuts[table]) for table, _ in pieces]
        sizes = [self.num_bytes(table, cuts[table]) for table, _ in pieces]
        by_hand = self.options.by_hand
        fixed = {
            item: by_hand[self.tables[table].name][piece]
            for item, (table, piece) in enumerate(pieces)
            if self.tables[table].name in by_hand
        }
        try:
            ranks = longest_first(seconds, self.setting.world_size, sizes, self.options.memory_bytes, fixed)
        except NoRoomError as error:
            raise NoRoomError(pieces[error.item][0]) from None
        loads = [0.0] * self.setting.world_size
        for rank, cost in zip(ranks, seconds, strict=True):
            loads[rank] += cost
        return _Assignment(tuple(cuts), pieces, ranks, loads)

    def assign_within_memory(self, cuts: list[int]) -> _Assignment:
        """`assign`, with tables cut further, in `cuts`, where they must be to fit. Raises PlacementError."""
        while True:
            try:
                return self.assign(cuts)
            except NoRoomError as error:
                table = error.item
                more = self.next_cut(table, cuts[table])
                if more is None:
                    raise PlacementError(self._no_room(table, cuts)) from None
                cuts[table] = more

    def search(self) -> _Assignment:
        """Cut the table that holds the longest rank back, while that brings the longest rank down."""
        cuts = [self._fixed.get(table.name, 1) for table in self.tables]
        best = plan = self.assign_within_memory(cuts)
        patience = most = 2 * self.setting.world_size + 16
        while patience and best.makespan > _TOLERANCE * self._bound(best):
            longest = plan.loads.index(plan.makespan)
            tables = [table for (table, _), rank in zip(plan.pieces, plan.ranks, strict=True) if rank == longest]
            tables.sort(key=lambda table: (-self.seconds(table, cuts[table]), table))
            table = next((table for table in tables if self.next_cut(table, cuts[table])), None)
            if table is None:
                break
            cuts[table] = self.next_cut(table, cuts[table])
            plan = self.assign_within_memory(cuts)
            if plan.makespan < _GAIN * best.makespan:
                best, patience = plan, most
            else:
                patience -= 1
        return best

    def _bound(self, plan: _Assignment) -> float:
        """Below which no cutting and placing brings the longest rank: the mean, or a shard that can't be cut."""
        uncut = [self.seconds(t, cut) for t, cut in enumerate(plan.cuts) if self.next_cut(t, cut) is None]
        return max(math.fsum(plan.loads) / len(plan.loads), *uncut, 0.0)

    def placement(self, plan: _Assignment) -> Placement:
        """The same, for others to read."""
        shards = []
        for (table, piece), rank in zip(plan.pieces, plan.ranks, strict=True):
            cut, feature = plan.cuts[table], self.tables[table]
            first, last = (self.dim // cut * n for n in (piece, piece + 1))
            size, seconds = self.num_bytes(table, cut), self.seconds(table, cut)
            shards.append(TableShard(table, feature.name, feature.num_embeddings, first, last, rank, size, seconds))
        shards.sort(key=lambda shard: (shard.rank, shard.table, shard.first_column))
        return Placement(tuple(shards), self.setting.world_size)

    def _no_room(self, table: int, cuts: Sequence[int]) -> str:
        name, world, gib = self.tables[table].name, self.setting.world_size, 2**30
        size = self.num_bytes(table, cuts[table])
        need = sum(cut * self.num_bytes(t, cut) for t, cut in enumerate(cuts))
        return (
            f"table {name!r} fits on no rank: it has {cuts[table]} shards of {size / gib:.3f} GiB. All "
            f"tables need {need / gib:.3f} GiB with their optimizer's state; {world} ranks of "
            f"{self.options.memory_bytes / gib:.3f} GiB have {world * self.options.memory_bytes / gib:.3f}. Possible "
            'solutions: more ranks; a larger dhen.placement.memory_gib; dhen.table_dtype "fp16"; dhen.table_optimizer '
            '"rowwise_adagrad" or "sgd"; a larger dhen.placement.max_column_shards; fewer rows in the data\'s schema.'
        )


def place_tables(
    tables: Sequence[SparseFeature],
    embedding_dim: int,
    setting: StepSetting,
    costs: Costs,
    ids_per_bag: Mapping[str, float] | None = None,
    options: PlacementOptions | None = None,
) -> Placement:
    """Cut tables by columns and place the shards. Deterministic.

    What is replicated is left out of the shards, and of the tables that `TableShard.table` counts.
    ids_per_bag: mean number of ids by feature, 1 where it is left out. Raises PlacementError where the tables don't fit
    or an option can't be, ValueError unless 4 divides embedding_dim.
    """
    options = options or PlacementOptions()
    _check(tables, embedding_dim, setting, options)
    replicated = _replicated(tables, embedding_dim, setting, costs, ids_per_bag or {}, options)
    sharded = [table for table in tables if table.name not in replicated]
    planner = _Planner(sharded, embedding_dim, setting, costs, ids_per_bag or {}, options)
    return replace(planner.placement(planner.search()), replicated=replicated)


def _replicated(
    tables: Sequence[SparseFeature],
    embedding_dim: int,
    setting: StepSetting,
    costs: Costs,
    ids_per_bag: Mapping[str, float],
    options: PlacementOptions,
) -> tuple[str, ...]:
    """The tables whose all-reduce costs a rank less than its share of their all-to-all, among the small ones."""
    if options.replicated is not None:
        return tuple(table.name for table in tables if table.name in options.replicated)
    chosen = []
    for table in tables:
        if table.num_embeddings < options.replicate_below_rows and table.name not in options.by_hand:
            what = (costs, setting, table.num_embeddings, embedding_dim, ids_per_bag.get(table.name, 1.0))
            if replicated_seconds(*what) < shard_seconds(*what).total / setting.world_size:
                chosen.append(table.name)
    return tuple(chosen)


def _check(
    tables: Sequence[SparseFeature], embedding_dim: int, setting: StepSetting, options: PlacementOptions
) -> None:
    if embedding_dim % _COLUMNS:
        below = embedding_dim // _COLUMNS * _COLUMNS
        raise ValueError(
            f"embedding_dim is {embedding_dim}; FBGEMM needs a multiple of {_COLUMNS}, {max(below, _COLUMNS)} or "
            f"{below + _COLUMNS}."
        )
    names = [table.name for table in tables]
    units = embedding_dim // _COLUMNS
    for name, ranks in options.by_hand.items():
        if name not in names:
            raise PlacementError(f"dhen.placement.tables: {unknown_name('table', name, names)}")
        last = setting.world_size - 1
        outside = [rank for rank in ranks if not 0 <= rank <= last]
        if outside:
            raise PlacementError(f"dhen.placement.tables.{name}: this job has ranks 0 to {last}, not {outside[0]}.")
        if not ranks or units % len(ranks):
            allowed = [n for n in range(1, units + 1) if units % n == 0]
            raise PlacementError(
                f"dhen.placement.tables.{name} names {len(ranks)} ranks, but {embedding_dim} columns can be cut into "
                f"{', '.join(map(str, allowed))} equal shards of a multiple of {_COLUMNS}."
            )
