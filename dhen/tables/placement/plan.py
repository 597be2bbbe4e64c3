"""Plans which rank holds which part of each embedding table (paper 3.1). Pure Python, deterministic.

costs.py estimates the seconds per step of every shard; packing.py cuts the tables and assigns the shards to ranks. This
file has the user's options, the memory that replicated tables take, and the resulting plan.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dhen.model.names import unknown_name
from dhen.model.sparse_feature import SparseFeature, features_of_tables
from dhen.tables.placement.costs import Costs, StepSetting, replicated_bytes, replicated_seconds, shard_seconds
from dhen.tables.placement.packing import Cut, CuttableTable, NoRoomError, Packer, Packing

_COLUMNS = 4
"""FBGEMM needs the number of columns to be a multiple of this."""
_GIB = 2**30
_SOLUTIONS = (
    'more ranks; a larger dhen.placement.memory_gib; dhen.table_dtype "fp16"; dhen.table_optimizer "rowwise_adagrad" '
    'or "sgd"; a larger dhen.placement.max_column_shards; fewer rows in the data\'s schema.'
)


class PlacementError(ValueError):
    """The tables cannot be placed. The message says what they need, what is available, and what to do."""

    def __init__(self, needs: str, solutions: str = "") -> None:
        super().__init__(f"{needs} Possible solutions: {solutions}" if solutions else needs)
        self.needs, self.solutions = needs, solutions


@dataclass(frozen=True)
class TableShard:
    """Columns [first_column, last_column) of all rows of table number `table`, on `rank`.

    num_bytes: size of its weights and optimizer state. cached_bytes: what it still takes on the GPU when these are in
    host memory. seconds: expected time per step. ids_per_bag: on average. num_features: that look it up.
    """

    table: int
    name: str
    num_embeddings: int
    first_column: int
    last_column: int
    rank: int
    num_bytes: int = 0
    seconds: float = 0.0
    cached_bytes: int = 0
    ids_per_bag: float = 1.0
    num_features: int = 1

    @property
    def num_columns(self) -> int:
        """Number of columns in the shard."""
        return self.last_column - self.first_column


@dataclass(frozen=True)
class Placement:
    """Every shard of every table, ordered by rank, then by table. The same on all ranks.

    replicated: tables that every rank holds in full, in its dense part. unsliceable: seconds of the slowest shard that
    remains when every table is cut as often as possible. device_bytes: memory of a GPU that the shards and their caches
    may use; other shards go to host memory. hops: of the all-to-all of embeddings and gradients. hop_seconds: what
    they cost each rank per step beside its shards.
    """

    shards: tuple[TableShard, ...]
    world_size: int
    replicated: tuple[str, ...] = ()
    unsliceable: float = 0.0
    device_bytes: float = math.inf
    hops: int = 1
    hop_seconds: float = 0.0

    def of_rank(self, rank: int) -> tuple[TableShard, ...]:
        """The shards that `rank` holds."""
        return tuple(shard for shard in self.shards if shard.rank == rank)

    def bytes_of_rank(self, rank: int) -> int:
        """Bytes of the weights and optimizer states of `rank`'s shards."""
        return sum(shard.num_bytes for shard in self.of_rank(rank))

    def seconds_of_rank(self, rank: int) -> float:
        """Expected seconds per step for `rank`'s shards."""
        return math.fsum(shard.seconds for shard in self.of_rank(rank))

    @property
    def makespan(self) -> float:
        """Seconds per step of the slowest rank."""
        return max(self.seconds_of_rank(rank) for rank in range(self.world_size))

    def makespan_at(self, costs: Costs, setting: StepSetting) -> float:
        """Seconds per step of the slowest rank under other costs than the plan was made with."""

        def seconds(shard: TableShard) -> float:
            lookups = shard.ids_per_bag, shard.num_features
            return shard_seconds(costs, setting, shard.num_embeddings, shard.num_columns, *lookups).total

        return max(math.fsum(map(seconds, self.of_rank(rank))) for rank in range(self.world_size))

    @property
    def lower_bound(self) -> float:
        """Seconds that no placement can beat: the mean over ranks, or the slowest shard that cannot be cut further.

        The mean is that of the shards as cut. Fewer shards would have a smaller mean, because every cut adds cost.
        """
        return max(math.fsum(shard.seconds for shard in self.shards) / self.world_size, self.unsliceable)

    def cuts(self) -> dict[str, int]:
        """Number of column shards of each table; 0 if it is replicated."""
        cuts = dict.fromkeys(self.replicated, 0)
        for shard in self.shards:
            cuts[shard.name] = cuts.get(shard.name, 0) + 1
        return cuts

    def as_dict(self) -> dict[str, Any]:
        """The contents of placement.json in the run folder."""
        return asdict(self) | {"makespan": self.makespan, "lower_bound": self.lower_bound}

    def as_table(self) -> str:
        """The placement as text: one line per rank, then the imbalance."""
        cuts = self.cuts()
        mean = math.fsum(shard.seconds for shard in self.shards) / self.world_size
        lines = ["rank  shards       MiB    ms/step  of mean  tables (with columns if a table is cut)"]
        for rank in range(self.world_size):
            own, seconds = self.of_rank(rank), self.seconds_of_rank(rank)
            names = [f"{s.name}[{s.first_column}:{s.last_column}]" if cuts[s.name] > 1 else s.name for s in own]
            lines.append(
                f"{rank:>4} {len(own):>7} {self.bytes_of_rank(rank) / 2**20:>9.2f} {1e3 * seconds:>10.3f} "
                f"{seconds / mean if mean else 0:>8.2f}  {', '.join(names) or '-'}"
            )
        if self.replicated:
            lines.append(f" all {len(self.replicated):>7}  replicated in the dense part: {', '.join(self.replicated)}")
        if self.hops == 2:
            lines.append("the all-to-all takes two hops: within each node, then one message to each other node")
        if self.lower_bound:
            lines.append(f"the slowest rank takes {self.makespan / self.lower_bound:.2f} times the lower bound")
        return "\n".join(lines)


