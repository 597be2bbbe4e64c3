"""Parallelizes the model: the one place where model, placement, topology and ds_config meet.

`lay_out` places the embedding tables on the ranks and allocates nothing. `parallelize` then works in this order; each
step needs the one before:
1. Build the tables on FBGEMM. DeepSpeed never gets them, because its engine broadcasts every parameter and would
   overwrite the ranks' different shards.
2. Build the dense part from the same seed on all ranks, under zero.Init if ZeRO stage 3 shards its parameters.
3. If there is a trained model, copy its weights over the initial ones.
4. Freeze parts of it.
5. Wrap layers for activation checkpointing and offload, as many as the ds_config says.
6. Wrap the dense part in DeepSpeed's engine, over all ranks or, for hybrid shards, by hsdp.py.
"""

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import DsConfig, DsConfigError
from dhen.dense.activation_checkpointing import checkpoint_layers
from dhen.dense.activation_offload import offload_layers
from dhen.dense.compiled_layers import compile_layers
from dhen.dense.hsdp import sharded_over
from dhen.dense.lean_stage3 import LeanStage3
from dhen.dense.replica_reduction import ReplicaReduction
from dhen.dense.trained_parts import freeze, groups_of
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.runtime.topology import ShardGroups, Topology
from dhen.tables.placement.agreed import place_for_scoring, place_for_training, scored_dtype
from dhen.tables.placement.plan import Placement
from dhen.tables.pooled_exchange import Wires
from dhen.tables.sharded_tables import ShardedTables
from dhen.tables.updated_tables import TableUpdate
from dhen.tables.wire import Wire
from dhen.training.parallel_model import ParallelDhen, ScoringDhen

logger = logging.getLogger(__name__)
_ADAGRAD_EPSILON, _ADAM_EPSILON = 1e-3, 1e-8
_WIRE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Layout:
    """A model that is not built yet. ds_config: with sizes that follow from the model. groups: of hybrid sharding.

    table_groups: those that each hold all tables; None if there is one group.
    """

    config: DhenConfig
    topology: Topology
    ds_config: DsConfig
    placement: Placement
    groups: ShardGroups | None
    shard_size: int
    table_groups: ShardGroups | None = None


def lay_out(
    config: DhenConfig, topology: Topology, ds_config: DsConfig, predict: Callable | None = None, **known: Any
) -> Layout:
    """Place the model of `config` on all ranks, as `ds_config` says. Communicates; all ranks call it.

    predict: on rank 0, the memory use of a layout, for what the tables may use of a GPU beside the dense part; it may
    return None. known: more arguments of `place_for_training`.
    """
    groups = _shard_groups(topology, ds_config)
    size = topology.world_size if groups is None else groups.shard_size
    known["group_sizes"] = _table_group_sizes(topology, ds_config)
    if (hops := ds_config.dhen.all_to_all_hops) != 1 and not topology.has_equal_nodes():
        if hops == 2:
            raise DsConfigError(
                f"{ds_config.path}: dhen.all_to_all_hops is 2, but the nodes have unequal numbers of ranks, or the "
                "launcher does not number the ranks node by node. Start as many ranks on every node, or set it to 1."
            )
        ds_config = replace(ds_config, dhen=ds_config.dhen.model_copy(update={"all_to_all_hops": 1}))

    def with_tables(placed: Placement) -> Layout:
        return Layout(config, topology, ds_config.sized(weights_of(config, placed.replicated)), placed, groups, size)

    if predict is not None:
        known["dense_bytes"] = lambda: getattr(predict(with_tables(Placement((), topology.world_size))), "peak", 0)
    layout = with_tables(place_for_training(config, topology, ds_config, size, **known))
    if hops == 2 and layout.placement.hops == 1 and layout.placement.shards:
        logger.info("dhen.all_to_all_hops 2: the tables' ranks are on one node, or one on each, so there is one hop")
    if (of_tables := layout.placement.world_size) == topology.world_size:
        if (group := ds_config.dhen.table_group) != "world":
            logger.info("dhen.table_group %r: one group of all ranks, so table_sync_… has no effect", group)
        return layout
    late = ds_config.dhen.table_sync_steps - 1 + ds_config.dhen.table_sync_overlap
    misses = f"miss what the others did in up to {late} steps" if late else "are those of one group, to rounding"
    logger.info(
        "%d groups of %d ranks hold all tables; the rows that one reads %s",
        topology.world_size // of_tables,
        of_tables,
        misses,
    )
    return replace(layout, table_groups=groups if of_tables == size and groups else topology.shard_groups(of_tables))


