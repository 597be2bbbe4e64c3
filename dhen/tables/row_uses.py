"""Which rows of the tables training has used.

A row that training never used still has its random start, which says nothing about a click. At evaluation and export it
counts as the mean of its table's rows, weighted by how often training used each of them.

Shapes: S lookups, each in a table, R bags per lookup, C sum of the lookups' columns.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

MOST_USES = 1 << 29
_BLOCK_ROWS = 1 << 16


class RowUses:
    """How often training used each row of some tables: one int32 per row.

    If a count grows beyond half a billion, all are halved and rounded up. So they fit, a used row stays a used one, and
    the ratios of the counts, which are the weights of the mean, stay the same.

    added: number of uses counted since. halves_itself: whether adding halves counts that may be too large.

    >>> uses = RowUses([3, 2], torch.device("cpu"))
    >>> uses.add(torch.tensor([0, 2, 2, 1]), torch.tensor([3, 1]))
    >>> uses.of(0).tolist(), uses.of(1).tolist()
    ([1, 0, 2], [0, 1])
    """

    def __init__(self, rows: Sequence[int], device: torch.device, table_of_lookup: Sequence[int] | None = None) -> None:
        """rows: of each table. table_of_lookup: by default, each table has one lookup."""
        self._rows = list(rows)
        self.table_of_lookup = list(range(len(self._rows)) if table_of_lookup is None else table_of_lookup)
        starts = torch.tensor([0, *self._rows], device=device).cumsum(0)
        self._starts_S = starts[torch.tensor(self.table_of_lookup, dtype=torch.int64, device=device)]
        self.counts = torch.zeros(sum(self._rows), dtype=torch.int32, device=device)
        self.added, self.halves_itself = 0, True

    def of(self, table: int) -> Tensor:
        """The counts of table number `table`, (rows,): a view."""
        return self.rows_of(self.counts, table)

    def rows_of(self, values: Tensor, table: int) -> Tensor:
        """A table's part of one value per row of all tables: a view."""
        first = sum(self._rows[:table])
        return values[first : first + self._rows[table]]

    def add(self, ids: Tensor, counts_S: Tensor) -> None:
        """Count one use of each id. ids: ordered by lookup. counts_S: ids of each."""
        self.add_rows(self.rows_at(ids, counts_S))

    def rows_at(self, ids: Tensor, counts_S: Tensor) -> Tensor:
        """The rows of ids that are ordered by lookup, counted over all tables. The ids' dtype must hold them."""
        return ids + self._starts_S.to(ids.dtype).repeat_interleave(counts_S, output_size=ids.numel())

    def add_rows(self, rows: Tensor) -> None:
        """Count one use of each of `rows_at`."""
        self.counts.index_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))
        self.added += rows.numel()
        if self.halves_itself and self.added >= MOST_USES:
            self.halve()
            self.added = 0

    def halve(self) -> None:
        """Halve the counts while one is too large. Call it after the counts were loaded."""
        while self.counts.numel() and self.counts.max() > MOST_USES:
            self.counts.add_(1).div_(2, rounding_mode="floor")

    def is_unused(self, ids: Tensor, counts_S: Tensor) -> Tensor:
        """For each id, whether its row was never used. ids: ordered by lookup."""
        return self.counts[self.rows_at(ids, counts_S)] == 0


@torch.no_grad()
def mean_row(weight: Tensor, uses: Tensor) -> Tensor:
    """The mean of a table's rows, weighted by their uses: float32, (columns,). Zeros if no row was used."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=uses.device)
    for rows, counts in zip(weight.split(_BLOCK_ROWS), uses.split(_BLOCK_ROWS), strict=True):
        total += counts.double() @ rows.to(uses.device).double()
    return (total / uses.sum().clamp(min=1)).float()


def fill_unused(rows: Tensor, uses: Tensor, mean: Tensor | None = None) -> Tensor:
    """Overwrite the rows that were never used by the mean, by default that of these rows. Returns `rows`."""
    mean = mean_row(rows, uses) if mean is None else mean
    rows[uses.to(rows.device) == 0] = mean.to(rows)
    return rows


class UnseenIds:
    """The ids of one evaluation whose rows training never used: counts them, and lets the mean stand for their rows.

    counts_3S: for each lookup, the number of ids, of those with an unused row, and of the latter those that are 0.
    """

    def __init__(self, uses: RowUses, means: Callable[[], Sequence[Tensor]] | None) -> None:
        """means: returns `mean_row` of each table; called when the first unused row is met, because it reads all rows;
        on a GPU in any case. None: the unused rows already hold the mean, as in an exported model.
        """
        self._uses, self._compute_means = uses, means
        self.counts_3S = torch.zeros(3, len(uses.table_of_lookup), dtype=torch.int64, device=uses.counts.device)

    def split(self, ids: Tensor, lengths_SR: Tensor, weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Count the ids of S * R bags, and give unused rows weight 0. lengths_SR: ids in each bag.

        Returns the weights per id, and missing_SR: how much weight each bag has lost. None: every weight is 1, or
        nothing is missing.
        """
        counts_S = lengths_SR.sum(1)
        is_unused = self._uses.is_unused(ids, counts_S)
        lookups = torch.arange(len(counts_S), device=ids.device)
        lookup_of_id = lookups.repeat_interleave(counts_S, output_size=ids.numel())
        for row, counted in enumerate((torch.ones_like(is_unused), is_unused, is_unused & (ids == 0))):
            self.counts_3S[row].index_add_(0, lookup_of_id, counted.long())
        # A GPU is not asked, because the host would wait for its answer.
        if self._compute_means is None or (ids.device.type == "cpu" and not is_unused.any()):
            return weights, None
        weights = torch.ones_like(ids, dtype=torch.float32) if weights is None else weights
        bags = torch.arange(lengths_SR.numel(), device=ids.device)
        bag_of_id = bags.repeat_interleave(lengths_SR.flatten(), output_size=ids.numel())
        missing = torch.zeros(lengths_SR.numel(), device=ids.device)
        missing.index_add_(0, bag_of_id, weights.where(is_unused, 0.0))
        return weights.where(~is_unused, 0.0), missing.view_as(lengths_SR)

    def mean_parts(self, missing_SR: Tensor) -> Tensor:
        """What the missing rows add to the pooled embeddings, (R, C)."""
        lookup_of_column_C, means_C = self._means
        return missing_SR[lookup_of_column_C].t() * means_C

    @cached_property
    def _means(self) -> tuple[Tensor, Tensor]:
        of_tables = list(self._compute_means())
        means = [of_tables[table] for table in self._uses.table_of_lookup]
        lookups = [torch.full_like(mean, lookup, dtype=torch.int64) for lookup, mean in enumerate(means)]
        return torch.cat(lookups), torch.cat(means)
