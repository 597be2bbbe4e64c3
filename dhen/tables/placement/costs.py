"""What a table shard costs its rank, in seconds per step (paper 3.1: the empirical cost function). Pure Python.

The cost has three parts: the lookup, the optimizer's update in the backward, and the all-to-all of ids, pooled
embeddings and gradients. The first two are linear in ids and bytes, with rates that tools/calibrate_costs.py measures
on a machine. The third is bytes divided by link speed, separately for links inside a node and between nodes. What a
rank's exchanges and messages cost beyond their bytes (`hop_seconds`) is the same wherever the shards are, so it only
decides on table groups and on the number of hops.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

_STRICT = ConfigDict(extra="forbid")
_FOLDER = Path(__file__).parent / "costs"
_ID_BYTES, _OUTPUT_BYTES = 8, 4
CACHED_SHARE = 0.2
"""Share of rows that a GPU caches of a table in host memory; FBGEMM's default."""
_CACHED_ROW_BYTES, _CACHE_SLOT_BYTES = 4, 16
"""Bookkeeping of FBGEMM's cache on the GPU: bytes per row of the table, and bytes per cached row."""
_ROW_NUMBER_BYTES = 4
_USES_BYTES = 4
"""Bytes per row of the count of its uses (dhen/tables/row_uses.py)."""
_AVERAGE_BYTES = 8
"""Bytes per row that say when its average was brought up to date (dhen/tables/averaged_tables.py)."""
WEIGHT_BYTES = {"fp32": 4, "fp16": 2}
WIRE_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0}


class CostsError(ValueError):
    """A cost file cannot be used. The message names the file and the key."""


@dataclass(frozen=True)
class Work:
    """The work of a lookup or an update.

    ids: number of ids. rows: number of distinct rows among them. row_bytes: memory traffic of these rows and their
    states. other_bytes: traffic of rows that are already in the cache, of embeddings and of their gradients.
    """

    ids: float
    rows: float
    row_bytes: float
    other_bytes: float


@checked_dataclass(frozen=True, config=_STRICT)
class WorkRate:
    """Seconds of a shard's lookup or update: a fixed cost, plus a cost per unit of its `Work`."""

    seconds_per_shard: float
    seconds_per_id: float
    seconds_per_row: float
    seconds_per_row_byte: float
    seconds_per_other_byte: float

    def seconds(self, work: Work) -> float:
        """Seconds that the work takes."""
        return (
            self.seconds_per_shard
            + self.seconds_per_id * work.ids
            + self.seconds_per_row * work.rows
            + self.seconds_per_row_byte * work.row_bytes
            + self.seconds_per_other_byte * work.other_bytes
        )