def parallelize(
    layout: Layout,
    *,
    seed: int = 0,
    dense_weights: Mapping[str, Tensor] | None = None,
    fill_table: Callable[[str, Tensor], None] | None = None,
    frozen: frozenset[str] = frozenset(),
    rate_decay: float = 1.0,
) -> ParallelDhen:
    """Build the model over all ranks. Communicates; all ranks call it.

    dense_weights: trained weights of the dense part by name; other weights keep their initial values. fill_table:
    copies a trained model's rows into the replicated table of the given name. frozen: parts that are not trained (see
    dhen/model/parts.py). rate_decay: of the learning rate, from each layer to the one below it.
    """
    config, topology, ds_config, placement = layout.config, layout.topology, layout.ds_config, layout.placement
    _allow_tf32(ds_config.dhen.allow_tf32, topology.device)
    tables = shard_tables(
        config,
        topology,
        placement,
        ds_config.dhen,
        groups=layout.table_groups,
        update=table_update(ds_config),
        seed=seed,
    )
    with _hybrid_shards(ds_config, layout.groups):
        dense = _dense_part(config, ds_config, placement.replicated, seed)
        own = dict(dense.named_parameters()) | dict(dense.named_buffers())
        for name, trained in (dense_weights or {}).items():
            with _changing(own[name]) as weight:
                weight.copy_(trained)
        for name in placement.replicated if fill_table else ():
            with _changing(own[f"tables.{name}.weight"]) as weight:
                fill_table(name, weight)
        freeze(dense, frozen)
        _transform_layers(dense, ds_config, topology.device)
        engine = _engine(dense, groups_of(dense, rate_decay), ds_config)
    # All ranks drew the weights from one seed. For dropout, each rank needs its own.
    torch.manual_seed(seed + topology.rank)
    if tables is not None:
        tables.is_frozen = "tables" in frozen
    return ParallelDhen(config, topology, placement, tables, engine, ds_config, layout.shard_size, frozen)


def parallelize_for_scoring(config: DhenConfig, topology: Topology, dense_weights: Mapping[str, Tensor]) -> ScoringDhen:
    """Build the model for scoring, without DeepSpeed: empty tables over all ranks, and the full dense part on each.

    dense_weights: also those of the tables that scoring replicates.
    """
    placement = place_for_scoring(config, topology)
    section = DhenSection(table_dtype=scored_dtype(config))
    tables = shard_tables(config, topology, placement, section, update=TableUpdate("sgd"), seed=None)
    dense = DhenForClickPrediction(config, with_tables=placement.replicated)
    dense.load_state_dict(dense_weights)
    return ScoringDhen(config, topology, placement, tables, dense.to(topology.device).eval())


def shard_tables(
    config: DhenConfig, topology: Topology, placement: Placement, section: DhenSection, **options: Any
) -> ShardedTables | None:
    """Build this rank's shards of the tables; None if no table is sharded. Communicates; all ranks call it.

    options: more arguments of `ShardedTables`.
    """
    sharded = [feature for feature in config.lookups if feature.table not in placement.replicated]
    if not sharded:
        return None
    return ShardedTables(
        sharded,
        config.embedding_dim,
        placement,
        topology,
        table_dtype=section.table_dtype,
        table_rounding=section.table_rounding,
        init_std=config.embedding_init_std,
        wires=Wires(Wire(section.all_to_all_dtype.forward), Wire(section.all_to_all_dtype.backward)),
        overlap=section.overlap_tables,
        sync_steps=section.table_sync_steps,
        sync_wire=Wire(section.table_sync_dtype),
        sync_overlap=section.table_sync_overlap,
        **options,
    )


def table_update(ds_config: DsConfig) -> TableUpdate:
    recipe, optimizer = ds_config.recipe, ds_config.dhen.table_optimizer
    if recipe is None:
        return TableUpdate(optimizer)
    epsilon, l2 = recipe.table_epsilon, recipe.whole_table_l2
    if epsilon is None:
        epsilon = _ADAM_EPSILON if optimizer == "adam" else _ADAGRAD_EPSILON
    if optimizer == "adam":  # adds it to the gradient of each micro step, which is a part of the step's gradient
        l2 /= ds_config.deepspeed["gradient_accumulation_steps"]
    has_new_rows = recipe.new_row_learning_rate is not None
    return TableUpdate(optimizer, epsilon, (recipe.adam_beta1, recipe.adam_beta2), l2, has_new_rows)


