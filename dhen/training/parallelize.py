"""Parallelizes the model: the one place where model, placement, topology and ds_config meet.

`lay_out` places the embedding tables on the ranks and allocates nothing. `parallelize` then works in this order; each
step needs the one before:
1. Build the tables on FBGEMM. DeepSpeed never gets them, because its engine broadcasts every parameter and would
   overwrite the ranks' different shards.
2. Build the dense part from the same seed on all ranks, under zero.Init if ZeRO stage 3 shards its parameters.
3. If there is a trained model, copy its weights over the initial ones.
4. Wrap layers for activation checkpointing and offload, as many as the ds_config says.
5. Wrap the dense part in DeepSpeed's engine, over all ranks or, for hybrid shards, by hsdp.py.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import DsConfig, DsConfigError
from dhen.dense import hsdp
from dhen.dense.activation_checkpointing import checkpoint_layers
from dhen.dense.activation_offload import offload_layers
from dhen.dense.compiled_layers import compile_layers
from dhen.dense.lean_stage3 import LeanStage3
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import SparseIds
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.runtime.topology import ShardGroups, Topology
from dhen.tables.id_exchange import SentIds
from dhen.tables.lookup import ADAGRAD_EPSILON
from dhen.tables.placement.agreed import place_for_scoring, place_for_training
from dhen.tables.placement.plan import Placement
from dhen.tables.pooled_exchange import Wires
from dhen.tables.replicated import ReplicatedFeatures
from dhen.tables.row_uses import UnseenIds, fill_unused, mean_row
from dhen.tables.sharded_tables import PendingEmbeddings, ShardedTables
from dhen.tables.wire import Wire

logger = logging.getLogger(__name__)
WIRE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class ScoringDhen:
    """A DHEN model over the ranks of `topology`, for predictions.

    tables: the sharded, model-parallel tables; None if there are none, or all tables are replicated.
    dense: the data-parallel dense part, including the tables that `placement` replicates. knows_uses: whether it is
    known which rows training used; models of earlier versions do not say it.
    """

    config: DhenConfig
    topology: Topology
    placement: Placement
    tables: ShardedTables | None
    dense: nn.Module

    def __post_init__(self) -> None:
        self.replicated = ReplicatedFeatures(self.config, self.placement.replicated, self.topology)
        self._unseen: UnseenIds | None = None
        self._unseen_replicated: UnseenIds | None = None
        self.knows_uses = True

    def send_ids(self, sparse: SparseIds) -> SentIds | None:
        """Start sending a batch's ids to their tables. None without sharded tables. Communicates over all ranks."""
        return None if self.tables is None else self.tables.send_ids(self.replicated.others(sparse))

    def settle(self) -> None:
        """Wait for ids that were sent but will not be looked up."""
        if self.tables is not None:
            self.tables.settle()

    def look_up(self, sparse: SparseIds | SentIds | None) -> PendingEmbeddings | None:
        """Start looking up this rank's B examples. None without sharded tables. Communicates over all ranks."""
        if self.tables is None:
            return None
        return self.tables.look_up(self.replicated.others(sparse) if isinstance(sparse, SparseIds) else sparse)

    def score(
        self, embeddings_BFD: PendingEmbeddings | Tensor | None, dense_BN: Tensor, sparse: SparseIds | None = None
    ) -> Tensor:
        """Looked-up embeddings and raw dense features -> logits_B. Communicates under ZeRO stage 3.

        sparse: the batch's ids; needed only if tables are replicated.
        """
        own = self.replicated.own(sparse)
        return self.dense(sparse=own, inputs_embeds=embeddings_BFD, dense=dense_BN).logits

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode inside this context: no gradients, no dropout, fixed batch norm statistics.

        The ids whose rows training never used are counted for `unseen_ids`. In training, the mean of its table stands
        for such a row. Communicates if tables are replicated; all ranks enter together.
        """
        module = getattr(self.dense, "module", self.dense)
        was_training = module.training
        module.eval()
        try:
            with torch.no_grad(), contextlib.ExitStack() as stack:
                self._watch_unseen(stack)
                yield
        finally:
            module.train(was_training)

    def _watch_unseen(self, stack: contextlib.ExitStack) -> None:
        if self.tables is not None:
            self._unseen = stack.enter_context(self.tables.watching_unseen(uses_means=False))

    def unseen_ids(self) -> dict[str, tuple[int, int, int]]:
        """What the last evaluation met, by feature: ids, ids with unused rows, and of the latter those that are 0.

        Communicates; all ranks call it.
        """
        index = {table.name: place for place, table in enumerate(self.config.tables)}
        counts_3F = torch.zeros(3, len(index), dtype=torch.int64, device=self.topology.device)
        if self.tables is not None:
            for shard, counts in zip(self.tables.shards, self._unseen.counts_3S.unbind(1), strict=True):
                if shard.first_column == 0:
                    counts_3F[:, index[shard.name]] = counts
        if self._unseen_replicated is not None:
            for table, counts in zip(self.replicated.tables, self._unseen_replicated.counts_3S.unbind(1), strict=True):
                counts_3F[:, index[table.name]] = counts
        dist.all_reduce(counts_3F, group=self.topology.world)
        return {name: tuple(counts_3F[:, place].tolist()) for name, place in index.items()}


@dataclass
class ParallelDhen(ScoringDhen):
    """A DHEN model over the ranks, for training: `dense` is DeepSpeed's engine around the dense part.

    shard_size: number of ranks that ZeRO shards over: all ranks, or those of a shard group.
    """

    ds_config: DsConfig
    shard_size: int

    @property
    def engine(self) -> deepspeed.DeepSpeedEngine:
        """DeepSpeed's engine."""
        return self.dense

    def set_learning_rates(self, dense: float, tables: float) -> None:
        """Set the learning rates. Call this before `look_up`: FBGEMM reads the tables' rate in the forward pass."""
        if self.tables is not None:
            self.tables.set_learning_rate(tables)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = dense

    def step(self, loss: Tensor) -> None:
        """Take one micro step: the backward pass, then DeepSpeed's step. Communicates over all ranks.

        FBGEMM updates the tables inside the backward pass. DeepSpeed updates the dense part after the last micro step.
        It divides the loss by the number of micro steps k, so the tables take k updates with gradients of 1/k the size.

        Raises FloatingPointError on all ranks, without a change of the dense part, if the gradient of a step is not
        finite. A loss that is not finite on any rank makes it so.
        """
        is_finite = True
        self.engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))
        if self.ds_config.zero_stage == 0 and self.engine.is_gradient_accumulation_boundary():
            # Stages 1 to 3 compute such norms in `engine.step`, wait for them and skip the step without a word.
            weights = [weight for group in self.engine.optimizer.param_groups for weight in group["params"]]
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            is_finite = bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())
        if is_finite:
            self.engine.step()
            is_finite = not getattr(self.engine.optimizer, "overflow", False)
        if not is_finite:
            raise FloatingPointError("the loss or its gradient is not finite")

    def tables_are_finite(self) -> bool:
        """Whether the sharded tables are finite on all ranks. Communicates; all ranks call it."""
        shards = [] if self.tables is None else self.tables.shard_tensors()
        sums = [tensors["weight"].sum(dtype=torch.float32) for _, tensors in shards]  # keeps no copy of a table
        are_finite = torch.stack([torch.zeros((), device=self.topology.device), *sums]).isfinite().all().int()
        dist.all_reduce(are_finite, op=dist.ReduceOp.MIN, group=self.topology.world)
        return bool(are_finite)

    def _watch_unseen(self, stack: contextlib.ExitStack) -> None:
        if self.tables is not None:
            self._unseen = stack.enter_context(self.tables.watching_unseen(uses_means=True))
        if self.replicated.tables:
            self.replicated.gather_uses()
            means = self._means_of_replicated()
            self._unseen_replicated = UnseenIds(self.replicated.uses, lambda: means)
            stack.enter_context(self.replicated.watched_by(self._unseen_replicated))
            hook = self.engine.module.tables.register_forward_hook(self.replicated.add_means)
            stack.callback(hook.remove)

    def _means_of_replicated(self) -> list[Tensor]:
        means = []
        for name, uses in self.replicated.uses_by_name().items():
            weight = self.engine.module.get_parameter(f"tables.{name}.weight")
            with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
                means.append(mean_row(weight, uses))
        return means

    def average_buffers(self) -> None:
        """Average the running statistics of batch norms over the ranks; nothing else synchronizes them. Communicates.

        Call this before an evaluation, so that all ranks score with the same model, and before a save, which stores
        only rank 0's statistics.
        """
        for buffer in self.engine.module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer, group=self.topology.world)
                buffer /= self.topology.world_size

    def dense_state_dict(self) -> dict[str, Tensor]:
        """The full fp32 weights and the buffers of the dense part, on rank 0's CPU. Empty on the other ranks.

        A row of a replicated table that training never used is the mean of its table. Communicates, under ZeRO stages
        1 to 3 one weight at a time, so no device needs memory for all of them.
        """
        self.replicated.gather_uses()
        uses = {f"tables.{name}.weight": counts for name, counts in self.replicated.uses_by_name().items()}
        parameters = dict(self.engine.module.named_parameters())
        state = {}
        for name, parameter in parameters.items():
            whole = _whole_weight(parameter)
            if self.topology.is_main:
                state[name] = whole.detach().cpu().clone()
                if name in uses:
                    fill_unused(state[name], uses[name].cpu())
        if self.topology.is_main:
            buffers = self.engine.module.state_dict().items()
            state |= {name: tensor.detach().cpu().clone() for name, tensor in buffers if name not in parameters}
        return state


