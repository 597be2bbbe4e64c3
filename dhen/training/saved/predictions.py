"""Writes predictions, batch by batch, as Parquet, CSV or JSON lines: as the file's name says.

Each rank writes a part of its own, a Parquet file, and rank 0 makes one file of them. Nothing is gathered in memory.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import polars as pl
import pyarrow as pa
import pyarrow.parquet

from dhen.config.command_line import ArgumentError
from dhen.model.names import quoted

_WRITERS = {
    **dict.fromkeys((".parquet", ".pq"), pl.LazyFrame.sink_parquet),
    ".csv": pl.LazyFrame.sink_csv,
    ".jsonl": pl.LazyFrame.sink_ndjson,
}
"""What writes a file, by the file's name."""


def columns_of(tasks: Sequence[str], kept: Sequence[pa.Field] = (), suffix: str = "") -> pa.Schema:
    """The columns of predictions. tasks: the further tasks of the model. kept: columns of the raw files.

    Raises ArgumentError if a kept column is named like another, or a file with this suffix cannot hold its values.
    """
    scores = [f"{kind}{of}" for of in ("", *(f"_{name}" for name in tasks)) for kind in ("prediction", "label")]
    ends = [("file", pa.string()), ("line", pa.int64())]
    columns = pa.schema([("row", pa.int64()), *((name, pa.float32()) for name in scores), *ends, *kept])
    for name, kind in ((field.name, field.type) for field in kept):
        if columns.names.count(name) > 1:
            raise ArgumentError(f"--keep: the output already has a column {quoted(name)}. Rename it, or leave it out.")
        is_odd = pa.types.is_duration(kind) or "binary" in str(kind) or (suffix == ".csv" and pa.types.is_nested(kind))
        if is_odd and suffix in (".csv", ".jsonl"):
            raise ArgumentError(f"--keep {name}: {suffix} has no values of the type {kind}. Use an --output .parquet.")
    return columns


def prediction_file(output: str | None) -> Path:
    """The file to write, or the folder if its name has no ending. Raises ArgumentError if it cannot be written."""
    path = Path("-.csv" if output == "-" else output or "predictions.parquet")
    if path.suffix.lower() not in ("", *_WRITERS):
        raise ArgumentError(
            f"--output is {output}. Use a name that ends in {', '.join(_WRITERS)}, or a name without an ending for a "
            "folder."
        )
    if not path.suffix and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise ArgumentError(f"--output is {output}, which exists. Remove it, or choose another name.")
    return path


def own_stdout() -> BinaryIO:
    """Take standard output, so that whatever else is printed goes to stderr."""
    taken = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return taken


def parts_folder(path: Path) -> Path:
    """Where the ranks write the parts of a file; a folder is its own."""
    return path.with_name(f".{path.name}.parts") if path.suffix else path


@contextmanager
def part_writer(folder: Path, rank: int, columns: pa.Schema) -> Iterator[pyarrow.parquet.ParquetWriter]:
    """Open the part of a rank, which appears in the folder when it is complete."""
    part = _part_of(folder, rank)
    folder.mkdir(parents=True, exist_ok=True)
    draft = part.with_name(f".{part.name}.draft")
    with pyarrow.parquet.ParquetWriter(draft, columns, compression="zstd") as writer:
        yield writer
    draft.replace(part)


def join_parts(folder: Path, ranks: int, path: Path) -> None:
    """Write the rows of all parts to one file, in the order of the ranks, and remove the parts.

    Raises FileNotFoundError if a part is not there.
    """
    parts = [_part_of(folder, rank) for rank in range(ranks)]
    for rank, part in enumerate(parts):
        if not part.is_file():
            raise FileNotFoundError(
                f"{part}: the part of rank {rank} is not there. If the ranks do not share this folder, use an --output "
                "without an ending: each rank's part then stays where it was written."
            )
    draft = path.with_name(f".{path.name}.draft")
    _WRITERS[path.suffix.lower()](pl.scan_parquet(parts, glob=False, hive_partitioning=False), draft)
    draft.replace(path)
    shutil.rmtree(folder)


def _part_of(folder: Path, rank: int) -> Path:
    return folder / f"part-{rank:05d}.parquet"