@checked_dataclass(frozen=True, config=_STRICT)
class Costs:
    """The rates of one kind of machine. Bytes per second are per rank, in one direction.

    machine, source: what was measured, and how. lookup: rates by table dtype. update: by `StepSetting.update_key`.
    seconds_per_exchange, seconds_per_message: an all-to-all of small messages takes the first, and the second for each
    other rank. Files from before these were measured have 0, so their hops and messages count as free.
    """

    machine: str
    source: str
    lookup: dict[str, WorkRate]
    update: dict[str, WorkRate]
    intra_node_bytes_per_second: float
    inter_node_bytes_per_second: float
    seconds_per_exchange: float = 0.0
    seconds_per_message: float = 0.0

    def save(self, path: Path) -> None:
        """Write the rates as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_costs(name: str, *needed_for: "StepSetting") -> Costs:
    """Read the built-in costs called `name` ("cpu", "gpu"), or the file of that name.

    Raises CostsError, also if the file lacks a rate that one of the settings needs.
    """
    shipped = {path.stem: path for path in _FOLDER.glob("*.json")}
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise CostsError(
            f"{name}: no such cost file. Use {', '.join(sorted(shipped))}, or create a file with "
            "`python tools/calibrate_costs.py`."
        )
    try:
        costs = TypeAdapter(Costs).validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CostsError(
            f"{path}: {key or 'the file'}: {first['msg']}. Recreate the file with `python tools/calibrate_costs.py`."
        ) from error
    for setting in needed_for:
        for part, rates, key in (
            ("lookup", costs.lookup, setting.table_dtype),
            ("update", costs.update, setting.update_key),
        ):
            if key not in rates:
                raise CostsError(
                    f"{path}: {part} has no {key!r}, which this run's tables need. It has only "
                    f"{', '.join(map(repr, sorted(rates))) or 'no entries'}. Recreate the file with "
                    "`python tools/calibrate_costs.py`, or change dhen.table_dtype, table_optimizer or table_rounding."
                )
    return costs


@dataclass(frozen=True)
class StepSetting:
    """The settings of a job that the tables' costs depend on.

    batch_size: examples per rank. wire_forward, wire_backward: dtypes of the all-to-all, keys of WIRE_BYTES.
    table_rounding: rounding of updates to fp16 tables. zero_stage, shard_size: ZeRO stage and number of ranks that ZeRO
    shards over (None: all), for the dense part, which includes the replicated tables. all_rows: an update changes all
    rows. averages: there is a moving average of the tables.

    With table groups, world_size is the number of ranks in a group, and num_replicas the number of groups. They
    exchange gradients of rows, or if sync_moves is set, moves of rows after sync_steps steps, in sync_dtype. With
    sync_overlap, they travel during the next step, whose moves are kept meanwhile; the exchange's time counts in full.
    """

    world_size: int
    local_size: int
    batch_size: int
    optimizer: str = "rowwise_adagrad"
    table_dtype: str = "fp32"
    wire_forward: str = "fp32"
    wire_backward: str = "fp32"
    table_rounding: str = "stochastic"
    zero_stage: int = 0
    shard_size: int | None = None
    all_rows: bool = False
    averages: bool = False
    num_replicas: int = 1
    sync_moves: bool = False
    sync_steps: int = 1
    sync_dtype: str = "fp32"
    sync_overlap: bool = False

    @property
    def global_batch(self) -> int:
        """Examples on all ranks of the table group."""
        return self.batch_size * self.world_size

    @property
    def can_hop(self) -> bool:
        """Whether an all-to-all within the table group can take two hops: over several nodes of several ranks."""
        return 1 < self.local_size < self.world_size and self.world_size % self.local_size == 0

    @property
    def update_key(self) -> str:
        """Key of `Costs.update`: "<optimizer>/<dtype>", plus " rounded" if fp16 is rounded stochastically.

        Adam has the rates of Adagrad. It moves more bytes per row, which `row_bytes` counts.
        """
        rounded = self.table_dtype == "fp16" and self.table_rounding == "stochastic"
        optimizer = "adagrad" if self.optimizer == "adam" else self.optimizer
        return f"{optimizer}/{self.table_dtype}{' rounded' if rounded else ''}"

    @property
    def of_replicated(self) -> "StepSetting":
        """The setting of one rank's own lookups in replicated tables. Their states belong to the dense optimizer."""
        one = {"world_size": 1, "local_size": 1, "num_replicas": 1}
        return replace(self, **one, table_dtype="fp32", optimizer="adagrad")

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row's weights and optimizer state."""
        states = {"rowwise_adagrad": 4, "adagrad": 4 * columns, "sgd": 0, "adam": 8 * columns}
        return columns * WEIGHT_BYTES[self.table_dtype] + states[self.optimizer]

    def shard_bytes(self, rows: int, columns: int, ids_per_bag: float = 1.0, num_features: int = 1) -> int:
        """Bytes of a shard: weights, optimizer state, average, counts of uses, and the exchange between replicas."""
        average = columns * WEIGHT_BYTES["fp32"] + _AVERAGE_BYTES if self.averages else 0
        exchanged = 0
        if self.num_replicas > 1:  # own values, old and new ones, a message, and those of all replicas with their sum
            used = rows_touched(self.sync_steps * self.global_batch * num_features * ids_per_bag, rows)
            of_row = replace(self, sync_dtype="fp32").moved_row_bytes(columns)
            exchanged = rows + int(used * (5 + 2 * self.sync_overlap + 2 * self.num_replicas) * of_row)
        return rows * (self.row_bytes(columns) + average + _USES_BYTES) + exchanged

    def moved_row_bytes(self, columns: int) -> float:
        """Bytes that a replica sends about a row: number, uses and gradient, or instead of this moves of weights and
        state."""
        states = self.row_bytes(columns) - columns * WEIGHT_BYTES[self.table_dtype] if self.sync_moves else 0
        return _ROW_NUMBER_BYTES + _USES_BYTES + columns * WIRE_BYTES[self.sync_dtype] + states

    def cached_bytes(self, rows: int, columns: int) -> int:
        """Bytes that stay on the GPU when the shard is in host memory: cache, row-wise optimizer state, and uses."""
        state = 4 if self.optimizer == "rowwise_adagrad" else 0
        slot = _CACHE_SLOT_BYTES + columns * WEIGHT_BYTES[self.table_dtype]
        return int(rows * (state + _USES_BYTES + _CACHED_ROW_BYTES + CACHED_SHARE * slot))


