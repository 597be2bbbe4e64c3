"""FP16 tables whose updates are rounded stochastically (paper 3.2.3), on the CPU.

A step that is smaller than half of what FP16 resolves is lost by rounding to nearest, every time. Rounded up with the
probability of the part that is lost, it is kept on average. FBGEMM does so on CUDA and ignores the option on the CPU;
there its lookup serves the forward, and the update is done here, in float32, for the rows of the batch.
"""

from collections.abc import Sequence

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

_LARGEST = torch.finfo(torch.float16).max
_LEAST_NORMAL, _LEAST_SUBNORMAL = 2.0**-14, 2.0**-24
_DROPPED_BITS = 13
"""Bits of float32's mantissa that float16 hasn't."""


def round_stochastically(x: Tensor) -> Tensor:
    """float32 -> float16, to one of the two neighbours, so that the mean is x; beyond float16's range it saturates."""
    x = x.clamp(-_LARGEST, _LARGEST)
    # Four draws of 16 random bits in one of 64; only 13 of each are used.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_()
    draws = draws.view(torch.int16)[: x.numel()].view(x.shape).to(torch.int32).bitwise_and_((1 << _DROPPED_BITS) - 1)
    bits = x.view(torch.int32).add(draws).bitwise_and_(-1 << _DROPPED_BITS)
    rounded = bits.view(torch.float32).clamp_(-_LARGEST, _LARGEST)
    is_small = x.abs() < _LEAST_NORMAL  # there float16's numbers are equally far apart
    if is_small.any():
        small = x[is_small]
        up = draws[is_small].float().div_(1 << _DROPPED_BITS)
        rounded[is_small] = torch.floor(small / _LEAST_SUBNORMAL + up) * _LEAST_SUBNORMAL
    return rounded.half()


class RoundedTables:
    """Lookup by FBGEMM, update here. Serves the tables of one `lookup`, whose weights and states it works on.

    optimizer: "rowwise_adagrad", "adagrad" or "sgd". columns: of each shard. epsilon: Adagrad's.
    """

    def __init__(
        self, lookup: SplitTableBatchedEmbeddingBagsCodegen, columns: Sequence[int], optimizer: str, epsilon: float
    ) -> None:
        self.learning_rate = 0.0
        self._lookup, self._columns = lookup, list(columns)
        self._optimizer, self._epsilon = optimizer, epsilon
        self._leaf = torch.empty(0, requires_grad=True)  # of the graph: the weights aren't autograd's

    def __call__(self, ids: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        """Pooled embeddings, as the lookup gives them. Its backward updates the tables."""
        return _LookUp.apply(self._leaf, self, ids, offsets, per_sample_weights)

    def look_up(self, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """Forward."""
        return self._lookup(ids, offsets, per_sample_weights=weights)

    def update(self, grad: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor | None, learning_rate: float) -> None:
        """One step from the gradient of all pooled embeddings, (bags, sum of columns)."""
        tables = self._lookup.split_embedding_weights()
        states = self._lookup.split_optimizer_states() if self._optimizer != "sgd" else [[None]] * len(tables)
        num_bags = grad.shape[0]
        ends = offsets[::num_bags].tolist()
        lengths = offsets.diff()
        for table, grad_of_bags in enumerate(grad.split(self._columns, dim=1)):
            here = slice(ends[table], ends[table + 1])
            bags = torch.arange(num_bags).repeat_interleave(
                lengths[table * num_bags : (table + 1) * num_bags], output_size=here.stop - here.start
            )
            grad_of_ids = grad_of_bags[bags]
            if weights is not None:
                grad_of_ids = grad_of_ids * weights[here, None]
            rows, row_of_id = torch.unique(ids[here], return_inverse=True)
            grad_of_rows = grad.new_zeros(len(rows), grad_of_bags.shape[1]).index_add_(0, row_of_id, grad_of_ids)
            step = self._step(rows, grad_of_rows, states[table][0])
            tables[table][rows] = round_stochastically(tables[table][rows].float() - learning_rate * step)

    def _step(self, rows: Tensor, grad: Tensor, state: Tensor | None) -> Tensor:
        """What a learning rate of 1 would take off the rows."""
        if state is None:
            return grad
        squares = grad.square()
        sums = state[rows] + (squares.mean(1) if self._optimizer == "rowwise_adagrad" else squares)
        state[rows] = sums
        scale = sums.sqrt().add_(self._epsilon)
        return grad / (scale[:, None] if scale.dim() == 1 else scale)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        _: Tensor,
        tables: RoundedTables,
        ids: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
    ) -> Tensor:
        ctx.tables, ctx.inputs, ctx.learning_rate = tables, (ids, offsets, weights), tables.learning_rate
        return tables.look_up(ids, offsets, weights)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, ...]:
        ctx.tables.update(grad, *ctx.inputs, ctx.learning_rate)
        return None, None, None, None, None
