"""Criteo's click logs: tab-separated, no header; label, 13 integers (I1-I13), 26 categories in hex (C1-C26).

A blank is a missing value. If labels are optional, the file may lack the label column, like Criteo's own test set.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from dhen.data.formats import columns, text_blocks
from dhen.data.formats.raw_rows import CountCallback, RawChunk, RowChecks, ignore_counts
from dhen.data.formats.roles import ColumnRoles, DenseRole, LabelRole, SparseRole
from dhen.data.schema import LABEL

INTEGERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))


@dataclass(frozen=True)
class CriteoReader:
    """Reads Criteo's format, plain or .gz."""

    is_label_required: bool = True
    block_bytes: int = text_blocks.BLOCK_BYTES

    @cached_property
    def roles(self) -> ColumnRoles:
        """I1-I13 are dense with log1p, C1-C26 are sparse."""
        return ColumnRoles(
            dense=tuple(DenseRole(name) for name in INTEGERS),
            sparse=tuple(SparseRole(name) for name in CATEGORIES),
            delimiter="\t",
            header=False,
        )

    def chunks(self, file: str) -> Iterator[RawChunk]:
        """Yield the rows of `file` in order. Raises FileNotFoundError or DataError."""
        names = [LABEL, *INTEGERS, *CATEGORIES]
        if not self.is_label_required:
            tabs = [line.count("\t") for _, line in text_blocks.first_lines(file)]
            if tabs.count(len(names) - 2) > tabs.count(len(names) - 1):
                names = names[1:]
        for block in text_blocks.text_blocks(file, block_bytes=self.block_bytes):
            yield self._typed(block, names)

    def count_rows(self, file: str, on_count: CountCallback = ignore_counts) -> int:
        """Return the number of lines in `file`."""
        return text_blocks.count_lines(file, on_count)

    def _typed(self, block: text_blocks.TextBlock, names: list[str]) -> RawChunk:
        strings, rows, bad = text_blocks.split_columns(block, names, delimiter="\t", quote=None)
        raw = {name: strings[name].combine_chunks() for name in names}
        checks = RowChecks(block.file, rows, text_blocks.line_quoter(raw, "\t"))
        label = columns.label_column(raw.get(LABEL), LabelRole(), checks, is_required=self.is_label_required)
        typed = {LABEL: label}
        for name in INTEGERS:
            typed[name] = columns.integer_column(raw[name], name, checks)
        for name in CATEGORIES:
            typed[name] = columns.hex_column(raw[name], name, checks)
        return checks.finish(pa.table(typed), bad, end_row=block.end_row, bytes_read=block.bytes_read)
