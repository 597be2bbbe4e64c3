"""The placement that all ranks of a job share: rank 0 plans it, within the least memory of any rank (paper 3.1)."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dhen.config.dhen_section import DhenSection, TableDtype
from dhen.config.ds_config import DsConfig, DsConfigError
from dhen.model.configuration_dhen import DhenConfig
from dhen.runtime.collectives import rank_zeros
from dhen.runtime.machine_at_hand import host_bytes
from dhen.runtime.topology import Topology
from dhen.tables.placement.beyond_device import ALLOCATOR_SHARE, MEMORY_SHARE, beyond_device
from dhen.tables.placement.costs import Costs, CostsError, StepSetting, hop_seconds, read_costs, replicated_bytes
from dhen.tables.placement.plan import Placement, PlacementError, PlacementOptions, place_tables

_SCORING_BATCH = 4096


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank: its share of the host's memory, its GPU's (0 without one), and the dense part's peak there."""

    host_bytes: int
    device_bytes: int = 0
    dense_bytes: int = 0

    @property
    def room(self) -> float:
        """Bytes of the GPU that tables may use beside the dense part; infinite without a GPU."""
        left = max(0, int(ALLOCATOR_SHARE * self.device_bytes) - self.dense_bytes)
        return min(int(MEMORY_SHARE * self.device_bytes), left) if self.device_bytes else math.inf

    @property
    def limits(self) -> list[int]:
        """Bytes of a rank's tables, to try in order: on a GPU, first of the device alone, then with the host's."""
        on_host = int(MEMORY_SHARE * self.host_bytes)
        return [self.room, self.room + on_host] if self.device_bytes else [on_host]

    def __str__(self) -> str:
        room, device, dense = (f"{size / 2**30:.3f} GiB" for size in (self.room, self.device_bytes, self.dense_bytes))
        return f"Tables may use {room} of a GPU's {device}, because the dense part needs {dense}." if dense else ""


def setting_of(
    section: DhenSection, world_size: int, local_size: int, batch_size: int, group_size: int | None = None
) -> StepSetting:
    """The settings that the tables' costs depend on, from the dhen section.

    batch_size: examples per rank. group_size: ranks of a table group; None: all.
    """
    size = group_size or world_size
    return StepSetting(
        size,
        local_size,
        batch_size,
        num_replicas=world_size // size,
        sync_moves=section.exchanges_moves,
        sync_steps=section.table_sync_steps,
        sync_dtype=section.table_sync_dtype,
        sync_overlap=section.table_sync_overlap,
        optimizer=section.table_optimizer,
        table_dtype=section.table_dtype,
        wire_forward=section.all_to_all_dtype.forward,
        wire_backward=section.all_to_all_dtype.backward,
        table_rounding=section.table_rounding,
    )


def place_as_asked(
    config: DhenConfig,
    section: DhenSection,
    setting: StepSetting,
    costs: str,
    memory: RankMemory,
    ids_per_bag: Mapping[str, float] | None = None,
    **fixed: Any,
) -> Placement:
    """Place the tables as the dhen section asks. Raises PlacementError, CostsError.

    costs, memory: defaults for what the section leaves out. fixed: options that a checkpoint determines.
    """
    asked = section.placement
    options = PlacementOptions(
        max_column_shards=asked.max_column_shards,
        by_hand={name: [ranks] if isinstance(ranks, int) else ranks for name, ranks in asked.tables.items()},
        replicate_below_rows=asked.replicate_below_rows,
        **fixed,
    )
    needed_for = [setting, setting.of_replicated] if asked.replicate_below_rows else [setting]
    rates = read_costs(asked.costs or costs, *needed_for)
    limits = [int(asked.memory_gib * 2**30)] if asked.memory_gib else memory.limits
    for limit in limits:
        try:
            within = replace(options, memory_bytes=limit)
            placement = place_tables(config.lookups, config.embedding_dim, setting, rates, ids_per_bag, within)
            columns = sharded_columns(config, placement)
            hops = fastest_hops(section, setting, rates, columns)
            waits = hop_seconds(rates, setting, columns, hops)
            return replace(placement, device_bytes=memory.room, hops=hops, hop_seconds=waits)
        except PlacementError as error:
            failure = error
    raise PlacementError(f"{failure.needs} {memory}".rstrip(), failure.solutions)


def sharded_columns(config: DhenConfig, placement: Placement) -> int:
    """Number of values that an example's lookups in the sharded tables have together."""
    return config.embedding_dim * sum(feature.table not in placement.replicated for feature in config.lookups)


def fastest_hops(section: DhenSection, setting: StepSetting, costs: Costs, columns: int) -> int:
    """The hops of the all-to-all, as asked or by the costs; one where the tables' ranks allow no other.

    columns: of all sharded tables.
    """
    if section.all_to_all_hops == 1 or not setting.can_hop:
        return 1
    if section.all_to_all_hops == 2:
        return 2
    return min((1, 2), key=lambda hops: hop_seconds(costs, setting, columns, hops))


def place_fastest(
    place: Callable[[StepSetting], Placement], settings: Sequence[StepSetting]
) -> tuple[StepSetting, Placement]:
    """The setting whose slowest rank takes the least time. Raises PlacementError if the tables fit in none.

    Replicas of tables that need the host's memory are not supported.
    """
    found, failure = [], None
    for setting in settings:
        try:
            placed = place(setting)
            ranks = map(placed.of_rank, range(placed.world_size))
            if setting.num_replicas > 1 and any(beyond_device(own, placed.device_bytes) for own in ranks):
                most = max(map(placed.bytes_of_rank, range(placed.world_size))) / 2**30
                needs = (
                    f"a table group of {placed.world_size} ranks has too little GPU memory for all tables: "
                    f"{most:.3f} GiB on the fullest rank, of which {placed.device_bytes / 2**30:.3f} GiB fit."
                )
                raise PlacementError(needs, 'dhen.table_group "world", or more ranks per group.')
            found.append((setting, placed))
        except PlacementError as error:
            failure = error
    if failure and not found:
        raise failure
    return min(found, key=lambda of: of[1].makespan + of[1].hop_seconds)