def _allow_tf32(is_allowed: bool, device: torch.device) -> None:
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if is_allowed else "highest")
        torch.backends.cudnn.allow_tf32 = is_allowed
    elif is_allowed:
        logger.info("dhen.allow_tf32 has no effect on CPU")


def _shard_groups(topology: Topology, ds_config: DsConfig) -> ShardGroups | None:
    """The groups of hybrid sharding; None if ZeRO shards over all ranks."""
    try:
        size = topology.shard_size(ds_config.dhen.shard_group)
    except ValueError as error:
        raise DsConfigError(f"{ds_config.path}: dhen.shard_group is {error}") from error
    if size < topology.world_size:
        return topology.shard_groups(size)
    if ds_config.dhen.shard_group != "world":
        logger.info(
            "dhen.shard_group %r covers all %d ranks of this job, so there is only one replica. This is plain ZeRO: "
            "all_reduce_dtype and async_all_reduce have no effect.",
            ds_config.dhen.shard_group,
            size,
        )
    return None


def _table_group_sizes(topology: Topology, ds_config: DsConfig) -> list[int]:
    """The numbers of ranks that a table group may have. Communicates; all ranks call it."""
    group = ds_config.dhen.table_group
    try:
        sizes = [topology.shard_size("node" if group == "auto" else group)]
    except ValueError as error:
        if group != "auto":
            raise DsConfigError(f"{ds_config.path}: dhen.table_group is {error}") from error
        sizes = []
    return sorted({*sizes, topology.world_size}, reverse=True) if group == "auto" else sizes


def weights_of(config: DhenConfig, replicated: Collection[str] = ()) -> dict[str, int]:
    """Number of elements of each weight of the dense part, by name. replicated: tables that belong to it."""
    with torch.device("meta"):
        dense = DhenForClickPrediction(config, with_tables=replicated)
    return {name: weight.numel() for name, weight in dense.named_parameters()}


def _dense_part(
    config: DhenConfig, ds_config: DsConfig, replicated: Collection[str], seed: int
) -> DhenForClickPrediction:
    torch.manual_seed(seed)
    init: contextlib.AbstractContextManager = contextlib.nullcontext()
    if ds_config.zero_stage == 3:
        init = deepspeed.zero.Init(config_dict_or_path=ds_config.deepspeed)
    with init:
        return DhenForClickPrediction(config, with_tables=replicated, table_seed=seed)


def _transform_layers(dense: DhenForClickPrediction, ds_config: DsConfig, device: torch.device) -> None:
    """Compile, then checkpoint, then offload: checkpointing runs compiled layers again, and offload moves only the
    activations that checkpointing keeps.
    """
    section, key = ds_config.dhen, "compile"
    try:
        compile_layers(dense, section.compile, device)
        key = "activation_checkpointing"
        checkpoint_layers(dense, section.activation_checkpointing)
        key = "activation_offload"
        offload_layers(dense, section.activation_offload, device)
    except ValueError as error:
        raise DsConfigError(f"{ds_config.path}: dhen.{key} is {error}") from error


def _engine(dense: nn.Module, parameters: list[Any], ds_config: DsConfig) -> deepspeed.DeepSpeedEngine:
    engine, *_ = deepspeed.initialize(
        model=dense, model_parameters=parameters, config=ds_config.deepspeed, dist_init_required=False
    )
    # A reduction by all-reduce works in DeepSpeed's bucket.
    if type(engine.optimizer) is DeepSpeedZeroOptimizer_Stage3 and engine.optimizer.reduce_scatter:
        LeanStage3.take_over(engine.optimizer)
    return engine


def _hybrid_shards(ds_config: DsConfig, groups: ShardGroups | None) -> contextlib.AbstractContextManager:
    if groups is None:
        return contextlib.nullcontext()
    wire_dtype = _WIRE_DTYPES.get(ds_config.dhen.all_reduce_dtype)
    return sharded_over(ReplicaReduction(groups, wire_dtype, is_async=ds_config.dhen.async_all_reduce))


@contextlib.contextmanager
def _changing(weight: Tensor) -> Iterator[Tensor]:
    """The full weight, for writing, even if ZeRO stage 3 shards it."""
    is_sharded = hasattr(weight, "ds_id")
    with torch.no_grad(), deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=is_sharded):
        yield weight
