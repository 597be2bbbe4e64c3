"""Hybrid sharded data parallel (paper 3.2.2, figure 5) on DeepSpeed's ZeRO.

The ranks of a shard group, usually one node, jointly hold one replica of the dense part. ZeRO runs inside the group:
its all-gathers and reduce-scatters never leave it. A replica group consists of the ranks that hold the same shard on
all nodes. As soon as a bucket's gradient shards are reduced inside the shard group, an asynchronous all-reduce of them
starts over the replica group, while the backward continues. The optimizer's step waits for all of these all-reduces.
With gradient accumulation, only the last micro step communicates across nodes.

DeepSpeed has no such stage, but its ZeRO optimizers accept the process group to shard over. Here an engine gives them
the shard group, and a subclass of each overrides the method that stores a reduced shard. These methods are private to
DeepSpeed: their names are those of DeepSpeed 0.19.8, appear only in this file and in lean_stage3.py, and are checked by
`tools/canary.py` and `tests/dense/test_hsdp.py`.

`hybrid_shards` is for any model, by `deepspeed.initialize`, the Trainer of Transformers or Accelerate
(recipes/HSDP.md):

    with hybrid_shards("node"):
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
"""

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NoReturn

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from dhen.config.hybrid_sharding import reasons_against
from dhen.dense.lean_stage3 import LeanStage3
from dhen.dense.replica_reduction import ReplicaReduction
from dhen.runtime.topology import ShardGroups, start

logger = logging.getLogger(__name__)
_SMALL = 16
"""A slice of less than this part of a bucket isn't worth a message of its own."""