@dataclass(frozen=True)
class Layout:
    """A model that is not built yet. ds_config: with sizes that follow from the model. groups: of hybrid sharding."""

    config: DhenConfig
    topology: Topology
    ds_config: DsConfig
    placement: Placement
    groups: ShardGroups | None
    shard_size: int


def lay_out(config: DhenConfig, topology: Topology, ds_config: DsConfig, **known: Any) -> Layout:
    """Place the model of `config` on all ranks, as `ds_config` says. Communicates; all ranks call it.

    known: more arguments of `place_for_training`.
    """
    groups = _shard_groups(topology, ds_config)
    size = topology.world_size if groups is None else groups.shard_size
    placement = place_for_training(config, topology, ds_config, size, **known)
    return Layout(config, topology, ds_config.sized(weights_of(config, placement.replicated)), placement, groups, size)


def parallelize(
    layout: Layout,
    *,
    seed: int = 0,
    table_epsilon: float = ADAGRAD_EPSILON,
    dense_weights: Mapping[str, Tensor] | None = None,
    fill_table: Callable[[str, Tensor], None] | None = None,
) -> ParallelDhen:
    """Build the model over all ranks. Communicates; all ranks call it.

    dense_weights: trained weights of the dense part by name; other weights keep their initial values. fill_table:
    copies a trained model's rows into the replicated table of the given name.
    """
    config, topology, ds_config, placement = layout.config, layout.topology, layout.ds_config, layout.placement
    _allow_tf32(ds_config.dhen.allow_tf32, topology.device)
    tables = shard_tables(config, topology, placement, ds_config.dhen, table_epsilon, seed)
    dense = _dense_part(config, ds_config, placement.replicated, seed, layout.groups)
    if dense_weights:
        _load_dense_weights(dense, dense_weights)
    if fill_table:
        _fill_tables(dense, placement.replicated, fill_table)
    _transform_layers(dense, ds_config, topology.device)
    engine = _engine(dense, ds_config, layout.groups)
    # All ranks drew the weights from one seed. For dropout, each rank needs its own.
    torch.manual_seed(seed + topology.rank)
    return ParallelDhen(config, topology, placement, tables, engine, ds_config, layout.shard_size)


