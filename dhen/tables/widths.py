"""Groups one rank's tables by width, so that one operation works on all tables of equal width."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor


@dataclass(frozen=True)
class Width:
    """Adjacent tables of equal width, joined into one. Shares the tables' memory.

    tables: range of table numbers, end exclusive. rows: number of rows of each table. first_row: of the first table,
    counted over all tables.
    """

    tables: tuple[int, int]
    rows: list[int]
    first_row: int
    weight: Tensor

    def joined(self, states: Sequence[Tensor]) -> Tensor:
        """States of all tables -> those of these tables, joined."""
        return _joined(states[slice(*self.tables)])


def by_width(weights: Sequence[Tensor]) -> list[Width]:
    """Group tables that FBGEMM stores back to back. Tables of equal width must be adjacent."""
    widths, first, row = [], 0, 0
    for _, group in groupby(weights, key=lambda weight: weight.shape[1]):
        tables = list(group)
        last, rows = first + len(tables), list(map(len, tables))
        widths.append(Width((first, last), rows, row, _joined(tables)))
        first, row = last, row + sum(rows)
    return widths


def _joined(tables: Sequence[Tensor]) -> Tensor:
    joined = tables[0].as_strided((sum(map(len, tables)), *tables[0].shape[1:]), tables[0].stride())
    ends = [table.data_ptr() + table.nbytes for table in tables]
    assert [table.data_ptr() for table in tables[1:]] == ends[:-1]
    return joined