@dataclass(frozen=True)
class PlacementOptions:
    """What the user or a checkpoint decides instead of the planner.

    max_column_shards: of one table; None means as many as its columns allow. by_hand: a table's ranks, one for each of
    its column shards, by table name. memory_bytes: per rank, for weights and optimizer states; None means no limit.
    cuts: fixed number of column shards by table name, as in a checkpoint. replicate_below_rows: tables with fewer rows
    are replicated if that is cheaper and there is memory. replicated: the tables to replicate; None means the planner
    decides.
    """

    max_column_shards: int | None = None
    by_hand: Mapping[str, Sequence[int]] = field(default_factory=dict)
    memory_bytes: int | None = None
    cuts: Mapping[str, int] = field(default_factory=dict)
    replicate_below_rows: int = 0
    replicated: Collection[str] | None = None


@dataclass(frozen=True)
class _Problem:
    """The tables to place, and the costs to place them by. lookups: of `lookups_of_tables`."""

    tables: Sequence[SparseFeature]
    dim: int
    setting: StepSetting
    costs: Costs
    lookups: Mapping[str, tuple[float, int]]
    options: PlacementOptions

    def cuttable(self, table: SparseFeature) -> CuttableTable:
        """The table's possible cuts into equal shards, or its fixed cut."""
        units, options = self.dim // _COLUMNS, self.options
        ranks = options.by_hand.get(table.name)
        fixed = len(ranks) if ranks else options.cuts.get(table.name)
        most = min(units, options.max_column_shards or units)
        counts = [fixed] if fixed else [count for count in range(1, most + 1) if units % count == 0]
        return CuttableTable(tuple(self._cut(table, count) for count in counts), tuple(ranks) if ranks else None)

    def _cut(self, table: SparseFeature, count: int) -> Cut:
        shape = table.num_embeddings, self.dim // count, *self.lookups[table.name]
        seconds = shard_seconds(self.costs, self.setting, *shape).total
        return Cut(count, seconds, self.setting.shard_bytes(*shape))

    def place(self, replicated: Collection[str]) -> Placement:
        """Place all tables except the replicated ones. Raises PlacementError if they do not fit beside these."""
        tables = [table for table in self.tables if table.name not in replicated]
        of_replicated = sum(
            replicated_bytes(table.num_embeddings, self.dim) for table in self.tables if table.name in replicated
        )
        limit, world = self.options.memory_bytes, self.setting.world_size
        room = None if limit is None else limit - of_replicated
        if room is not None and room < 0:
            raise PlacementError(
                f"the replicated tables need {of_replicated / _GIB:.3f} GiB on every rank, but a rank has only "
                f"{limit / _GIB:.3f} GiB. Use a smaller dhen.placement.replicate_below_rows, or a larger "
                "dhen.placement.memory_gib."
            )
        cuttable = [self.cuttable(table) for table in tables]
        if room is not None:
            _check_by_hand(tables, cuttable, room)
        packer = Packer(cuttable, world, room)
        try:
            packing = packer.pack()
        except NoRoomError as error:
            needs = _no_room(tables[error.item].name, cuttable, error.item, world, limit, of_replicated)
            raise PlacementError(needs, _SOLUTIONS) from None
        names = tuple(table.name for table in self.tables if table.name in replicated)
        return Placement(self._shards(tables, packing), world, names, packer.unsliceable)

    def _shards(self, tables: Sequence[SparseFeature], packing: Packing) -> tuple[TableShard, ...]:
        """The packing as shards, ordered by rank, then by table."""
        shards = []
        for number, (table, cut, ranks) in enumerate(zip(tables, packing.cuts, packing.ranks, strict=True)):
            rows, columns = table.num_embeddings, self.dim // cut.count
            cached_bytes = self.setting.cached_bytes(rows, columns)
            ids_per_bag, num_features = self.lookups[table.name]
            for piece, rank in enumerate(ranks):
                shard = TableShard(
                    table=number,
                    name=table.name,
                    num_embeddings=rows,
                    first_column=piece * columns,
                    last_column=(piece + 1) * columns,
                    rank=rank,
                    num_bytes=cut.num_bytes,
                    seconds=cut.seconds,
                    cached_bytes=cached_bytes,
                    ids_per_bag=ids_per_bag,
                    num_features=num_features,
                )
                shards.append(shard)
        return tuple(sorted(shards, key=lambda shard: (shard.rank, shard.table, shard.first_column)))


