"""The exponential moving average of one rank's tables, exact, at the cost of the rows that change.

The average after step t is e_t = d_t e_(t-1) + (1 - d_t) w_t. While a row's weight w does not change, e - w only
shrinks: by the product of the decays. So a row is brought up to date when it is about to change, and all rows are
before an evaluation. A save keeps how far each row is behind: bringing them up to date would round them once more. The
average is float32, and takes as much memory as a float32 table.
"""

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from dhen.tables.lookup import make_lookup
from dhen.tables.widths import by_width

_ROWS_AT_ONCE = 1 << 16


class AveragedTables:
    """The average of the tables with these raw `weights`, which FBGEMM stores back to back.

    lookup: looks up and pools averaged rows, as FBGEMM does with raw ones. Call `settle` before it is used.
    all_rows_change: whether each step may change rows that were not looked up. Then each step costs all rows.
    table_of_lookup: as in `make_lookup`.

    settled_at: by table, the log_decay at which each row was last brought up to date, float64 (rows,). log_decay: the
    logarithm of the decays since all were, float64 (1,), on the host.
    """

    def __init__(
        self, weights: Sequence[Tensor], *, all_rows_change: bool, table_of_lookup: Sequence[int] | None = None
    ) -> None:
        shapes, device = [tuple(weight.shape) for weight in weights], weights[0].device
        self.lookup = make_lookup(shapes, device, "sgd", table_of_lookup=table_of_lookup)
        self.weights = self.lookup.split_embedding_weights()
        self.all_rows_change = all_rows_change
        widths = by_width(weights)
        self._raw = [of_width.weight for of_width in widths]
        self._averages = [of_width.weight for of_width in by_width(self.weights)]
        self.log_decay = torch.zeros(1, dtype=torch.float64)
        self._settled_at = [torch.zeros(len(raw), dtype=torch.float64, device=raw.device) for raw in self._raw]
        parts = [whole.split(of_width.rows) for whole, of_width in zip(self._settled_at, widths, strict=True)]
        self.settled_at = list(chain.from_iterable(parts))
        self.restart()

    def restart(self) -> None:
        """Let the average begin at the present weights."""
        for average, raw in zip(self._averages, self._raw, strict=True):
            average.copy_(raw)
        self.is_settled_now()

    def is_settled_now(self) -> None:
        """Take the averages as those of the present step."""
        self.log_decay.zero_()
        for settled_at in self._settled_at:
            settled_at.zero_()

    def before_update(self, rows: Tensor) -> None:
        """Bring the rows up to date that are about to change. rows: counted over all tables; some may repeat."""
        if self.all_rows_change:
            return
        first = 0
        for index, raw in enumerate(self._raw):
            # Rows of other widths become row 0, which may be brought up to date, too. Selecting would wait for a GPU.
            own = rows if len(self._raw) == 1 else (rows - first).where((rows >= first) & (rows < first + len(raw)), 0)
            self._settle(index, own)
            first += len(raw)

    @torch.no_grad()
    def after_step(self, decay: float) -> None:
        """Average in the weights after a step."""
        if self.all_rows_change:
            for average, raw in zip(self._averages, self._raw, strict=True):
                for rows, of_raw in zip(average.split(_ROWS_AT_ONCE), raw.split(_ROWS_AT_ONCE), strict=True):
                    rows.lerp_(of_raw.float(), 1 - decay)  # float copies fp16 rows
        else:
            self.log_decay += math.log(decay)

    def settle(self) -> None:
        """Bring all rows up to date."""
        if self.log_decay.item():
            for index, raw in enumerate(self._raw):
                for row in range(0, len(raw), _ROWS_AT_ONCE):
                    self._settle(index, slice(row, row + _ROWS_AT_ONCE))
            self.is_settled_now()

    @torch.no_grad()
    def _settle(self, index: int, rows: Tensor | slice) -> None:
        average, settled_at = self._averages[index], self._settled_at[index]
        weight = self._raw[index][rows].float()
        share = torch.exp(self.log_decay.item() - settled_at[rows]).float().unsqueeze(1)
        average[rows] = torch.lerp(weight, average[rows], share)
        settled_at[rows] = self.log_decay.item()
