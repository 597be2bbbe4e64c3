"""Writes predictions, batch by batch, as Parquet, CSV or JSON lines: as the file's name says.

Each rank writes a part of its own, a Parquet file, and rank 0 makes one file of them. Nothing is gathered in memory.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import BinaryIO

import polars as pl
import pyarrow as pa
import pyarrow.parquet

from dhen.config.command_line import ArgumentError
from dhen.model.names import quoted
from dhen.runtime.collectives import rank_zeros
from dhen.runtime.topology import Topology

_WRITERS = {
    **dict.fromkeys((".parquet", ".pq"), pl.LazyFrame.sink_parquet),
    ".csv": pl.LazyFrame.sink_csv,
    ".jsonl": pl.LazyFrame.sink_ndjson,
}
"""What writes a file, by the file's name."""


def columns_of(tasks: Sequence[str], kept: Sequence[pa.Field] = ()) -> pa.Schema:
    """The columns of predictions. tasks: the further tasks of the model. kept: columns of the raw files."""
    scores = [f"{kind}{of}" for of in ("", *(f"_{name}" for name in tasks)) for kind in ("prediction", "label")]
    ends = [("file", pa.string()), ("line", pa.int64())]
    return pa.schema([("row", pa.int64()), *((name, pa.float32()) for name in scores), *ends, *kept])


def check_names(keep: Sequence[str], tasks: Sequence[str]) -> None:
    """Raise ArgumentError if columns to keep are named like another column of predictions, or named twice."""
    taken = columns_of(tasks).names
    for place, name in enumerate(keep):
        if name in taken or name in keep[:place]:
            raise ArgumentError(
                f"--keep: the output already has a column {quoted(name)}. Remove it, or rename it in the file; the "
                f"other columns are {', '.join(taken)}."
            )


def check_fit(kept: Sequence[pa.Field], path: Path) -> None:
    """Raise ArgumentError if the format of a file cannot hold the values of a column to keep."""
    for name, kind in ((field.name, field.type) for field in kept):
        is_nested, suffix = pa.types.is_nested(kind), path.suffix.lower()
        is_odd = pa.types.is_duration(kind) or "binary" in str(kind)
        if suffix in (".csv", ".jsonl") and (is_odd or (is_nested and suffix == ".csv")):
            raise ArgumentError(f"--keep {name}: {suffix} has no values of the type {kind}. Use an --output .parquet.")


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


@contextmanager
def copied_to(stdout: BinaryIO | None, path: Path, topology: Topology) -> Iterator[Path]:
    """The file to write: `path`, or one that is then copied to `stdout`. Communicates; all ranks call it."""
    if stdout is None:
        yield path
        return
    folder = Path(rank_zeros(topology, mkdtemp))
    try:
        yield folder / path.name
        if topology.is_main:
            with (folder / path.name).open("rb") as file, stdout:
                shutil.copyfileobj(file, stdout)
    finally:
        if topology.is_main:
            shutil.rmtree(folder)


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
