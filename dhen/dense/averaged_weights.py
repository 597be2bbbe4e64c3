"""The exponential moving average of the dense part's weights, sharded as ZeRO shards the weights themselves.

Each rank averages the fp32 weights that its optimizer updates: all of them in stage 0, its shard in stages 1 to 3, in
host memory if the optimizer is offloaded. Running statistics of batch norms are averaged, too.

The names of DeepSpeed's optimizers that are used here are private. `tests/training/test_moving_average.py` checks them
at each stage.
"""

import contextlib
from collections.abc import Iterator, Mapping

import deepspeed
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param
from torch import Tensor


class AveragedWeights:
    """The average of the weights and floating-point buffers of `engine`'s module. It begins at the present ones."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self._engine, self._is_swapped = engine, False
        self._averages = [tensor.detach().float().clone() for tensor in self._raw()]

    @property
    def buffers(self) -> list[Tensor]:
        """The averages of the buffers, on this rank."""
        return self._averages[len(masters_of(self._engine)) :]

    @torch.no_grad()
    def after_step(self, decay: float) -> None:
        """Average in the weights after a step. decay: share of the average that stays."""
        assert not self._is_swapped
        torch._foreach_lerp_(self._averages, [raw.detach().float() for raw in self._raw()], 1 - decay)

    def restart(self) -> None:
        """Let the average begin at the present weights."""
        for average, raw in zip(self._averages, self._raw(), strict=True):
            average.copy_(raw)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside this context the module has the averages. Communicates under ZeRO; all ranks enter together.

        After an error the averages stay: to put the weights back, a rank would wait for others that have no error.
        """
        if self._is_swapped:
            yield
            return
        self._is_swapped = True
        self._swap()
        yield
        self._swap()
        self._is_swapped = False

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the averages from the full tensors of the module's state. Communicates; all ranks call it."""
        module = self._engine.module
        with self.swapped_in(), torch.no_grad():
            for name, weight in module.named_parameters():
                if not weight.requires_grad or name not in state:  # frozen, or ANCHOR of trained_parts.py
                    continue
                set_whole(self._engine, weight, state[name])
            for name, buffer in module.named_buffers():
                if name in state:
                    buffer.copy_(state[name])

    def _raw(self) -> list[Tensor]:
        buffers = self._engine.module.buffers()
        return masters_of(self._engine) + [buffer for buffer in buffers if buffer.is_floating_point()]

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange weights and averages, then let the module's weights follow the optimizer's."""
        for average, raw in zip(self._averages, self._raw(), strict=True):
            kept = raw.detach().clone()
            raw.data.copy_(average)
            average.copy_(kept)
        optimizer = self._engine.optimizer
        if not self._engine.zero_optimization():
            return
        if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer._post_step([])


def masters_of(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """The fp32 weights that this rank's optimizer updates: all in stage 0, flat shards of them in stages 1 to 3."""
    optimizer = engine.optimizer
    if not engine.zero_optimization():
        return [weight for group in optimizer.param_groups for weight in group["params"]]
    is_stage3 = isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)
    return list(optimizer.fp32_partitioned_groups_flat if is_stage3 else optimizer.single_partition_of_fp32_groups)


def set_whole(engine: deepspeed.DeepSpeedEngine, weight: Tensor, value: Tensor) -> None:
    """Write the whole `value` of a trained weight into the fp32 weights of `masters_of`. Does not communicate."""
    value = value.to(engine.device)
    if hasattr(weight, "ds_id"):
        # safe_set_full_fp32_param fails if the last shard is padded.
        size, rank = weight.partition_numel(), engine.optimizer._get_param_partition_rank(weight)
        shard = value.flatten()[rank * size : (rank + 1) * size]
        safe_get_local_fp32_param(weight)[: shard.numel()].copy_(shard)
    elif engine.zero_optimization():
        safe_set_full_fp32_param(weight, value)
    else:
        weight.copy_(value)