@dataclass(frozen=True)
class ShardSeconds:
    """Seconds per step that a shard costs its rank."""

    lookup: float
    update: float
    exchange: float

    @property
    def total(self) -> float:
        """Sum of the three."""
        return self.lookup + self.update + self.exchange


def rows_touched(ids: float, rows: int) -> float:
    """Expected number of distinct rows among `ids` ids drawn uniformly from `rows`. Real, skewed ids touch fewer."""
    return rows * -math.expm1(ids * math.log1p(-1.0 / rows)) if rows > 1 else 1.0


def lookup_work(ids: float, bags: int, rows: int, columns: int, setting: StepSetting) -> Work:
    """The work of a lookup: reads one row per id, the first time from memory, and writes one embedding per bag."""
    touched, row_bytes = rows_touched(ids, rows), columns * WEIGHT_BYTES[setting.table_dtype]
    return Work(ids, touched, touched * row_bytes, (ids - touched) * row_bytes + bags * columns * _OUTPUT_BYTES)


def update_work(ids: float, bags: int, rows: int, columns: int, setting: StepSetting) -> Work:
    """The work of an update: reads one bag's gradient per id, and reads and writes each distinct row and its state."""
    touched = rows if setting.all_rows else rows_touched(ids, rows)
    gradient_bytes = max(ids, bags) * columns * _OUTPUT_BYTES
    return Work(ids, touched, 2 * touched * setting.row_bytes(columns), gradient_bytes)


def shard_seconds(
    costs: Costs, setting: StepSetting, rows: int, columns: int, ids_per_bag: float, num_features: int = 1
) -> ShardSeconds:
    """Seconds per step of a shard of `rows` x `columns` whose bags hold `ids_per_bag` ids on average.

    num_features: that look it up, each with a bag per example.
    """
    bags = setting.global_batch * num_features
    ids = bags * ids_per_bag
    # The bags of all ranks come here; this rank's own bags do not travel.
    world, local = setting.world_size, min(setting.local_size, setting.world_size)
    seconds_per_byte = (local - 1) / world / costs.intra_node_bytes_per_second
    seconds_per_byte += (world - local) / world / costs.inter_node_bytes_per_second
    wire = WIRE_BYTES[setting.wire_forward] + WIRE_BYTES[setting.wire_backward]
    moved = rows_touched(ids * setting.sync_steps, rows) / setting.sync_steps * (setting.num_replicas - 1)
    is_one_node = setting.world_size * setting.num_replicas <= setting.local_size
    link = costs.intra_node_bytes_per_second if is_one_node else costs.inter_node_bytes_per_second
    between_replicas = moved * setting.moved_row_bytes(columns) / link
    return ShardSeconds(
        lookup=costs.lookup[setting.table_dtype].seconds(lookup_work(ids, bags, rows, columns, setting)),
        update=costs.update[setting.update_key].seconds(update_work(ids, bags, rows, columns, setting)),
        exchange=seconds_per_byte * (bags * columns * wire + ids * _ID_BYTES) + between_replicas,
    )