def _copy_all(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


class HsdpStage3(LeanStage3):
    """ZeRO stage 3 inside the shard group: shards parameters, gradients and optimizer states over it."""

    hsdp_reduction: ReplicaReduction

    def partition_grads(self, params_to_release: list[nn.Parameter], grad_partitions: list[Tensor]) -> list[Tensor]:
        """DeepSpeed's hook for a bucket's reduced shards. In the last micro step, first averages them across nodes."""
        parent, is_last = super().partition_grads, self.is_gradient_accumulation_boundary()
        self.hsdp_reduction.note(params_to_release, is_last=is_last)
        if not is_last:
            return parent(params_to_release, grad_partitions)
        params = list(params_to_release)  # the caller clears its list
        if self.hsdp_reduction.wire_dtype is None and not self.offload_optimizer:
            buffers = parent(params, grad_partitions)
            self._average(self._runs(params))
            return buffers
        if self.micro_step_id > 0:
            for param, shard in zip(params, grad_partitions, strict=True):
                # Send the sum of the earlier micro steps along with the last one, and clear it, so that it is not
                # added twice.
                earlier = self._gradient_of[param.ds_id]
                shard.add_(earlier.narrow(0, 0, shard.numel()).to(shard.device))
                earlier.zero_()
        for param in params:
            if not get_accelerator().is_synchronized_device():
                param.grad.record_stream(get_accelerator().current_stream())
            param.grad = None
        self.hsdp_reduction.start(grad_partitions, lambda averages: parent(params, averages))
        return []

    def _average(self, runs: list[Tensor]) -> None:
        """Average slices of the gradients' buffer: large ones where they lie, the others together in one message."""
        least = self.reduce_bucket_size // self.hsdp_reduction.shard_size // _SMALL
        for run in runs:
            if run.numel() >= least:
                self.hsdp_reduction.start_in_place(run)
        if small := [run for run in runs if run.numel() < least]:
            self.hsdp_reduction.start(small, lambda averages: _copy_all(averages, small))

    def _runs(self, params: list[nn.Parameter]) -> list[Tensor]:
        """This rank's shards of the gradients, with neighbours in the gradients' buffer joined to one slice."""
        shards = (self._gradient_of[param.ds_id] for param in params)
        runs: list[tuple[int, int]] = []  # first and last element, the last one excluded
        for first, end in sorted((shard.storage_offset(), shard.storage_offset() + shard.numel()) for shard in shards):
            if runs and runs[-1][1] == first:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((first, end))
        return [self.grad_partitions_flat_buffer[first:end] for first, end in runs]

    def independent_gradient_partition_epilogue(self) -> None:
        """DeepSpeed's hook for the end of a backward. Waits for all buckets; the last one has been started by now."""
        super().independent_gradient_partition_epilogue()
        with get_accelerator().stream(self.reduce_and_partition_stream):
            self.hsdp_reduction.finish(is_last=self.is_gradient_accumulation_boundary())
        if not get_accelerator().resolves_data_dependency():
            self.reduce_and_partition_stream.synchronize()

    def _get_norm_groups(self) -> list[Tensor]:
        """DeepSpeed's gradient norm of each parameter group, for clipping."""
        return [self.hsdp_reduction.agreed(norm) for norm in super()._get_norm_groups()]


class HsdpStages1And2(DeepSpeedZeroOptimizer):
    """ZeRO stages 1 and 2 inside the shard group: shards optimizer states, and in stage 2 gradients, over it."""

    hsdp_reduction: ReplicaReduction
    hsdp_bucket: list[tuple[nn.Parameter, int, Tensor]]

    @classmethod
    def take_over(cls, optimizer: DeepSpeedZeroOptimizer) -> None:
        """Replaces __init__: change the class of an optimizer that DeepSpeed has just created."""
        optimizer.__class__ = cls
        optimizer.hsdp_bucket = []

    def reduce_ready_partitions_and_remove_grads(self, param: nn.Parameter, i: int) -> None:
        """DeepSpeed's hook for a gradient of this rank, of any weight."""
        self.hsdp_reduction.note([param], is_last=self.is_gradient_accumulation_boundary())
        super().reduce_ready_partitions_and_remove_grads(param, i)

    def copy_grads_in_partition(self, param: nn.Parameter, group_idx: int | None = None) -> None:
        """DeepSpeed's hook for one reduced gradient. In the last micro step, keeps it to be averaged across nodes."""
        if not self.is_gradient_accumulation_boundary():
            super().copy_grads_in_partition(param, group_idx)
            return
        group = self._get_param_group_idx(param) if group_idx is None else group_idx
        # Copy the slice, because DeepSpeed refills the bucket in the meantime.
        self.hsdp_bucket.append((param, group, self._reduced_slice(param, group).clone()))

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """DeepSpeed's reduction of a bucket inside the shard group. Then starts to average it across nodes."""
        super().reduce_ipg_grads(comm_dtype)
        if not self.hsdp_bucket:
            return
        bucket, self.hsdp_bucket = self.hsdp_bucket, []
        owners = [(param, group) for param, group, _ in bucket]  # lets the shards be freed before the averages arrive
        with get_accelerator().stream(self._reduction_stream()):
            for param, group, shard in bucket:
                self._take_earlier_micro_steps(param, group, shard)
            self.hsdp_reduction.start(
                [shard for _, _, shard in bucket],
                lambda averages: self._put_away([(*owner, a) for owner, a in zip(owners, averages, strict=True)]),
            )

    def independent_gradient_partition_epilogue(self) -> None:
        """DeepSpeed's hook for the end of a backward. Starts the last bucket and waits for all of them first."""
        self.reduce_ipg_grads()
        with get_accelerator().stream(self._reduction_stream()):
            self.hsdp_reduction.finish(is_last=self.is_gradient_accumulation_boundary())
        super().independent_gradient_partition_epilogue()

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """DeepSpeed's gradient norm over all parameters, for clipping."""
        return self.hsdp_reduction.agreed(super().scaled_global_norm(norm_type))

    def _reduction_stream(self) -> Any:
        return self.reduction_stream if self.overlap_comm else get_accelerator().current_stream()

    def _bounds(self, param: nn.Parameter, group: int) -> tuple[int, int]:
        """First element and number of elements of the part of `param` in this rank's shard."""
        rank, param_id = dist.get_rank(group=self.real_dp_process_group[group]), self.get_param_id(param)
        first = int(self.grad_start_offset[group][rank][param_id])
        at = int(self.grad_partition_insertion_offset[group][rank][param_id])
        return first, int(min(param.numel() - first, self.partition_size[group] - at))

    def _reduced_slice(self, param: nn.Parameter, group: int) -> Tensor:
        """This rank's part of the gradient of `param`, reduced inside the shard group; a view of DeepSpeed's buffer."""
        first, size = self._bounds(param, group)
        if self._use_compact_grad_partition_buffer(group):  # bf16 weights with grad_accum_dtype fp32
            rank = dist.get_rank(group=self.real_dp_process_group[group])
            return self._get_compact_grad_partition_slice(group, rank, self.get_param_id(param), size)
        return self.get_gradient_for_reduction(param).view(-1)[first : first + size]

    def _take_earlier_micro_steps(self, param: nn.Parameter, group: int, shard: Tensor) -> None:
        """Add the sum of earlier micro steps to `shard`, and clear it, so that it is not added twice."""
        if self._use_compact_grad_partition_buffer(group):
            return
        first, size = self._bounds(param, group)
        if self.cpu_offload:
            self._wait_for_offload_copies()
            earlier = self.accumulated_grads_in_cpu.get(self.get_param_id(param)) if self.micro_step_id > 0 else None
            if self.low_precision_master_weights_and_grads:
                first = 0  # the sums are in the gradient of the master weights, which holds this rank's part only
        else:
            sums = self.all_grad_tensors.get(group)
            index = next(i for i, other in enumerate(self.params_in_partition[group]) if other is param)
            earlier = sums[index] if sums else None
        if earlier is not None:
            shard.add_(earlier.view(-1)[first : first + size].to(shard.device))
            earlier.zero_()

    def _put_away(self, averages: list[tuple[nn.Parameter, int, Tensor]]) -> None:
        for param, group, average in averages:
            if not self._use_compact_grad_partition_buffer(group):
                # The bucket that held the gradient has been reused, so make a new one; only the slice is read.
                gradient = self.get_gradient_for_reduction(param)
                gradient.data = torch.zeros_like(gradient)
            self._reduced_slice(param, group).copy_(average.view(-1))
            super().copy_grads_in_partition(param, group)


class HsdpEngine(DeepSpeedEngine):
    """A DeepSpeed engine whose ZeRO optimizer shards over `groups.shard` and averages over `groups.replica`."""

    hsdp_groups: ShardGroups
    hsdp_reduction: ReplicaReduction

    @classmethod
    def take_over(cls, engine: DeepSpeedEngine, reduction: ReplicaReduction) -> None:
        """Change the class of an engine before its __init__, which DeepSpeed then runs."""
        engine.__class__ = cls
        # nn.Module.__setattr__ does not work before nn.Module.__init__.
        engine.__dict__ |= {"hsdp_groups": reduction.groups, "hsdp_reduction": reduction}

    def coalesce_grad_reduction(self) -> NoReturn:
        """DeepSpeed's context for several backwards in one reduction, which nobody has tried with hybrid shards."""
        raise NotImplementedError("Hybrid shards do not support coalesce_grad_reduction. Use gradient accumulation.")

    def _configure_distributed_model(self, model: nn.Module) -> None:
        super()._configure_distributed_model(model)  # under stages 1 and 2, broadcasts rank 0's weights to all ranks
        if self.seq_dp_world_size != dist.get_world_size() or self.has_moe_layers:
            raise ValueError("Hybrid shards cannot be combined with tensor, sequence, expert or pipeline parallelism.")
        self.seq_data_parallel_group = self.hsdp_groups.shard
        self.seq_dp_world_size = self.hsdp_groups.shard_size
        for name, parameter in model.named_parameters():
            if getattr(parameter, "ds_process_group", self.hsdp_groups.shard) is not self.hsdp_groups.shard:
                raise ValueError(
                    f"zero.Init has sharded {name} over other ranks. Build the model in hybrid_shards too."
                )
            self._equalize(getattr(parameter, "ds_tensor", parameter))

    def _equalize(self, shard: Tensor) -> None:
        """Copy the first replica's shard to all replicas. All use the same seed, but their devices may differ."""
        on_device = shard.data.to(self.device)
        dist.broadcast(on_device, dist.get_global_rank(self.hsdp_groups.replica, 0), group=self.hsdp_groups.replica)
        shard.data.copy_(on_device)

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        zero = super()._configure_zero_optimizer(optimizer)
        if type(zero) is DeepSpeedZeRoOffload:  # an engine without an optimizer, for evaluation
            return zero
        takers = {DeepSpeedZeroOptimizer_Stage3: HsdpStage3, DeepSpeedZeroOptimizer: HsdpStages1And2}
        if type(zero) not in takers:
            raise ValueError(f"Hybrid shards do not support DeepSpeed's {type(zero).__name__}.")
        takers[type(zero)].take_over(zero)
        zero.hsdp_reduction = self.hsdp_reduction
        return zero

    def _configure_checkpointing(self) -> None:
        super()._configure_checkpointing()
        if self.hsdp_groups.replica_index > 0:  # replicas are identical, so only the first one writes
            self.save_non_zero_checkpoint = self.save_zero_checkpoint = False


@contextlib.contextmanager
def hybrid_shards(
    shard_group: Literal["node"] | int = "node",
    *,
    all_reduce_dtype: torch.dtype | None = None,
    timeout_minutes: float = 30.0,
) -> Iterator[None]:
    """Inside this context, deepspeed.initialize makes hybrid shards, and zero.Init shards over the shard group.

    The engine keeps them afterwards. Communicates; all ranks enter together, after a launcher has started them.

    shard_group: the ranks that hold one replica together: those of a node, or that many consecutive ranks.
    all_reduce_dtype: of gradients between replicas; None keeps their own. timeout_minutes: for collectives of the new
    groups. Raises ValueError if the job's ranks cannot be divided into such groups; deepspeed.initialize raises it
    for a config that hybrid shards do not support.
    """
    topology = start(timeout_minutes)
    try:
        size = topology.shard_size(shard_group)
    except ValueError as error:
        raise ValueError(f"shard_group is {error}") from error
    if size == topology.world_size:
        logger.info("shard_group %r covers all %d ranks of this job. This is plain ZeRO.", shard_group, size)
        yield
        return
    with sharded_over(ReplicaReduction(topology.shard_groups(size), all_reduce_dtype)):
        yield


@contextlib.contextmanager
def sharded_over(reduction: ReplicaReduction) -> Iterator[None]:
    """`hybrid_shards` for groups that exist already."""
    make_engine, enter_init = DeepSpeedEngine.__init__, deepspeed.zero.Init.__init__

    @functools.wraps(make_engine)
    def make_hybrid_engine(self: DeepSpeedEngine, *arguments: Any, config: Any, **options: Any) -> None:
        if type(self) is not DeepSpeedEngine:
            raise ValueError(f"Hybrid shards do not support DeepSpeed's {type(self).__name__}.")
        for reason in reasons_against(config):
            raise ValueError(f"Hybrid shards: {reason}")
        HsdpEngine.take_over(self, reduction)
        make_engine(self, *arguments, config=config, **options)
        if not isinstance(self.optimizer, (HsdpStage3, HsdpStages1And2, DeepSpeedZeRoOffload)):
            raise ValueError(f"Hybrid shards do not support DeepSpeed's {type(self.optimizer).__name__}.")

    @functools.wraps(enter_init)
    def enter_hybrid_init(self: Any, module: Any = None, data_parallel_group: Any = None, **options: Any) -> None:
        enter_init(self, module, data_parallel_group or reduction.groups.shard, **options)

    DeepSpeedEngine.__init__, deepspeed.zero.Init.__init__ = make_hybrid_engine, enter_hybrid_init
    try:
        yield
    finally:
        DeepSpeedEngine.__init__, deepspeed.zero.Init.__init__ = make_engine, enter_init
