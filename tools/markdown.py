"""Rows of Markdown tables."""

from collections.abc import Iterator, Sequence


def head(columns: Sequence[str]) -> Iterator[str]:
    """The lines above the first row."""
    yield row(columns)
    yield row(["---"] * len(columns))


def row(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"
