"""What a table shard costs a rank, in seconds a step (paper 3.1: the empirical cost function). Pure Python.

Three parts: the lookup, the optimizer's update in the backward, and the all-to-all that brings ids and gradients to the
shard and pooled embeddings away. The first two are linear in ids and bytes, with rates that tools/calibrate_costs.py
measures on a machine; the third is bytes over the links, those inside a node and those between nodes apart.
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
"""Of the rows of a table in the host's memory, how many a GPU caches: FBGEMM's default."""
_CACHED_ROW_BYTES, _CACHE_SLOT_BYTES = 4, 16
"""What FBGEMM's cache keeps on the GPU of each row of the table, and of each that is cached, beside its weights."""
WEIGHT_BYTES = {"fp32": 4, "fp16": 2}
WIRE_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0}


class CostsError(ValueError):
    """A file of costs that can't be used; the message names the file and the key."""


@dataclass(frozen=True)
class Work:
    """What a lookup or an update does.

    ids: that are looked up. rows: different ones among them. row_bytes: of those rows and their states, from and to
    memory. other_bytes: of rows that are in the cache by then, of embeddings and of their gradients.
    """

    ids: float
    rows: float
    row_bytes: float
    other_bytes: float


@checked_dataclass(frozen=True, config=_STRICT)
class WorkRate:
    """Seconds of a shard's lookup or update: so much by itself, and so much for each unit of its `Work`."""

    seconds_per_shard: float
    seconds_per_id: float
    seconds_per_row: float
    seconds_per_row_byte: float
    seconds_per_other_byte: float

    def seconds(self, work: Work) -> float:
        """What the work takes."""
        return (
            self.seconds_per_shard
            + self.seconds_per_id * work.ids
            + self.seconds_per_row * work.rows
            + self.seconds_per_row_byte * work.row_bytes
            + self.seconds_per_other_byte * work.other_bytes
        )


@checked_dataclass(frozen=True, config=_STRICT)
class Costs:
    """The rates of one kind of machine. Bytes a second are a rank's, in one direction.

    machine, source: what was measured, and how. lookup: by dtype of the table. update: by `StepSetting.update_key`.
    """

    machine: str
    source: str
    lookup: dict[str, WorkRate]
    update: dict[str, WorkRate]
    intra_node_bytes_per_second: float
    inter_node_bytes_per_second: float

    def save(self, path: Path) -> None:
        """Write them as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_costs(name: str, *needed_for: "StepSetting") -> Costs:
    """The costs that ship under `name` ("cpu", "gpu"), or those of a file.

    Raises CostsError, also where the file lacks a rate that one of the settings needs.
    """
    shipped = {path.stem: path for path in _FOLDER.glob("*.json")}
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise CostsError(
            f"{name}: no such file of costs. Use {', '.join(sorted(shipped))}, or make one with "
            "`python tools/calibrate_costs.py`."
        )
    try:
        costs = TypeAdapter(Costs).validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CostsError(
            f"{path}: {key or 'the file'}: {first['msg']}. Write it anew with `python tools/calibrate_costs.py`."
        ) from error
    for setting in needed_for:
        for part, rates, key in (
            ("lookup", costs.lookup, setting.table_dtype),
            ("update", costs.update, setting.update_key),
        ):
            if key not in rates:
                raise CostsError(
                    f"{path}: {part} has no {key!r}, which this run's tables need, only "
                    f"{', '.join(map(repr, sorted(rates))) or 'nothing'}. Write it anew with "
                    "`python tools/calibrate_costs.py`, or take other tables."
                )
    return costs


@dataclass(frozen=True)
class StepSetting:
    """What a step asks of the tables.

    batch_size: examples a rank. wire_forward, wire_backward: dtypes of the all-to-all, keys of WIRE_BYTES.
    table_rounding: of fp16 tables' updates. zero_stage, shard_size: of the dense part, which replicated tables belong
    to; the ranks that ZeRO shards over, None for all.
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

    @property
    def global_batch(self) -> int:
        """Examples of all ranks."""
        return self.batch_size * self.world_size

    @property
    def update_key(self) -> str:
        """Of `Costs.update`: "<optimizer>/<dtype>", and " rounded" where fp16 is rounded stochastically."""
        rounded = self.table_dtype == "fp16" and self.table_rounding == "stochastic"
        return f"{self.optimizer}/{self.table_dtype}{' rounded' if rounded else ''}"

    @property
    def of_replicated(self) -> "StepSetting":
        """The setting of one rank's own lookups in replicated tables, whose states are of the dense optimizer."""
        return replace(self, world_size=1, local_size=1, table_dtype="fp32", optimizer="adagrad")

    def shard_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a shard's weights and of its optimizer's state."""
        state = {"rowwise_adagrad": 4, "adagrad": 4 * columns, "sgd": 0}[self.optimizer]
        return rows * (columns * WEIGHT_BYTES[self.table_dtype] + state)

    def cached_bytes(self, rows: int, columns: int) -> int:
        """Of these, what stays on a GPU when the shard is in the host's memory: the cache, and row-wise states."""
        state = 4 if self.optimizer == "rowwise_adagrad" else 0
        slot = _CACHE_SLOT_BYTES + columns * WEIGHT_BYTES[self.table_dtype]
        return int(rows * (state + _CACHED_ROW_BYTES + CACHED_SHARE * slot))


