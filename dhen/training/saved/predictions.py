"""Writes predictions, batch by batch, as Parquet, CSV or JSON lines: as the file's name says.

Each rank writes a part of its own, a Parquet file, and rank 0 makes one file of them. Nothing is gathered in memory.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet

from dhen.config.command_line import ArgumentError

_WRITERS = {
    **dict.fromkeys((".parquet", ".pq"), pl.LazyFrame.sink_parquet),
    ".csv": pl.LazyFrame.sink_csv,
    ".jsonl": pl.LazyFrame.sink_ndjson,
}
"""What writes a file, by the file's name."""


def columns_of(tasks: Sequence[str]) -> pa.Schema:
    """The columns of predictions. tasks: the further tasks of the model."""
    scores = [f"{kind}{of}" for of in ("", *(f"_{name}" for name in tasks)) for kind in ("prediction", "label")]
    ends = [("file", pa.string()), ("line", pa.int64())]
    return pa.schema([("row", pa.int64()), *((name, pa.float32()) for name in scores), *ends])


def prediction_file(output: str | None) -> Path:
    """The file to write, or the folder if its name has no ending. Raises ArgumentError if it cannot be written."""
    path = Path(output or "predictions.parquet")
    if path.suffix.lower() not in ("", *_WRITERS):
        raise ArgumentError(
            f"--output is {output}. Use a name that ends in {', '.join(_WRITERS)}, or a name without an ending for a "
            "folder."
        )
    if not path.suffix and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise ArgumentError(f"--output is {output}, which exists. Remove it, or choose another name.")
    return path


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
