"""The one place where model, placement, topology and ds_config meet.

In this order, each step relying on the one before:
1. the embedding tables are placed over the ranks and built on FBGEMM; DeepSpeed never sees them, because its engine
   broadcasts every parameter that it is given and would overwrite the ranks' different shards;
2. the dense part is built from the same seed on all ranks, under zero.Init where ZeRO stage 3 shards its parameters;
3. weights of a trained model, where there are any, replace the initial ones;
4. activation checkpointing and offload wrap the layers that they are asked for;
5. DeepSpeed's engine wraps the dense part, over all ranks, or in hybrid shards by hsdp.py.
"""

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import DsConfig, DsConfigError
from dhen.dense import hsdp
from dhen.dense.activation_checkpointing import checkpoint_layers
from dhen.dense.activation_offload import offload_layers
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import SparseIds
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.runtime.topology import ShardGroups, Topology
from dhen.tables.id_exchange import SentIds, check_ids
from dhen.tables.lookup import ADAGRAD_EPSILON
from dhen.tables.placement.agreed import place_for_scoring, place_for_training
from dhen.tables.placement.plan import Placement
from dhen.tables.pooled_exchange import Wires
from dhen.tables.sharded_tables import PendingEmbeddings, ShardedTables
from dhen.tables.wire import Wire

logger = logging.getLogger(__name__)
WIRE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ReplicatedFeatures:
    """Parts a batch's ids between the tables that the dense part holds on every rank, and the others."""

    def __init__(self, config: DhenConfig, names: Collection[str], device: torch.device) -> None:
        """names: of the features whose tables are replicated."""
        self._own = [index for index, table in enumerate(config.tables) if table.name in names]
        self._others = [index for index, table in enumerate(config.tables) if table.name not in names]
        self._tables = [config.tables[index] for index in self._own]
        self._num_embeddings_F = torch.tensor([table.num_embeddings for table in self._tables], device=device)

    def own(self, sparse: SparseIds | None) -> SparseIds | None:
        """Ids of the replicated tables; None where none is. Raises IndexError for an id outside its table."""
        if not self._own:
            return None
        own = sparse.select(self._own)
        check_ids(own, self._num_embeddings_F, self._tables)
        return own

    def others(self, sparse: SparseIds) -> SparseIds:
        """Ids of the tables that are spread over the ranks."""
        return sparse.select(self._others) if self._own else sparse


@dataclass
class ScoringDhen:
    """DHEN spread over the ranks of `topology`, for predictions.

    tables: the embedding tables, model-parallel; None where there are none, or all are replicated.
    dense: the dense part, data-parallel, with the tables that `placement` replicates.
    """

    config: DhenConfig
    topology: Topology
    placement: Placement
    tables: ShardedTables | None
    dense: nn.Module

    def __post_init__(self) -> None:
        self._replicated = ReplicatedFeatures(self.config, self.placement.replicated, self.topology.device)

    def send_ids(self, sparse: SparseIds) -> SentIds | None:
        """Begin to bring the ids of a batch to their tables; None without tables. Communicates over all ranks."""
        return None if self.tables is None else self.tables.send_ids(self._replicated.others(sparse))

    def settle(self) -> None:
        """Wait for ids that are on their way and that nobody will look up."""
        if self.tables is not None:
            self.tables.settle()

    def look_up(self, sparse: SparseIds | SentIds | None) -> PendingEmbeddings | None:
        """Begin to look up this rank's B examples; None without tables. Communicates over all ranks."""
        if self.tables is None:
            return None
        return self.tables.look_up(self._replicated.others(sparse) if isinstance(sparse, SparseIds) else sparse)

    def score(
        self, embeddings_BFD: PendingEmbeddings | Tensor | None, dense_BN: Tensor, sparse: SparseIds | None = None
    ) -> Tensor:
        """Looked-up embeddings and raw dense features -> logits_B. Communicates under ZeRO stage 3.

        sparse: the batch's ids, for the tables that are replicated; not read where none is.
        """
        own = self._replicated.own(sparse)
        return self.dense(sparse=own, inputs_embeds=embeddings_BFD, dense=dense_BN).logits

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it nothing is trained: no gradients, dropout off, batch norm fixed."""
        module = getattr(self.dense, "module", self.dense)
        was_training = module.training
        module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            module.train(was_training)


@dataclass
class ParallelDhen(ScoringDhen):
    """The same, for training: `dense` is DeepSpeed's engine around the dense part, under ZeRO.

    shard_size: the number of ranks that ZeRO shards over, all or those of a shard group.
    """

    ds_config: DsConfig
    shard_size: int

    @property
    def engine(self) -> deepspeed.DeepSpeedEngine:
        """DeepSpeed's engine."""
        return self.dense

    def set_learning_rates(self, dense: float, tables: float) -> None:
        """Learning rates of the steps to come. Call it before `look_up`: FBGEMM's backward uses the forward's."""
        if self.tables is not None:
            self.tables.set_learning_rate(tables)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = dense

    def step(self, loss: Tensor) -> None:
        """One micro step: backward, then DeepSpeed's step. Communicates over all ranks.

        FBGEMM updates the tables inside the backward; DeepSpeed updates the dense part at the boundary of gradient
        accumulation. It divides the loss by the accumulation steps, so with k of them the tables take k updates from
        gradients of 1/k the size.
        """
        self.engine.backward(loss)
        self.engine.step()

    def average_buffers(self) -> None:
        """Give all ranks the mean of their batch norms' running statistics, which nothing else keeps together.

        Communicates. Call it before an evaluation, so that all ranks score with one model, and before a save, which
        keeps rank 0's.
        """
        for buffer in self.engine.module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer, group=self.topology.world)
                buffer /= self.topology.world_size

    def dense_state_dict(self) -> dict[str, Tensor]:
        """All weights of the dense part in fp32, whole, and its buffers, on rank 0's CPU; empty on the other ranks.

        Communicates under ZeRO 1 to 3, weight by weight, so no device holds them all.
        """
        parameters = dict(self.engine.module.named_parameters())
        state = {}
        for name, parameter in parameters.items():
            whole = _whole_weight(parameter)
            if self.topology.is_main:
                state[name] = whole.detach().cpu().clone()
        if self.topology.is_main:
            buffers = self.engine.module.state_dict().items()
            state |= {name: tensor.detach().cpu().clone() for name, tensor in buffers if name not in parameters}
        return state