@dataclass(frozen=True)
class ShardSeconds:
    """What a shard costs its rank in a step."""

    lookup: float
    update: float
    exchange: float

    @property
    def total(self) -> float:
        """All three."""
        return self.lookup + self.update + self.exchange


def rows_touched(ids: float, rows: int) -> float:
    """Expected number of different rows among `ids` uniform ids of `rows`; real, skewed ids touch fewer."""
    return rows * -math.expm1(ids * math.log1p(-1.0 / rows)) if rows > 1 else 1.0


def lookup_work(ids: float, bags: int, rows: int, columns: int, setting: StepSetting) -> Work:
    """A row is read for each id, the first time from memory; an embedding is written for each bag."""
    touched, row_bytes = rows_touched(ids, rows), columns * WEIGHT_BYTES[setting.table_dtype]
    return Work(ids, touched, touched * row_bytes, (ids - touched) * row_bytes + bags * columns * _OUTPUT_BYTES)


def update_work(ids: float, bags: int, rows: int, columns: int, setting: StepSetting) -> Work:
    """A bag's gradient is read for each id; each different row and its state are read and written."""
    touched = rows_touched(ids, rows)
    gradient_bytes = max(ids, bags) * columns * _OUTPUT_BYTES
    return Work(ids, touched, 2 * touched * setting.shard_bytes(1, columns), gradient_bytes)


def shard_seconds(costs: Costs, setting: StepSetting, rows: int, columns: int, ids_per_bag: float) -> ShardSeconds:
    """Seconds a step of a shard of `rows` x `columns`, whose bags hold `ids_per_bag` ids on average."""
    bags = setting.global_batch
    ids = bags * ids_per_bag
    # All ranks' bags come here; a rank's own don't travel.
    world, local = setting.world_size, setting.local_size
    seconds_per_byte = (local - 1) / world / costs.intra_node_bytes_per_second
    seconds_per_byte += (world - local) / world / costs.inter_node_bytes_per_second
    wire = WIRE_BYTES[setting.wire_forward] + WIRE_BYTES[setting.wire_backward]
    return ShardSeconds(
        lookup=costs.lookup[setting.table_dtype].seconds(lookup_work(ids, bags, rows, columns, setting)),
        update=costs.update[setting.update_key].seconds(update_work(ids, bags, rows, columns, setting)),
        exchange=seconds_per_byte * (bags * columns * wire + ids * _ID_BYTES),
    )


def replicated_seconds(costs: Costs, setting: StepSetting, rows: int, columns: int, ids_per_bag: float) -> float:
    """Seconds a step of a table that every rank has: its own bags looked up, all gradients reduced by the dense part.

    Beside them the dense part's optimizer goes over all rows, at the rate of what isn't in the cache.
    """
    own = shard_seconds(costs, setting.of_replicated, rows, columns, ids_per_bag)
    weight_bytes = rows * columns * WEIGHT_BYTES["fp32"]
    states = 8 * weight_bytes * costs.update["adagrad/fp32"].seconds_per_row_byte  # weight, gradient, Adam's two
    return own.lookup + own.update + states + _dense_traffic_seconds(costs, setting, weight_bytes)


def _dense_traffic_seconds(costs: Costs, setting: StepSetting, weight_bytes: int) -> float:
    """Of a weight of the dense part, in rings over the ranks that ZeRO shards over; then, in hybrid shards, the shard
    all-reduced over the replicas. An all-reduce is two passes; stages 1 and 2 gather the weights after it, stage 3
    reduces and scatters in one pass and gathers twice."""
    world, shard = setting.world_size, setting.shard_size or setting.world_size

    def rate(ranks: int) -> float:
        within = ranks <= setting.local_size
        return costs.intra_node_bytes_per_second if within else costs.inter_node_bytes_per_second

    passes = 3 if setting.zero_stage else 2
    inside = passes * (shard - 1) / shard * weight_bytes / rate(shard)
    return inside + 2 * (world - shard) / world * weight_bytes / shard / rate(world)


def replicated_bytes(rows: int, columns: int) -> int:
    """Of a replicated table on every rank: fp32 weight, gradient, Adam's two. ZeRO shards some of it; this is most."""
    return 4 * rows * columns * WEIGHT_BYTES["fp32"]