def place_for_training(
    config: DhenConfig,
    topology: Topology,
    ds_config: DsConfig,
    shard_size: int,
    ids_per_bag: Mapping[str, float] | None = None,
    table_cuts: Mapping[str, int] | None = None,
    replicated: Collection[str] | None = None,
    dense_bytes: Callable[[], int] | None = None,
    group_sizes: Sequence[int] = (),
) -> Placement:
    """Place the tables for training as the ds_config asks.

    shard_size: of the dense part. ids_per_bag: mean number of ids per sparse feature, for the cost of its table; 1 by
    default. table_cuts, replicated: the number of column shards per table and the replicated tables, if a checkpoint
    fixes them. dense_bytes: predicts, on rank 0, what the dense part needs of a GPU. group_sizes: ranks of a table
    group, of which the fastest is taken; by default all ranks.

    Communicates; all ranks call it. Raises DsConfigError on all of them.
    """
    section, batch_size = ds_config.dhen, ds_config.deepspeed["train_micro_batch_size_per_gpu"]
    options: dict[str, Any] = {"zero_stage": ds_config.zero_stage, "shard_size": shard_size}
    if recipe := ds_config.recipe:
        all_rows = section.table_optimizer == "adam" and recipe.whole_table_l2 > 0
        options |= {"all_rows": all_rows, "averages": recipe.ema_decay > 0}
    job = section, topology.world_size, topology.local_size, batch_size
    sizes = group_sizes or [topology.world_size]
    if len(sizes) > 1 and recipe and recipe.whole_table_l2:  # replicas exchange only rows that were used
        sizes = [topology.world_size]
    settings = [replace(setting_of(*job, size), **options) for size in sizes]
    memory = _memory(topology)

    def place() -> Placement:
        beside = replace(memory, dense_bytes=dense_bytes() if dense_bytes and memory.device_bytes else 0)
        return place_fastest(partial(_place_in, beside), settings)[1]

    def _place_in(memory: RankMemory, setting: StepSetting) -> Placement:
        return place_as_asked(
            config,
            section,
            setting,
            costs=_costs_name(topology),
            memory=memory,
            ids_per_bag=ids_per_bag,
            cuts=table_cuts or {},
            replicated=replicated,
        )

    try:
        return rank_zeros(topology, place)
    except (PlacementError, CostsError) as error:
        raise DsConfigError(f"{ds_config.path}: {error}") from error


def place_for_scoring(config: DhenConfig, topology: Topology) -> Placement:
    """Place tables that are only looked up. Communicates; all ranks call it. Raises PlacementError."""
    section = DhenSection(table_optimizer="sgd", table_dtype=scored_dtype(config))
    setting = setting_of(section, topology.world_size, topology.local_size, _SCORING_BATCH)
    memory = _memory(topology)

    def place() -> Placement:
        try:
            replicated = replicated_in_scoring(config)
            costs = _costs_name(topology)
            return place_as_asked(config, section, setting, costs=costs, memory=memory, replicated=replicated)
        except PlacementError as error:
            solutions = "more ranks, or ranks with more memory. Scoring keeps the dtype of the exported tables."
            raise PlacementError(error.needs, solutions) from None

    return rank_zeros(topology, place)


def scored_dtype(config: DhenConfig) -> TableDtype:
    """The dtype of the sharded tables of an exported model."""
    return "fp16" if any(table.dtype == "float16" for table in config.tables) else "fp32"


def replicated_in_scoring(config: DhenConfig) -> list[str]:
    """The fp32 tables beside fp16 ones: training replicated them, and all sharded tables have one dtype."""
    is_fp16 = scored_dtype(config) == "fp16"
    return [table.name for table in config.tables if is_fp16 and table.dtype == "float32"]


def table_memory(config: DhenConfig, placement: Placement) -> tuple[int, int]:
    """Bytes of the tables on the fullest rank: on its device, including replicated tables, and in host memory.

    If ranks compute on the host, everything counts as on the device.
    """
    on_device, on_host = 0, 0
    for rank in range(placement.world_size):
        shards = placement.of_rank(rank)
        left = beyond_device(shards, placement.device_bytes)
        sizes = [shard.cached_bytes if index in left else shard.num_bytes for index, shard in enumerate(shards)]
        on_device = max(on_device, sum(sizes))
        on_host = max(on_host, sum(shards[index].num_bytes for index in left))
    rows = sum(table.num_embeddings for table in config.tables if table.name in placement.replicated)
    return on_device + replicated_bytes(rows, config.embedding_dim), on_host


def _costs_name(topology: Topology) -> str:
    return "gpu" if topology.device.type == "cuda" else "cpu"


def _memory(topology: Topology) -> RankMemory:
    """The least memory of any rank. Communicates over all ranks."""
    on_gpu, on_host = topology.device.type == "cuda", host_bytes() // topology.local_size
    on_device = torch.cuda.get_device_properties(topology.device).total_memory if on_gpu else 0
    least = torch.tensor([on_host, on_device], dtype=torch.int64, device=topology.device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=topology.world)
    return RankMemory(*least.tolist())