def parallelize(
    config: DhenConfig,
    topology: Topology,
    ds_config: DsConfig,
    *,
    seed: int = 0,
    table_epsilon: float = ADAGRAD_EPSILON,
    dense_weights: Mapping[str, Tensor] | None = None,
    ids_per_bag: Mapping[str, float] | None = None,
    table_cuts: Mapping[str, int] | None = None,
    replicated: Collection[str] | None = None,
    fill_table: Callable[[str, Tensor], None] | None = None,
) -> ParallelDhen:
    """Build `config`'s model over all ranks of `topology` as `ds_config` says. Communicates; all ranks call it.

    dense_weights: weights of the dense part that replace the initial ones, by name; what is left out keeps its own.
    ids_per_bag: mean number of ids by sparse feature, for the cost of its table; 1 where it is left out. table_cuts:
    number of column shards by table, and replicated: the tables that are, where a checkpoint fixes them. fill_table:
    writes a trained model's rows over the initial weight of the replicated table of that name.
    """
    groups = _shard_groups(topology, ds_config)
    shard_size = topology.world_size if groups is None else groups.shard_size
    placement = place_for_training(config, topology, ds_config, shard_size, ids_per_bag, table_cuts, replicated)
    tables = shard_tables(config, topology, placement, ds_config.dhen, table_epsilon, seed)
    dense = _dense_part(config, ds_config, placement.replicated, seed, groups)
    if dense_weights:
        _load_dense_weights(dense, dense_weights)
    if fill_table:
        _fill_tables(dense, placement.replicated, fill_table)
    _save_activations(dense, ds_config, topology.device)
    engine = _engine(dense, ds_config, groups)
    # Weights came from one seed; dropout draws from another on each rank.
    torch.manual_seed(seed + topology.rank)
    return ParallelDhen(config, topology, placement, tables, engine, ds_config, shard_size)


def parallelize_for_scoring(config: DhenConfig, topology: Topology, dense_weights: Mapping[str, Tensor]) -> ScoringDhen:
    """The tables over all ranks, to be loaded by the caller, and the whole dense part on each. No DeepSpeed."""
    placement = place_for_scoring(config, topology)
    tables = shard_tables(config, topology, placement, DhenSection(table_optimizer="sgd"), ADAGRAD_EPSILON, seed=0)
    dense = DhenForClickPrediction(config, with_tables=False)
    dense.load_state_dict(dense_weights)
    return ScoringDhen(config, topology, placement, tables, dense.to(topology.device).eval())


