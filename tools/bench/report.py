"""Tables of results on the terminal."""

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table

_WIDTH = 160  # of a table that does not go to a terminal


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str] = (), file: TextIO | None = None
) -> None:
    """Print rows under the names of their columns. left: the columns of text, aligned to the left. file: not stdout."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if (file or sys.stdout).isatty() else _WIDTH, file=file).print(table, soft_wrap=True)