def hop_seconds(costs: Costs, setting: StepSetting, columns: int, hops: int) -> float:
    """Seconds per step that the exchanges take beyond the bytes that `shard_seconds` counts: those of embeddings and
    gradients, and with table groups two between replicas.

    Two hops have fewer messages, but twice as many exchanges; most bytes for other nodes first travel to a neighbor,
    and all are copied twice. columns: of all tables together.
    """
    if not columns:
        return 0.0

    def seconds(exchanges: int, messages: int) -> float:
        return exchanges * costs.seconds_per_exchange + messages * costs.seconds_per_message

    world, local, replicas = setting.world_size, setting.local_size, setting.num_replicas
    between_replicas = seconds(2, 2 * (replicas - 1)) / setting.sync_steps if replicas > 1 else 0.0
    if hops == 1:
        return between_replicas + (seconds(2, 2 * (world - 1)) if world > 1 else 0.0)
    nodes = world // local
    wire = WIRE_BYTES[setting.wire_forward] + WIRE_BYTES[setting.wire_backward]
    own = setting.batch_size * columns * wire
    passed_on = own * (nodes - 1) / nodes * (local - 1) / local / costs.intra_node_bytes_per_second
    copies = 2 * 2 * own * costs.lookup[setting.table_dtype].seconds_per_other_byte
    return between_replicas + seconds(4, 2 * (local - 1 + nodes - 1)) + passed_on + copies


def replicated_seconds(
    costs: Costs, setting: StepSetting, rows: int, columns: int, ids_per_bag: float, num_features: int = 1
) -> float:
    """Seconds per step of a replicated table: a rank looks up its own bags, and the dense part reduces the gradients.

    The dense optimizer also updates all rows, at the rate of rows that are not in the cache.
    """
    own = shard_seconds(costs, setting.of_replicated, rows, columns, ids_per_bag, num_features)
    weight_bytes = rows * columns * WEIGHT_BYTES["fp32"]
    states = 8 * weight_bytes * costs.update["adagrad/fp32"].seconds_per_row_byte  # weight, gradient, Adam's two
    return own.lookup + own.update + states + _dense_traffic_seconds(costs, setting, weight_bytes)


def _dense_traffic_seconds(costs: Costs, setting: StepSetting, weight_bytes: int) -> float:
    """Seconds to reduce and gather a dense weight in rings over the ranks that ZeRO shards over, and with hybrid
    sharding to all-reduce its shard over the replicas. An all-reduce takes two passes. Stages 1 and 2 add an all-gather
    of the weights; stage 3 takes one pass to reduce-scatter and two to gather."""
    world = setting.world_size * setting.num_replicas
    shard = setting.shard_size or world

    def rate(ranks: int) -> float:
        within = ranks <= setting.local_size
        return costs.intra_node_bytes_per_second if within else costs.inter_node_bytes_per_second

    passes = 3 if setting.zero_stage else 2
    inside = passes * (shard - 1) / shard * weight_bytes / rate(shard)
    return inside + 2 * (world - shard) / world * weight_bytes / shard / rate(world)


def replicated_bytes(rows: int, columns: int) -> int:
    """Bytes of a replicated table on each rank: fp32 weight, gradient and Adam's two states. An upper bound, because
    ZeRO shards some of it."""
    return 4 * rows * columns * WEIGHT_BYTES["fp32"]
