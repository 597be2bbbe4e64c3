"""The model over all ranks: sharded tables and the data-parallel dense part, for training and for predictions."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from dhen.config.ds_config import DsConfig
from dhen.dense.averaged_weights import AveragedWeights
from dhen.dense.trained_parts import ANCHOR
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import SparseIds
from dhen.model.modeling_dhen import DhenOutput
from dhen.model.parts import part_of
from dhen.runtime.topology import Topology
from dhen.tables.id_exchange import SentIds
from dhen.tables.placement.plan import Placement
from dhen.tables.replicated import ReplicatedFeatures
from dhen.tables.row_uses import UnseenIds, fill_unused, mean_row
from dhen.tables.sharded_tables import PendingEmbeddings, ShardedTables


@dataclass
class ScoringDhen:
    """A DHEN model over the ranks of `topology`, for predictions.

    tables: the sharded, model-parallel tables; None if there are none, or all tables are replicated.
    dense: the data-parallel dense part, including the tables that `placement` replicates.
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

    def forward(
        self,
        embeddings_BFD: PendingEmbeddings | Tensor | None,
        dense_BN: Tensor,
        sparse: SparseIds | None = None,
        num_passes: int = 1,
    ) -> DhenOutput:
        """Looked-up embeddings and raw dense features -> logits_B and auxiliary loss. Communicates under ZeRO stage 3.

        sparse: the batch's ids; needed only if tables are replicated. num_passes: as in `DhenForClickPrediction`.
        """
        own = self.replicated.own(sparse)
        return self.dense(sparse=own, inputs_embeds=embeddings_BFD, dense=dense_BN, num_passes=num_passes)

    def score(self, *inputs: Any, **more: Any) -> Tensor:
        return self.forward(*inputs, **more).logits

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode inside this context: no gradients, no dropout, fixed batch norm statistics.

        The ids whose rows training never used are counted for `unseen_ids`. In training, the mean of its table stands
        for such a row. Communicates if tables are replicated; all ranks enter together.
        """
        module = getattr(self.dense, "module", self.dense)
        in_training = [each for each in module.modules() if each.training]  # not those of frozen parts
        module.eval()
        try:
            with torch.no_grad(), contextlib.ExitStack() as stack:
                self._watch_unseen(stack)
                yield
        finally:
            for each in in_training:
                each.training = True

    def _watch_unseen(self, stack: contextlib.ExitStack) -> None:
        if self.tables is not None:
            self._unseen = stack.enter_context(self.tables.watching_unseen(uses_means=False))
        if self.replicated.tables:
            self._unseen_replicated = UnseenIds(self.replicated.uses, None)
            stack.enter_context(self.replicated.watched_by(self._unseen_replicated))

    def unseen_ids(self) -> dict[str, tuple[int, int, int]]:
        """What the last evaluation met, by feature: ids, ids with unused rows, and of the latter those that are 0.

        Communicates; all ranks call it.
        """
        index = {feature.name: place for place, feature in enumerate(self.config.features)}
        counts_3F = torch.zeros(3, len(index), dtype=torch.int64, device=self.topology.device)
        if self.tables is not None:
            for lookup, counts in zip(self.tables.lookups, self._unseen.counts_3S.unbind(1), strict=True):
                if lookup.first_column == 0:
                    counts_3F[:, index[self.tables.features[lookup.table].name]] += counts
        if self._unseen_replicated is not None:
            of_features = zip(self.replicated.features, self._unseen_replicated.counts_3S.unbind(1), strict=True)
            for feature, counts in of_features:
                counts_3F[:, index[feature.name]] += counts
        dist.all_reduce(counts_3F, group=self.topology.world)
        return {name: tuple(counts_3F[:, place].tolist()) for name, place in index.items()}


@dataclass
class ParallelDhen(ScoringDhen):
    """A DHEN model over the ranks, for training: `dense` is DeepSpeed's engine around the dense part.

    shard_size: number of ranks that ZeRO shards over: all ranks, or those of a shard group. average: the moving average
    of the dense part, if there is one; `tables` has its own. average_decay: the largest share of it that a step keeps.
    frozen: the parts of the model that are not trained (see dhen/model/parts.py).
    """

    ds_config: DsConfig
    shard_size: int
    frozen: frozenset[str] = frozenset()
    average: AveragedWeights | None = None
    average_decay: float = 0.0

    @property
    def engine(self) -> deepspeed.DeepSpeedEngine:
        return self.dense

    def start_training_mode(self) -> None:
        """Switch to training mode. Frozen parts stay in evaluation mode: no dropout, fixed batch norm statistics."""
        module, num_layers = self.engine.module.train(), len(self.config.layer_specs)
        for name, each in module.named_modules():
            each.training = part_of(name, num_layers) not in self.frozen

    def set_learning_rates(self, dense: float, tables: float, new_rows: float | None = None) -> None:
        """Set the learning rates. Call this before `look_up`: FBGEMM reads the tables' rate in the forward pass.

        dense: of the head; a parameter group trains with its "rate_share" of it. new_rows: by default as `tables`.
        """
        if self.tables is not None:
            self.tables.set_learning_rate(tables, new_rows)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = dense * group.get("rate_share", 1.0)

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

    def start_average(self, decay: float) -> None:
        """Begin a moving average of all weights, which evaluations and exports use. Raises ValueError if it cannot be.

        decay: largest share of the average that a step keeps.
        """
        self.average, self.average_decay = AveragedWeights(self.engine), decay
        if self.tables is not None:
            self.tables.start_average()

    def end_step(self, step: int) -> None:
        """Do what comes after the updates of step number `step`: regularize whole tables, and average the weights."""
        # The early weights leave the average soon: 1 - decay falls as 9 / (10 + step).
        decay = min(self.average_decay, (1 + step) / (10 + step))
        if self.tables is not None:
            self.tables.end_step(step, decay)
        if self.average is not None:
            self.average.after_step(decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside this context the weights are their moving averages, if there are any, and all replicas are equal.

        Communicates; all ranks enter together.
        """
        if self.tables is not None:
            self.tables.synchronize()
        with contextlib.ExitStack() as stack:
            if self.average is not None:
                stack.enter_context(self.average.swapped_in())
                if self.tables is not None:
                    stack.enter_context(self.tables.averaged())
            yield

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """As ScoringDhen's, with the moving averages of the weights if there are any."""
        with self.averaged(), super().evaluating():
            yield

    def tables_are_finite(self) -> bool:
        """Whether the sharded tables are finite on all ranks, with what replicas add to them. Communicates; all ranks
        call it.
        """
        if self.tables is not None:
            self.tables.synchronize()
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

        Call this before an evaluation, so that all ranks score with the same model.
        """
        for buffer in chain(*self.statistics().values()):
            total = buffer.double()  # exact where all are equal: frozen parts keep their bits
            dist.all_reduce(total, group=self.topology.world)
            buffer.copy_(total / self.topology.world_size)

    def statistics(self) -> dict[str, list[Tensor]]:
        """The running statistics of this rank, and those of the moving average if there is one."""
        buffers = {"statistics": list(self.engine.module.buffers())}
        buffers |= {"average of statistics": self.average.buffers} if self.average else {}
        return {name: [each for each in of_name if each.is_floating_point()] for name, of_name in buffers.items()}

    @contextlib.contextmanager
    def with_average_buffers(self) -> Iterator[None]:
        """Average the running statistics inside this context, for a save of what other ranks than these may load."""
        own = [buffer.clone() for buffer in chain(*self.statistics().values())]
        self.average_buffers()
        try:
            yield
        finally:
            for buffer, before in zip(chain(*self.statistics().values()), own, strict=True):
                buffer.copy_(before)

    def dense_state_dict(self, *, fills_unused: bool = True) -> dict[str, Tensor]:
        """The full fp32 weights and the buffers of the dense part, on rank 0's CPU. Empty on the other ranks.

        fills_unused: a row of a replicated table that training never used is the mean of its table. Communicates, under
        ZeRO stages 1 to 3 one weight at a time, so no device needs memory for all of them.
        """
        self.replicated.gather_uses()
        uses = {f"tables.{name}.weight": counts for name, counts in self.replicated.uses_by_name().items()}
        parameters = dict(self.engine.module.named_parameters())
        state = {}
        for name, parameter in parameters.items():
            whole = _whole_weight(parameter)
            if self.topology.is_main and name != ANCHOR:
                state[name] = whole.detach().cpu().clone()
                if name in uses and fills_unused:
                    fill_unused(state[name], uses[name].cpu())
        if self.topology.is_main:
            buffers = self.engine.module.state_dict().items()
            state |= {name: tensor.detach().cpu().clone() for name, tensor in buffers if name not in parameters}
        return state


def _whole_weight(parameter: nn.Parameter) -> Tensor:
    """The full fp32 weight: from the optimizer if it holds one, else (a frozen weight, say) from the parameter."""
    whole = safe_get_full_fp32_param(parameter)
    if whole is not None:
        return whole.float()  # bf16 if the master weights are
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().float().clone()