def lookups_of_tables(
    features: Sequence[SparseFeature], ids_per_bag: Mapping[str, float]
) -> dict[str, tuple[float, int]]:
    """By table: the mean number of ids in a bag, and the number of features, each with a bag per example."""
    return {
        table: (math.fsum(ids_per_bag.get(features[place].name, 1.0) for place in places) / len(places), len(places))
        for table, places in features_of_tables(features).items()
    }


def place_tables(
    features: Sequence[SparseFeature],
    embedding_dim: int,
    setting: StepSetting,
    costs: Costs,
    ids_per_bag: Mapping[str, float] | None = None,
    options: PlacementOptions | None = None,
) -> Placement:
    """Cut the tables of these features by columns and place the shards. Deterministic.

    Replicated tables have no shards, and `TableShard.table` does not count them. ids_per_bag: mean number of ids by
    feature, 1 if a feature is missing. Raises PlacementError if the tables do not fit or an option is impossible, and
    ValueError unless embedding_dim is a multiple of 4.
    """
    options = options or PlacementOptions()
    firsts = (features[places[0]] for places in features_of_tables(features).values())
    tables = [replace(feature, name=feature.table) for feature in firsts]
    _check(tables, embedding_dim, setting, options)
    lookups = lookups_of_tables(features, ids_per_bag or {})
    problem = _Problem(tables, embedding_dim, setting, costs, lookups, options)
    if options.replicated is not None:
        return problem.place(options.replicated)
    replicated = _worth_replicating(problem)
    try:
        return problem.place(replicated)
    except PlacementError:
        if not replicated:
            raise
        return problem.place(())  # replication is only for speed, and the other tables need the memory


