"""Criteo's click logs: tab-separated, no header; label, 13 integers (I1-I13), 26 categories in hex (C1-C26).

A blank is a missing value. If labels are optional, the file may lack the label column, like Criteo's own test set.

A YAML schema may say how features are encoded, and leaves the others as they are:

    dense: [{name: "I*", scale: standard}]                    # also transform and missing_indicator
    sparse: [{name: C3, hash_size: 40000000}, {name: C6, encoding: vocabulary, min_count: 10}]
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from dhen.data.formats import columns, text_blocks
from dhen.data.formats.column_role import DenseRole, LabelRole, SparseRole
from dhen.data.formats.delimited import DelimitedReader
from dhen.data.formats.raw_rows import RowChecks
from dhen.data.formats.roles import ColumnRoles
from dhen.data.schema import LABEL
from dhen.model.names import unknown_name

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
_MAY_SET = {"dense": ("transform", "scale", "missing_indicator"), "sparse": ("encoding", "hash_size", "min_count")}


@dataclass(frozen=True)
class CriteoReader(DelimitedReader):
    """Reads Criteo's format, plain or compressed."""

    roles: ColumnRoles = ROLES

    def with_encodings(self, given: ColumnRoles, file: str | Path) -> "CriteoReader":
        """This reader, with the encodings of a schema. Raises ValueError that begins with `file`."""
        if given.has_patterns:
            given = given.expanded(list(ROLES.columns), str(file))
        roles = {}
        for kind, keys in _MAY_SET.items():
            known = {role.name: role for role in getattr(ROLES, kind)}
            for role in getattr(given, kind):
                if role.name not in known:
                    raise ValueError(f"{file}: {unknown_name(f'{kind} feature of criteo', role.name, known)}")
                told = replace(known[role.name], **{key: getattr(role, key) for key in keys})
                if replace(role, column=role.source) != replace(told, column=told.name):
                    raise ValueError(
                        f"{file}: {kind}: {role.name} has a key that the format criteo does not let you set. Use only "
                        f"{', '.join(keys)}, or --dataset_format csv."
                    )
                known[role.name] = told
            roles[kind] = tuple(known.values())
        if replace(given, **roles) != ColumnRoles(**roles):
            raise ValueError(f"{file}: the format criteo sets all keys but dense and sparse. List only these.")
        return replace(self, roles=replace(ROLES, **roles))

    @property
    def number_types(self) -> dict[str, pa.DataType]:
        return {name: kind if name == LABEL else pa.int64() for name, kind in super().number_types.items()}

    def _header(self, file: str) -> tuple[list[str], int]:
        names = list(self.roles.columns)
        if not self.is_label_required:
            tabs = [line.count("\t") for _, line in text_blocks.first_lines(file)]
            if tabs.count(len(names) - 2) > tabs.count(len(names) - 1):
                return names[1:], 0
        return names, 0

    def typed(self, raw: dict[str, pa.Array], checks: RowChecks) -> pa.Table:
        label = columns.label_column(raw.get(LABEL), LabelRole(), checks, is_required=self.is_label_required)
        integers = {name: columns.number_column(raw[name], name, checks, is_integer=True) for name in INTEGERS}
        categories = {name: columns.hex_column(_texts(name, raw[name]), name, checks) for name in CATEGORIES}
        return pa.table({LABEL: label, **integers, **categories})


def _texts(name: str, values: pa.Array) -> pa.Array:
    if values.null_count == len(values):
        return pa.nulls(len(values), pa.string())
    if not pa.types.is_string(values.type):
        raise ValueError(f"column {name!r} has the type {values.type}. A category of Criteo's is text, in hex.")
    return values
