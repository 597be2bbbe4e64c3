"""Criteo's click logs: tab-separated, no header; label, 13 integers (I1-I13), 26 categories in hex (C1-C26).

A blank is a missing value. If labels are optional, the file may lack the label column, like Criteo's own test set.
"""

from dataclasses import dataclass

import pyarrow as pa

from dhen.data.formats import columns, text_blocks
from dhen.data.formats.delimited import DelimitedReader
from dhen.data.formats.raw_rows import RowChecks
from dhen.data.formats.roles import ColumnRoles, DenseRole, LabelRole, SparseRole
from dhen.data.schema import LABEL

INTEGERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))


ROLES = ColumnRoles(
    dense=tuple(DenseRole(name) for name in INTEGERS),
    sparse=tuple(SparseRole(name) for name in CATEGORIES),
    delimiter="\t",
    header=False,
    columns=(LABEL, *INTEGERS, *CATEGORIES),
    quote=None,
)


@dataclass(frozen=True)
class CriteoReader(DelimitedReader):
    """Reads Criteo's format, plain or compressed."""

    roles: ColumnRoles = ROLES

    def _header(self, file: str) -> tuple[list[str], int]:
        names = list(self.roles.columns)
        if not self.is_label_required:
            tabs = [line.count("\t") for _, line in text_blocks.first_lines(file)]
            if tabs.count(len(names) - 2) > tabs.count(len(names) - 1):
                return names[1:], 0
        return names, 0

    def _typed(self, raw: dict[str, pa.Array], checks: RowChecks) -> pa.Table:
        label = columns.label_column(raw.get(LABEL), LabelRole(), checks, is_required=self.is_label_required)
        integers = {name: columns.integer_column(raw[name], name, checks) for name in INTEGERS}
        categories = {name: columns.hex_column(raw[name], name, checks) for name in CATEGORIES}
        return pa.table({LABEL: label, **integers, **categories})