def shard_tables(
    config: DhenConfig, topology: Topology, placement: Placement, section: DhenSection, epsilon: float, seed: int
) -> ShardedTables | None:
    """This rank's share of the model's tables; None where the model has none. Communicates; all ranks call it."""
    sharded = [table for table in config.tables if table.name not in placement.replicated]
    if not sharded:
        return None
    return ShardedTables(
        sharded,
        config.embedding_dim,
        placement,
        topology,
        optimizer=section.table_optimizer,
        table_dtype=section.table_dtype,
        table_rounding=section.table_rounding,
        epsilon=epsilon,
        seed=seed,
        init_std=config.embedding_init_std,
        wires=Wires(Wire(section.all_to_all_dtype.forward), Wire(section.all_to_all_dtype.backward)),
        overlap=section.overlap_tables,
    )


def _shard_groups(topology: Topology, ds_config: DsConfig) -> ShardGroups | None:
    """The groups of hybrid sharding; None where ZeRO shards over all ranks anyway."""
    try:
        size = topology.shard_size(ds_config.dhen.shard_group)
    except ValueError as error:
        raise DsConfigError(f"{ds_config.path}: dhen.shard_group is {error}") from error
    if size < topology.world_size:
        return topology.shard_groups(size)
    if ds_config.dhen.shard_group != "world":
        logger.info(
            "dhen.shard_group %r is all %d ranks of this job, one replica: plain ZeRO. all_reduce_dtype and "
            "async_all_reduce have no effect.",
            ds_config.dhen.shard_group,
            size,
        )
    return None


def _dense_part(
    config: DhenConfig, ds_config: DsConfig, replicated: Collection[str], seed: int, groups: ShardGroups | None
) -> DhenForClickPrediction:
    torch.manual_seed(seed)
    init: contextlib.AbstractContextManager = contextlib.nullcontext()
    if ds_config.zero_stage == 3:
        shard = None if groups is None else groups.shard
        init = deepspeed.zero.Init(config_dict_or_path=ds_config.deepspeed, data_parallel_group=shard)
    with init:
        return DhenForClickPrediction(config, with_tables=replicated, table_seed=seed)


def _save_activations(dense: DhenForClickPrediction, ds_config: DsConfig, device: torch.device) -> None:
    """Checkpointing first, so that offload takes what it keeps."""
    section, key = ds_config.dhen, "activation_checkpointing"
    try:
        checkpoint_layers(dense, section.activation_checkpointing)
        key = "activation_offload"
        offload_layers(dense, section.activation_offload, device)
    except ValueError as error:
        raise DsConfigError(f"{ds_config.path}: dhen.{key} is {error}") from error


def _engine(dense: nn.Module, ds_config: DsConfig, groups: ShardGroups | None) -> deepspeed.DeepSpeedEngine:
    parameters = [parameter for parameter in dense.parameters() if parameter.requires_grad]
    if groups is not None:
        wire_dtype = WIRE_DTYPES.get(ds_config.dhen.all_reduce_dtype)
        reduction = hsdp.ReplicaReduction(groups, wire_dtype, is_async=ds_config.dhen.async_all_reduce)
        return hsdp.initialize(dense, parameters, ds_config.deepspeed, groups, reduction)
    engine, *_ = deepspeed.initialize(
        model=dense, model_parameters=parameters, config=ds_config.deepspeed, dist_init_required=False
    )
    return engine


def _load_dense_weights(dense: nn.Module, weights: Mapping[str, Tensor]) -> None:
    targets = dict(dense.named_parameters()) | dict(dense.named_buffers())
    for name, weight in weights.items():
        with _changing(targets[name]) as target:
            target.copy_(weight)


def _fill_tables(dense: DhenForClickPrediction, names: Collection[str], fill_table: Callable) -> None:
    for name in names:
        with _changing(dense.get_parameter(f"tables.{name}.weight")) as weight:
            fill_table(name, weight)


@contextlib.contextmanager
def _changing(weight: Tensor) -> Iterator[Tensor]:
    """The whole weight, to be written, also where ZeRO stage 3 has it in shards."""
    is_sharded = hasattr(weight, "ds_id")
    with torch.no_grad(), deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=is_sharded):
        yield weight


def _whole_weight(parameter: nn.Parameter) -> Tensor:
    """The fp32 weight that the optimizer holds where ZeRO shards it, else the parameter itself, as a frozen one's."""
    whole = safe_get_full_fp32_param(parameter)
    if whole is not None:
        return whole.float()  # bf16 where the masters are
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().float().clone()