def _worth_replicating(problem: _Problem) -> list[str]:
    """The small tables that cost a rank less when replicated than its share of them costs when sharded."""
    setting, options, chosen = problem.setting, problem.options, []
    for table in problem.tables:
        if table.num_embeddings < options.replicate_below_rows and table.name not in options.by_hand:
            shape = table.num_embeddings, problem.dim, *problem.lookups[table.name]
            sharded = shard_seconds(problem.costs, setting, *shape).total / setting.world_size
            if replicated_seconds(problem.costs, setting, *shape) < sharded:
                chosen.append(table.name)
    return chosen


def _check_by_hand(tables: Sequence[SparseFeature], cuttable: Sequence[CuttableTable], room: int) -> None:
    """Raise PlacementError if the user puts more on a rank than it can hold."""
    needs: dict[int, int] = {}
    names: dict[int, list[str]] = {}
    for table, of_table in zip(tables, cuttable, strict=True):
        for rank in of_table.ranks or ():
            needs[rank] = needs.get(rank, 0) + of_table.cuts[0].num_bytes
            names.setdefault(rank, []).append(table.name)
    for rank, need in sorted(needs.items()):
        if need > room:
            raise PlacementError(
                f"dhen.placement.tables puts {', '.join(dict.fromkeys(names[rank]))} on rank {rank}. With optimizer "
                f"state they need {need / _GIB:.3f} GiB, but the rank has {max(room, 0) / _GIB:.3f} GiB. List more "
                "ranks for a table, move a table to another rank, remove one from dhen.placement.tables, or set a "
                "larger dhen.placement.memory_gib."
            )


def _no_room(
    name: str, cuttable: Sequence[CuttableTable], table: int, world: int, limit: int, of_replicated: int
) -> str:
    cut = cuttable[table].cuts[-1]
    need = sum(whole.count * whole.num_bytes for whole in (of_table.cuts[0] for of_table in cuttable))
    beside = f" beside {of_replicated / _GIB:.3f} GiB of replicated tables" if of_replicated else ""
    return (
        f"table {name!r} does not fit: its smallest possible shard, 1 of {cut.count}, needs "
        f"{cut.num_bytes / _GIB:.3f} GiB. With optimizer state, all tables need {need / _GIB:.3f} GiB; {world} ranks "
        f"of {limit / _GIB:.3f} GiB have {world * limit / _GIB:.3f} GiB{beside}."
    )


def _check(
    tables: Sequence[SparseFeature], embedding_dim: int, setting: StepSetting, options: PlacementOptions
) -> None:
    if embedding_dim % _COLUMNS:
        below = embedding_dim // _COLUMNS * _COLUMNS
        raise ValueError(
            f"embedding_dim is {embedding_dim}, but FBGEMM needs a multiple of {_COLUMNS}. Use "
            f"{max(below, _COLUMNS)} or {below + _COLUMNS}."
        )
    names = [table.name for table in tables]
    units = embedding_dim // _COLUMNS
    for name, ranks in options.by_hand.items():
        if name not in names:
            raise PlacementError(f"dhen.placement.tables: {unknown_name('table', name, names)}")
        if name in (options.replicated or ()):
            raise PlacementError(
                f"dhen.placement.tables.{name}: the checkpoint has this table replicated in the dense part of every "
                "rank, with its optimizer state. Remove it from dhen.placement.tables, or start a new run."
            )
        last = setting.world_size - 1
        outside = [rank for rank in ranks if not 0 <= rank <= last]
        if outside:
            raise PlacementError(
                f"dhen.placement.tables.{name} names rank {outside[0]}, but this job has ranks 0 to {last}."
            )
        if not ranks or units % len(ranks):
            allowed = [n for n in range(1, units + 1) if units % n == 0]
            raise PlacementError(
                f"dhen.placement.tables.{name} names {len(ranks)} ranks, but {embedding_dim} columns can only be cut "
                f"into {', '.join(map(str, allowed))} equal shards, each a multiple of {_COLUMNS} columns wide. Name "
                "that many ranks."
            )
