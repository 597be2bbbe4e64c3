"""FP16 tables with stochastically rounded updates (paper 3.2.1), on CPU.

Rounding to nearest loses every update that is smaller than half the distance between two FP16 numbers. Stochastic
rounding rounds up with a probability equal to the fraction that would be lost, so the update is kept on average.
FBGEMM does this on CUDA but ignores the option on CPU. On CPU, FBGEMM does the lookup, and the update is done here, in
float32, for the rows of the batch.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torch.nn.functional import embedding_bag

_LARGEST = torch.finfo(torch.float16).max
_LEAST_NORMAL = torch.finfo(torch.float16).smallest_normal
_DROPPED_BITS = 13
"""Mantissa bits of float32 that float16 does not have."""
_AT_ONCE = 1 << 16
"""Numbers that are updated together; few enough for the intermediate results to stay in the CPU's cache."""


def round_stochastically(x: Tensor) -> Tensor:
    """Round float32 to one of the two neighboring float16 numbers, so that the mean is x. Saturates out of range."""
    x = x.clamp(-_LARGEST, _LARGEST)
    # Subnormal float16 numbers are evenly spaced, as far apart as the smallest normal ones. Shifted into that range,
    # they round like all other numbers.
    shift = torch.copysign((x.abs() < _LEAST_NORMAL).float().mul_(_LEAST_NORMAL), x)
    bits = x.add_(shift).view(torch.int32)
    # One 64-bit draw serves as four 16-bit draws, of which 13 bits each are used.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_()
    draws = draws.view(torch.int16)[: x.numel()].view(x.shape).bitwise_and_((1 << _DROPPED_BITS) - 1)
    bits.add_(draws).bitwise_and_(-1 << _DROPPED_BITS)
    return x.sub_(shift).half()


@dataclass(frozen=True)
class _Width:
    """Adjacent tables of equal width, joined into one.

    tables: range of table numbers, end exclusive. columns: range of columns in the lookup's output, end exclusive.
    first_rows: number of each table's first row.
    """

    tables: tuple[int, int]
    columns: tuple[int, int]
    first_rows: Tensor
    weight: Tensor
    state: Tensor | None


class RoundedTables:
    """Looks up with FBGEMM's `lookup`, and updates its weights and optimizer states in place.

    Adjacent tables of equal width are updated together, so tables should be ordered by width. optimizer:
    "rowwise_adagrad", "adagrad" or "sgd". epsilon: Adagrad's.
    """

    def __init__(self, lookup: SplitTableBatchedEmbeddingBagsCodegen, optimizer: str, epsilon: float) -> None:
        self.learning_rate = 0.0
        self.lookup = lookup
        self._optimizer, self._epsilon = optimizer, epsilon
        self._leaf = torch.empty(0, requires_grad=True)  # so that backward runs: autograd does not track the weights
        self._widths = _by_width(lookup, has_state=optimizer != "sgd")

    def __call__(self, ids: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        """The lookup's pooled embeddings. Their backward updates the tables."""
        return _LookUp.apply(self._leaf, self, ids, offsets, per_sample_weights)

    def update(self, grad: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor | None, learning_rate: float) -> None:
        """The backward: one optimizer step. grad: of all pooled embeddings, (bags, sum of columns)."""
        num_bags = grad.shape[0]
        for of_width in self._widths:
            first, last = of_width.tables
            ends = offsets[first * num_bags : last * num_bags + 1]
            here = slice(int(ends[0]), int(ends[-1]))
            bags = torch.arange(len(ends) - 1, dtype=ids.dtype)
            bag_of_id = bags.repeat_interleave(ends.diff(), output_size=here.stop - here.start)
            table_of_id = bag_of_id // num_bags
            by_row, order = (ids[here] + of_width.first_rows[table_of_id]).sort(stable=True)
            rows, counts = by_row.unique_consecutive(return_counts=True)
            # A row of `grads` is one bag's gradient for one table; bags are numbered table by table.
            grads = grad[:, slice(*of_width.columns)].reshape(-1, of_width.weight.shape[1])
            grad_of_id = ((bag_of_id - table_of_id * num_bags) * (last - first) + table_of_id)[order]
            weight_of_id = None if weights is None else weights[here][order]
            starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(ids.dtype)
            at_once = max(1, _AT_ONCE // grads.shape[1])
            for row in range(0, len(rows), at_once):
                of_rows = starts[row : row + at_once + 1]
                of_ids = slice(int(of_rows[0]), int(of_rows[-1]))
                # A row's gradient is the sum of its ids' bag gradients: again a lookup, of bags instead of rows.
                grad_of_rows = embedding_bag(
                    grad_of_id[of_ids],
                    grads,
                    of_rows[:-1] - of_rows[0],
                    mode="sum",
                    per_sample_weights=None if weight_of_id is None else weight_of_id[of_ids],
                )
                self._update_rows(of_width, rows[row : row + at_once], grad_of_rows, learning_rate)

    def _update_rows(self, of_width: _Width, rows: Tensor, grad: Tensor, learning_rate: float) -> None:
        before = of_width.weight[rows].float()
        step = self._step(rows, grad, of_width.state)
        of_width.weight[rows] = round_stochastically(before.sub_(step, alpha=learning_rate))

    def _step(self, rows: Tensor, grad: Tensor, state: Tensor | None) -> Tensor:
        """The update for a learning rate of 1, to be subtracted from the rows."""
        if state is None:
            return grad
        squares = grad.square()
        sums = state[rows] + (squares.mean(1) if self._optimizer == "rowwise_adagrad" else squares)
        state[rows] = sums
        scale = sums.sqrt().add_(self._epsilon)
        return grad / (scale[:, None] if scale.dim() == 1 else scale)


def _by_width(lookup: SplitTableBatchedEmbeddingBagsCodegen, *, has_state: bool) -> list[_Width]:
    weights = lookup.split_embedding_weights()
    states = [state for (state,) in lookup.split_optimizer_states()] if has_state else None
    widths, column, first = [], 0, 0
    for width, group in groupby(weights, key=lambda weight: weight.shape[1]):
        tables = list(group)
        last = first + len(tables)
        rows = torch.tensor([0] + [len(table) for table in tables]).cumsum(0)
        rows = rows.to(torch.int32) if rows[-1] <= torch.iinfo(torch.int32).max else rows
        widths.append(
            _Width(
                tables=(first, last),
                columns=(column, column + width * len(tables)),
                first_rows=rows[:-1],
                weight=_joined(tables),
                state=None if states is None else _joined(states[first:last]),
            )
        )
        column, first = column + width * len(tables), last
    return widths


def _joined(tables: list[Tensor]) -> Tensor:
    """One tensor over all rows of tables that FBGEMM stores back to back. Shares their memory."""
    joined = tables[0].as_strided((sum(map(len, tables)), *tables[0].shape[1:]), tables[0].stride())
    ends = [table.data_ptr() + table.nbytes for table in tables]
    assert [table.data_ptr() for table in tables[1:]] == ends[:-1]
    return joined


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
        return tables.lookup(ids, offsets, per_sample_weights=weights)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, ...]:
        ids, offsets, weights = ctx.inputs
        ctx.tables.update(grad, ids, offsets, weights, ctx.learning_rate)
        return None, None, None, None, None
