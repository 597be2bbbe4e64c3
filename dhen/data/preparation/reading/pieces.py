"""Cuts raw files into pieces, which may be prepared at the same time, in any order, by any number of processes.

The pieces depend only on the files, so that the prepared folder does not depend on who prepared which piece.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dhen.data.formats.raw_files import of_each, size_of
from dhen.data.formats.raw_rows import Reader, Stretch
from dhen.data.preparation.reading.sources import Source

PIECE_BYTES = 128 << 20
"""Least size of a piece, except for the last one. The rows of a prepared folder do not depend on it; where its row
groups begin does."""
MOST_PIECES = 2048
"""Of more than 256 GiB, larger pieces are made: each gives the prepared folder a file per split."""


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a source: stretches of its files, which hold about `num_bytes`.

    position: number of rows in the files of the source before the first of these. source_rows: number of rows of the
    whole source. Both are 0 unless they decide which split a row goes to.
    """

    index: int
    source: int
    splits: tuple[str, ...]
    parts: tuple[tuple[str, Stretch], ...]
    position: int = 0
    source_rows: int = 0

    @property
    def num_bytes(self) -> int:
        """About how many bytes are read."""
        return sum(stretch.num_bytes for _, stretch in self.parts)


def cut(reader: Reader, sources: Sequence[Source], num_bytes: float) -> list[Piece]:
    """Cut the sources into pieces of at least so many bytes, and of less than thrice that unless a file has no cuts."""
    files = [file for source in sources for file in source.files]
    num_bytes = max(num_bytes, sum(of_each(size_of, files)) / MOST_PIECES)
    pieces: list[Piece] = []
    for index, source in enumerate(sources):
        of_source: list[list[tuple[str, Stretch]]] = [[]]
        size = 0
        cuts = of_each(lambda file: reader.stretches(file, num_bytes), source.files)
        for part in ((file, each) for file, some in zip(source.files, cuts, strict=True) for each in some):
            if size >= num_bytes or (of_source[-1] and not size):  # of a hub's data set, no size is known
                of_source.append([])
                size = 0
            of_source[-1].append(part)
            size += part[1].num_bytes
        pieces += [Piece(len(pieces) + i, index, source.splits, tuple(parts)) for i, parts in enumerate(of_source)]
    return pieces


def to_count(pieces: Sequence[Piece], *, in_order: bool) -> list[Piece]:
    """The pieces whose rows must be counted before others are read. in_order: rows are split in order."""
    needed = []
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        has_splits = len(piece.splits) > 1
        is_followed = following is not None and following.source == piece.source
        goes_on = is_followed and following.parts[0][0] == piece.parts[-1][0]
        if goes_on or (has_splits and (is_followed or in_order)):
            needed.append(piece)
    return needed


def place(pieces: Sequence[Piece], rows: dict[int, list[int]]) -> list[Piece]:
    """Return the pieces with what precedes them. rows: by index of a counted piece, the rows of each of its parts."""
    counts = {piece.index: rows.get(piece.index, [0] * len(piece.parts)) for piece in pieces}
    totals, in_file, file_starts = Counter(), Counter(), {}
    placed = []
    for piece in pieces:
        parts = []
        for (file, stretch), count in zip(piece.parts, counts[piece.index], strict=True):
            file_starts.setdefault(file, totals[piece.source])
            parts.append((file, replace(stretch, rows_before=in_file[file])))
            in_file[file] += count
            totals[piece.source] += count
        placed.append(replace(piece, parts=tuple(parts), position=file_starts[piece.parts[0][0]]))
    return [replace(piece, source_rows=totals[piece.source]) for piece in placed]