def parallelize_for_scoring(config: DhenConfig, topology: Topology, dense_weights: Mapping[str, Tensor]) -> ScoringDhen:
    """Build the model for scoring, without DeepSpeed: empty tables over all ranks, and the full dense part on each."""
    placement = place_for_scoring(config, topology)
    tables = shard_tables(config, topology, placement, DhenSection(table_optimizer="sgd"), ADAGRAD_EPSILON, seed=0)
    dense = DhenForClickPrediction(config, with_tables=False)
    dense.load_state_dict(dense_weights)
    return ScoringDhen(config, topology, placement, tables, dense.to(topology.device).eval())


def shard_tables(
    config: DhenConfig, topology: Topology, placement: Placement, section: DhenSection, epsilon: float, seed: int
) -> ShardedTables | None:
    """Build this rank's shards of the tables; None if no table is sharded. Communicates; all ranks call it."""
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


def weights_of(config: DhenConfig, replicated: Collection[str] = ()) -> dict[str, int]:
    """Number of elements of each weight of the dense part, by name. replicated: tables that belong to it."""
    with torch.device("meta"):
        dense = DhenForClickPrediction(config, with_tables=replicated)
    return {name: weight.numel() for name, weight in dense.named_parameters()}


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


def _engine(dense: nn.Module, ds_config: DsConfig, groups: ShardGroups | None) -> deepspeed.DeepSpeedEngine:
    parameters = [parameter for parameter in dense.parameters() if parameter.requires_grad]
    if groups is not None:
        wire_dtype = WIRE_DTYPES.get(ds_config.dhen.all_reduce_dtype)
        reduction = hsdp.ReplicaReduction(groups, wire_dtype, is_async=ds_config.dhen.async_all_reduce)
        return hsdp.initialize(dense, parameters, ds_config.deepspeed, groups, reduction)
    engine, *_ = deepspeed.initialize(
        model=dense, model_parameters=parameters, config=ds_config.deepspeed, dist_init_required=False
    )
    # A reduction by all-reduce, which Muon needs, works in DeepSpeed's bucket.
    if type(engine.optimizer) is DeepSpeedZeroOptimizer_Stage3 and engine.optimizer.reduce_scatter:
        LeanStage3.take_over(engine.optimizer)
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
    """The full weight, for writing, even if ZeRO stage 3 shards it."""
    is_sharded = hasattr(weight, "ds_id")
    with torch.no_grad(), deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=is_sharded):
        yield weight


def _whole_weight(parameter: nn.Parameter) -> Tensor:
    """The full fp32 weight: from the optimizer if it holds one, else (a frozen weight, say) from the parameter."""
    whole = safe_get_full_fp32_param(parameter)
    if whole is not None:
        return whole.float()  # bf16 if the master weights are
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().float().clone()
