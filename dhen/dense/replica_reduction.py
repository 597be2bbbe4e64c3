"""Averages gradient shards between the replicas of hybrid sharding, during the backward (paper 3.2.2, figure 5)."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dhen.runtime.topology import ShardGroups


class ReplicaReduction:
    """Averages gradient shards over the replica group while the backward continues.

    wire_dtype: dtype of the all-reduce; None keeps the gradients' own. is_async: False waits at once, for comparison.
    """

    def __init__(self, groups: ShardGroups, wire_dtype: torch.dtype | None = None, *, is_async: bool = True) -> None:
        self.groups, self._is_async = groups, is_async
        self.wire_dtype, self.shard_size = wire_dtype, groups.shard_size
        self._pending: list[tuple[dist.Work, Callable[[], None]]] = []  # with what to do with the average
        self._owed: dict[int, nn.Parameter] = {}

    def start(self, shards: Sequence[Tensor], put_away: Callable[[list[Tensor]], None]) -> None:
        """Start averaging a copy of `shards` in one all-reduce. Communicates over the replica group.

        `finish` calls `put_away` with the averages, in the shapes and dtypes of `shards`.
        """
        on_wire = torch.cat([shard.reshape(-1) for shard in shards]).div_(self.groups.num_replicas)
        if self.wire_dtype is not None:
            on_wire = saturate(on_wire, self.wire_dtype, self.groups.num_replicas).to(self.wire_dtype)
        # Keep only the shapes and dtypes of the shards, not their memory.
        like = [torch.empty_like(shard, device="meta") for shard in shards]

        def put_parts_away() -> None:
            parts = on_wire.split([shard.numel() for shard in like])
            put_away([part.view(shard.shape).to(shard.dtype) for part, shard in zip(parts, like, strict=True)])

        self._send(on_wire, put_parts_away)

    def start_in_place(self, gradients: Tensor) -> None:
        """Start averaging `gradients` where they lie, in their own dtype. Communicates over the replica group.

        Nobody may read or write them before `finish` returns.
        """
        self._send(gradients.div_(self.groups.num_replicas), lambda: None)

    def _send(self, on_wire: Tensor, put_away: Callable[[], None]) -> None:
        handle = dist.all_reduce(on_wire, group=self.groups.replica, async_op=True)
        self._pending.append((handle, put_away))
        if not self._is_async:
            handle.wait()

    def finish(self, *, is_last: bool) -> None:
        """Wait for all averages and put them away, in the order in which they were started.

        Raises RuntimeError in the last micro step if a weight had a gradient in an earlier one, but has none now.
        """
        for handle, put_away in self._pending:
            handle.wait()
            put_away()
        self._pending.clear()
        if is_last and self._owed:
            shapes = ", ".join(str(tuple(getattr(weight, "ds_shape", weight.shape))) for weight in self._owed.values())
            raise RuntimeError(
                f"weights of shape {shapes} had a gradient in an earlier micro step, but none in the last one, which "
                "averages them between replicas. Let every weight take part in the last micro step, or use "
                "gradient_accumulation_steps 1."
            )

    def note(self, weights: Sequence[nn.Parameter], *, is_last: bool) -> None:
        """Note which weights have a gradient in this micro step."""
        for weight in weights:
            if is_last:
                self._owed.pop(id(weight), None)
            else:
                self._owed[id(weight)] = weight

    def agreed(self, norm: Tensor) -> Tensor:
        """Return the first replica's `norm` on all replicas. Communicates over the replica group.

        Nodes may sum in different orders; without this, their clipped gradients could differ in the last bit.
        """
        first = norm.to(get_accelerator().current_device_name(), copy=True)
        dist.broadcast(first, dist.get_global_rank(self.groups.replica, 0), group=self.groups.replica)
        return first.to(norm.device)


def saturate(values: Tensor, dtype: torch.dtype, num_terms: int) -> Tensor:
    """Clamp `values` so that a sum of `num_terms` of them stays in the range of `dtype`.

    inf and NaN are kept: they tell DeepSpeed about an overflow, so that it skips the step.
    """
    largest = torch.finfo(dtype).max / num_terms
    if largest >= torch.finfo(values.dtype).max:
        return values
    return torch.where(values.isinf(), values, values.clamp(-largest, largest))
