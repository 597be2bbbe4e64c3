"""Table updates that FBGEMM does not have: stochastic rounding of FP16 tables on CPU, and Adam.

FBGEMM does the lookup. The update is done here, in float32, as part of the backward like FBGEMM's own.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, islice, pairwise

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torch.nn.functional import embedding_bag

from dhen.config.dhen_section import TableOptimizer
from dhen.tables.replicas import SummedGradients
from dhen.tables.stochastic_rounding import round_stochastically
from dhen.tables.widths import Width, by_width

_AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 26}
"""Numbers that are updated together. On a CPU, few enough for the intermediate results to stay in its cache."""


@dataclass(frozen=True)
class TableUpdate:
    """How the tables are updated.

    epsilon: Adagrad's or Adam's. betas: Adam's. l2: L2 regularization of whole tables. With Adam it is coupled: each
    update adds l2 * weight to the gradient of every row, as torch.optim.Adam's weight_decay does. Without l2, Adam
    updates only the rows that were looked up, as torch.optim.SparseAdam and FBGEMM do. With the other optimizers l2 is
    decoupled: each step ends with a multiplication of every row by 1 - learning rate * l2. has_new_rows: the rows that
    training had not used at the start have a learning rate of their own.
    """

    optimizer: TableOptimizer = "rowwise_adagrad"
    epsilon: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.999)
    l2: float = 0.0
    has_new_rows: bool = False

    @property
    def touches_all_rows(self) -> bool:
        """Whether an update changes rows that were not looked up."""
        return self.optimizer == "adam" and self.l2 > 0


_RowGradients = tuple[int, Tensor | slice, Tensor, Tensor]
"""Number of a width, rows counted within it, their gradients, and how many ids used each."""


class UpdatedTables:
    """Looks up with FBGEMM's `lookup`, and updates its weights and optimizer states in place.

    Adjacent tables of equal width are updated together, so tables should be ordered by width. rounds: whether fp16
    weights are rounded stochastically. is_new: whether a row, counted over all tables, takes the second of the two
    `learning_rates`. Every optimizer's step is its learning rate times a term that does not depend on the rate, so each
    row moves exactly as if the whole table had its rate. replicas: adds up the rows' gradients over them. steps: number
    of updates, for Adam's bias correction; it may be overwritten in place.
    """

    def __init__(
        self,
        lookup: SplitTableBatchedEmbeddingBagsCodegen,
        update: TableUpdate,
        *,
        rounds: bool = True,
        is_new: Tensor | None = None,
        replicas: SummedGradients | None = None,
    ) -> None:
        self.learning_rates = (0.0, 0.0)
        self.lookup, self._update, self._rounds, self._replicas = lookup, update, rounds, replicas
        self._leaf = torch.empty(0, requires_grad=True)  # so that backward runs: autograd does not track the weights
        self.steps = torch.zeros(1, dtype=torch.int64)
        self._widths = by_width(lookup.split_embedding_weights())
        rows = [len(of_width.weight) for of_width in self._widths]
        self._is_new = [None] * len(rows) if is_new is None else is_new.split(rows)
        # By lookup: the first row of its table, the first lookup of its width, and the number of lookups of its width.
        device, self._num_rows = self._widths[0].weight.device, sum(rows)
        row_dtype = torch.int32 if self._num_rows <= torch.iinfo(torch.int32).max else torch.int64
        firsts = list(accumulate(chain.from_iterable(of_width.rows for of_width in self._widths), initial=0))
        table_of_lookup = lookup.feature_table_map
        self._first_row = torch.tensor([firsts[table] for table in table_of_lookup], dtype=row_dtype, device=device)
        of_lookups, self._columns, column = [], [], 0
        for of_width in self._widths:
            count = sum(table in range(*of_width.tables) for table in table_of_lookup)
            of_lookups += [(len(of_lookups), count)] * count
            self._columns.append(slice(column, column := column + count * of_width.weight.shape[1]))
        self._first_lookup, self._num_lookups = torch.tensor(of_lookups, dtype=torch.int32, device=device).t()
        # Where the rows of each width begin, and where the last ones end.
        self._bounds = torch.tensor(list(accumulate(rows, initial=0)), dtype=row_dtype, device=device)
        if update.optimizer == "adam":
            self._states = [
                [torch.zeros_like(of_width.weight, dtype=torch.float32) for _ in range(2)] for of_width in self._widths
            ]
        else:
            by_kind = [] if update.optimizer == "sgd" else list(zip(*lookup.split_optimizer_states(), strict=True))
            self._states = [[of_width.joined(kind) for kind in by_kind] for of_width in self._widths]

    def split_optimizer_states(self) -> list[tuple[Tensor, ...]]:
        """Adam's two states of each table, (rows, columns): views."""
        by_width = zip(self._widths, self._states, strict=True)
        split = [[state.split(of_width.rows) for state in of] for of_width, of in by_width]
        return [of_table for by_state in split for of_table in zip(*by_state, strict=True)]

    def __call__(self, ids: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        """The lookup's pooled embeddings. Their backward updates the tables."""
        return _LookUp.apply(self._leaf, self, ids, offsets, per_sample_weights)

    def update(
        self, grad: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor | None, rates: tuple[float, float]
    ) -> None:
        """The backward: one optimizer step. grad: of all pooled embeddings, (bags, sum of columns).

        rates: the learning rates of old and of new rows.
        """
        self.steps += 1
        found = self._gradients(grad, ids, offsets, weights)
        if self._replicas is not None:
            found = self._summed(found)
        for index, rows, grad_of_rows, _ in found:
            is_new = self._is_new[index]
            rate = rates[0] if is_new is None else torch.where(is_new[rows], rates[1], rates[0])[:, None]
            self._update_rows(self._widths[index], self._states[index], rows, grad_of_rows, rate)

    def _gradients(
        self, grad: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor | None
    ) -> Iterator["_RowGradients"]:
        """The gradients of the rows to update, piece by piece."""
        num_bags = grad.shape[0]
        bags = torch.arange(len(offsets) - 1, dtype=ids.dtype, device=ids.device)
        bag_of_id = bags.repeat_interleave(offsets.diff(), output_size=len(ids))
        lookup_of_id = bag_of_id // num_bags
        by_row, order = (ids + self._first_row[lookup_of_id]).sort(stable=True)
        # A row of a width's `grads` is one bag's gradient for one lookup; bags are numbered lookup by lookup.
        example_of_id, in_width = bag_of_id - lookup_of_id * num_bags, lookup_of_id - self._first_lookup[lookup_of_id]
        grad_of_id = (example_of_id * self._num_lookups[lookup_of_id] + in_width)[order]
        weight_of_id = None if weights is None else weights[order]
        starts, pieces = self._pieces(by_row)
        for index, (of_width, of_rows) in enumerate(zip(self._widths, pieces, strict=True)):
            grads = grad[:, self._columns[index]].reshape(-1, of_width.weight.shape[1])
            for first, last, first_id, last_id in of_rows:
                # A row's gradient is the sum of its ids' bag gradients: again a lookup, of bags instead of rows.
                grad_of_rows = embedding_bag(
                    grad_of_id[first_id:last_id],
                    grads,
                    (starts[first:last] - first_id).to(grad_of_id.dtype),
                    mode="sum",
                    per_sample_weights=None if weight_of_id is None else weight_of_id[first_id:last_id],
                )
                if self._update.touches_all_rows:
                    rows = slice(first - of_width.first_row, last - of_width.first_row)
                else:
                    rows = by_row[starts[first:last]] - of_width.first_row
                yield index, rows, grad_of_rows, starts[first + 1 : last + 1] - starts[first:last]

    def _summed(self, found: Iterable["_RowGradients"]) -> Iterator["_RowGradients"]:
        """The same, of all replicas."""
        own = [[] for _ in self._widths]
        for index, *parts in found:
            own[index].append(parts)
        no_rows = torch.empty(0, dtype=torch.int64, device=self._bounds.device)
        joined = [
            [torch.cat(part) for part in zip(*of, strict=True)]
            or [no_rows, of_width.weight.new_empty(0, of_width.weight.shape[1], dtype=torch.float32), no_rows]
            for of, of_width in zip(own, self._widths, strict=True)
        ]
        for index, summed in enumerate(self._replicas.add_up(joined)):
            size = self._rows_at_once(index)
            yield from ((index, *parts) for parts in zip(*(part.split(size) for part in summed), strict=True))

    def _pieces(self, by_row: Tensor) -> tuple[Tensor, list[list[tuple[int, int, int, int]]]]:
        """Cut the rows to update into pieces. by_row: the row of each id, counted over all tables, in ascending order.

        Returns where the ids of each updated row begin, and for each width the first and the last updated row of each
        piece and the first and the last of their ids, ends exclusive. The host waits for the device once.
        """
        num_ids, touches_all = len(by_row), self._update.touches_all_rows
        if touches_all:
            counts = by_row.new_zeros(self._num_rows + 1)
            starts, bounds = counts.index_add_(0, by_row + 1, torch.ones_like(by_row)).cumsum(0), self._bounds
        else:
            begins = torch.ones_like(by_row, dtype=torch.bool)
            begins[1:] = by_row[1:] != by_row[:-1]
            # Padded to a size that the host knows.
            starts = begins.nonzero_static(size=num_ids + 1, fill_value=num_ids)[:, 0]
            before = torch.cat([begins.new_zeros(1), begins]).cumsum(0)
            bounds = before[torch.searchsorted(by_row, self._bounds)]
        sizes = list(map(self._rows_at_once, range(len(self._widths))))
        cuts = [bounds]
        for index, (size, of_width) in enumerate(zip(sizes, self._widths, strict=True)):
            most = len(of_width.weight) if touches_all else min(num_ids, len(of_width.weight))
            rows = bounds[index] + torch.arange(0, most + size, size, device=by_row.device)
            cuts.append(starts[rows.minimum(bounds[index + 1])])
        numbers = iter(torch.cat(cuts).tolist())
        bounds, *cuts = (list(islice(numbers, len(cut))) for cut in cuts)
        pieces = []
        for size, of_ids, (first, last) in zip(sizes, cuts, pairwise(bounds), strict=True):
            ends = [min(last, row) for row in range(first, last + size, size)]
            pieces.append([(*rows, *ids) for rows, ids in zip(pairwise(ends), pairwise(of_ids), strict=False)])
        return starts, pieces

    def _rows_at_once(self, index: int) -> int:
        weight = self._widths[index].weight
        return max(1, _AT_ONCE[weight.device.type] // weight.shape[1])

    def _update_rows(
        self,
        of_width: Width,
        states: list[Tensor],
        rows: Tensor | slice,
        grad: Tensor,
        rate: float | Tensor,
    ) -> None:
        after = of_width.weight[rows].float()
        if self._update.touches_all_rows:
            grad = grad.add_(after, alpha=self._update.l2)
        of_rows = [state[rows] for state in states]
        step = self._step(grad, of_rows)
        after = after.sub_(step, alpha=rate) if isinstance(rate, float) else after.sub_(step * rate)
        if of_width.weight.dtype == torch.float16 and self._rounds:
            after = round_stochastically(after, None if self._replicas is None else self._replicas.generator)
        of_width.weight[rows] = after.to(of_width.weight.dtype)
        for state, new in zip(states, of_rows, strict=True):
            state[rows] = new

    def _step(self, grad: Tensor, states: list[Tensor]) -> Tensor:
        """The update for a learning rate of 1, to be subtracted from the rows. Updates the rows' states in place."""
        optimizer, epsilon = self._update.optimizer, self._update.epsilon
        if optimizer == "sgd":
            return grad
        if optimizer == "adam":
            (mean, square), (beta1, beta2), steps = states, self._update.betas, int(self.steps)
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            scale = square.sqrt().div_((1 - beta2**steps) ** 0.5).add_(epsilon)
            return mean.div(scale).div_(1 - beta1**steps)
        (sums,) = states
        squares = grad.square()
        sums += squares.mean(1) if optimizer == "rowwise_adagrad" else squares
        scale = sums.sqrt().add_(epsilon)
        return grad / (scale[:, None] if scale.dim() == 1 else scale)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        _: Tensor,
        tables: UpdatedTables,
        ids: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
    ) -> Tensor:
        ctx.tables, ctx.inputs, ctx.rates = tables, (ids, offsets, weights), tables.learning_rates
        return tables.lookup(ids, offsets, per_sample_weights=weights)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, ...]:
        ids, offsets, weights = ctx.inputs
        ctx.tables.update(grad, ids, offsets, weights, ctx.rates)
        return None, None, None, None, None
