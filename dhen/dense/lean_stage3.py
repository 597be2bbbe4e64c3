"""DeepSpeed's ZeRO stage 3 without the copies of weights and gradients that it does not need (paper 3.2).

DeepSpeed 0.19.8 keeps more copies of a rank's shard than the optimizer needs:

- fp32 master weights beside fp32 weights. DeepSpeed means to share the memory, but it compares a torch.device with a
  string. These are never equal, so it clones the weights;
- a second copy of the gradients in the optimizer's step, although they already lie in one flat buffer;
- this buffer between steps, when there are no gradients;
- a gathered weight while its gradient is reduced, although all operations that use it have run their backward;
- the buffer of an all-gather of several weights, after they have been copied out of it, until the last one is used;
- the bucket that it copies gradients into before their reduction, and a second copy that joins a bucket's gradients
  for one message, although a large gradient can be sent from where it is.

The names used here are private to DeepSpeed and are checked by `tools/canary.py` and
`tests/dense/test_lean_stage3.py`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3, IPGBucketZ3
from torch import Tensor, nn

from dhen.dense.gradient_bucket import is_nearly_full


class _LeanAllGather(AllGatherCoalescedHandle):
    """An all-gather in progress. Its buffer is freed once the weights have been copied out of it."""

    def wait(self, handle_dependency: bool = True) -> None:
        """Wait, and copy the weights out of the buffer."""
        super().wait(handle_dependency)
        self.partitions, self.allgather_handle = [], None  # both refer to the buffer


class LeanStage3(DeepSpeedZeroOptimizer_Stage3):
    """ZeRO stage 3 with the same numbers and checkpoints in less memory.

    Offloaded optimizer states keep DeepSpeed's own copies, because they are in the host's memory. Without offload, a
    weight that gets no gradient has a gradient of zero; DeepSpeed would use that of an earlier step again.
    """

    _num_gradients: int
    _untouched: dict[int, Tensor]
    """Shards of gradients, by the weight's id, that are still uninitialized; on a CPU they take no memory yet."""

    @classmethod
    def take_over(cls, optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
        """Replaces __init__: change the class of an optimizer that DeepSpeed has just created."""
        optimizer.__class__ = cls
        partition_parameters.AllGatherCoalescedHandle = _LeanAllGather
        optimizer.contiguous_gradients = False  # no copy of the gradients into a bucket
        for bucket in optimizer.ipg_buckets.values():
            bucket.buffer = None
        optimizer._untouched = {}
        optimizer._num_gradients = optimizer.grad_partitions_flat_buffer.numel()
        if not optimizer.offload_optimizer:
            optimizer._share_masters()
            optimizer._free_gradients()

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: nn.Parameter) -> None:
        """DeepSpeed's hook for one gradient in the backward. Follows GradientBucket's rule for stage 3.

        A large gradient is reduced alone, without a copy, while the bucket waits. DeepSpeed itself reduces a bucket
        only when the next gradient does not fit.
        """
        dtype, take = self.get_param_comm_dtype(param), super().reduce_independent_p_g_buckets_and_remove_grads
        reduce = self._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads
        if is_nearly_full(param.ds_numel, self.reduce_bucket_size):
            self._release(param)
            waiting, self.ipg_buckets[dtype] = self.ipg_buckets[dtype], IPGBucketZ3()
            take(param)
            reduce(dtype)
            self.ipg_buckets[dtype] = waiting
        else:
            take(param)
            if is_nearly_full(self.ipg_buckets[dtype].elements, self.reduce_bucket_size):
                reduce(dtype)

    def partition_grads(self, params_to_release: list[nn.Parameter], grad_partitions: list[Tensor]) -> list[Tensor]:
        """DeepSpeed's hook for a bucket's reduced shards. Puts them into the gradients' buffer."""
        self._allocate_gradients()
        for param in params_to_release:
            if param.ds_id in self._untouched:
                self._untouched.pop(param.ds_id).zero_()
        return super().partition_grads(params_to_release, grad_partitions)

    def independent_gradient_partition_epilogue(self) -> None:
        """DeepSpeed's hook for the end of a backward. Sets the gradients of weights without one to zero."""
        with self._reduction_stream():
            self._allocate_gradients()
        super().independent_gradient_partition_epilogue()
        with self._reduction_stream():
            for shard in self._untouched.values():
                shard.zero_()
        self._untouched.clear()

    def step(self, closure: Any = None) -> None:
        """DeepSpeed's optimizer step. Afterwards nobody reads the gradients any more."""
        super().step(closure)
        if not self.offload_optimizer:
            self._free_gradients()

    def _post_step(self, timer_names: Any) -> None:
        """DeepSpeed's hook after the step. Gathers the weights that stay gathered in one message, not in one each."""
        self.invalidate_secondary_tensor()  # of hpZ: a copy of the weights before the step
        missing = [weight for weight in self.persistent_parameters if weight.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if missing:
            missing[0].all_gather_coalesced(missing).wait()
        super()._post_step(timer_names)

    def _prepare_fp32_grad_for_sub_group(self, sub_group_id: int) -> None:
        """DeepSpeed's hook that gives the optimizer the gradients of one sub-group: here a view of their buffer.

        Clipping scales the view in place. This is harmless, because nobody reads the gradients afterwards.
        """
        master, gradients = self.fp32_partitioned_groups_flat[sub_group_id], self.grad_partitions_flat_buffer
        if (gradients.dtype, gradients.device) != (master.dtype, master.device):
            super()._prepare_fp32_grad_for_sub_group(sub_group_id)
            return
        first = sum(masters.numel() for masters in self.fp32_partitioned_groups_flat[:sub_group_id])
        master.grad = gradients.narrow(0, first, master.numel())
        self.averaged_gradients[sub_group_id] = None

    @property
    def _gradient_of(self) -> dict[int, Tensor]:
        """This rank's shard of each weight's gradient, by the weight's id: views of the gradients' buffer."""
        return self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition

    def _release(self, weight: nn.Parameter) -> None:
        """Free a gathered weight, as DeepSpeed does at the end of its module's backward."""
        if not weight.ds_persist:
            weight.ds_active_sub_modules.clear()
            self._get_param_coordinator()._PartitionedParameterCoordinator__release_param(weight)

    @contextlib.contextmanager
    def _reduction_stream(self) -> Iterator[None]:
        """Run inside DeepSpeed's stream for reductions, after what the current stream has done, and before the rest."""
        stream, current = self.reduce_and_partition_stream, get_accelerator().current_stream()
        if get_accelerator().resolves_data_dependency():
            yield
            return
        stream.wait_stream(current)
        with get_accelerator().stream(stream):
            yield
        current.wait_stream(stream)

    def _share_masters(self) -> None:
        """Let master weights share the memory of weights that have their dtype and device."""
        for weights, masters in zip(self.fp16_partitioned_groups_flat, self.fp32_partitioned_groups_flat, strict=True):
            if weights is not None and (weights.dtype, weights.device) == (masters.dtype, masters.device):
                masters.data = weights.data

    def _free_gradients(self) -> None:
        self._gradient_of.clear()
        self._untouched.clear()
        self.grad_partitions_flat_buffer = self.grad_partitions_flat_buffer.new_empty(0)

    def _allocate_gradients(self) -> None:
        """Allocate the gradients' buffer, unless it is there. Each shard is set to zero before its first use.

        Call it inside the stream for reductions, which fills the buffer.
        """
        if self.grad_partitions_flat_buffer.numel() == self._num_gradients:
            return
        self.grad_partitions_flat_buffer = self.grad_partitions_flat_buffer.new_empty(self._num_gradients)
        weights = [weight for group in self.fp16_groups for weight in group]
        sizes = [weight.partition_numel() for weight in weights]
        for weight, shard in zip(weights, self.grad_partitions_flat_buffer.split(sizes), strict=True):
            self._gradient_of[weight.ds_id] = shard
        self._untouched.update(self._gradient_of)
