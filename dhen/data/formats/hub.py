"""Data sets on the Hugging Face hub, streamed through `datasets`. A YAML schema names the columns.

Here a "file" is `name:split`, and its rows are numbered from 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa

from dhen.data.formats.parquet import BATCH_ROWS, check_types, typed_chunk, used_columns
from dhen.data.formats.raw_rows import WHOLE, DataError, RawChunk, Stretch
from dhen.data.formats.roles import ColumnRoles

_SPLIT_NAMES = {"train": "train", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"), "test": "test"}
"""Maps the hub's names for splits to ours."""


@dataclass(frozen=True)
class HubReader:
    """Streams the splits of a data set, `owner/name` or `owner/name/configuration`, without storing it on disk."""

    roles: ColumnRoles
    is_label_required: bool = True

    def stretches(self, file: str, num_bytes: float) -> list[Stretch]:
        """A split is not cut."""
        return [WHOLE]

    def chunks(self, file: str, stretch: Stretch = WHOLE) -> Iterator[RawChunk]:
        """Yield the rows of a split in order. Raises DataError, or ValueError for wrong columns."""
        row = 0
        for table in self._tables(file):
            if row == 0:
                self.roles.check_columns(table.column_names, file, is_label_required=self.is_label_required)
                check_types(table.schema, self.roles, file)
            used = used_columns(self.roles, table.column_names, self.roles.kept)
            raw = {name: table[name].combine_chunks() for name in used}
            yield typed_chunk(raw, self.roles, file, row, self.is_label_required)
            row += table.num_rows

    def column_names(self, file: str) -> list[str]:
        """Return the names of all columns in a split, from its first rows."""
        return next(self._tables(file), pa.table({})).column_names

    def row_counts(self, file: str, stretch: Stretch = WHOLE) -> Iterator[tuple[int, int]]:
        """Yield the number of rows so far, by streaming through a split once. Its size in bytes is not known."""
        rows = 0
        for table in self._tables(file):
            rows += table.num_rows
            yield rows, 0

    def _tables(self, file: str) -> Iterator[pa.Table]:
        name, split = file.rsplit(":", 1)
        with _reaching(file):
            stream = datasets.load_dataset(*_path_and_configuration(name), split=split, streaming=True)
            yield from stream.with_format("arrow").iter(batch_size=BATCH_ROWS)


def hub_splits(name: str) -> dict[str, str]:
    """Return the "file" for each split, by our names. Raises DataError if the data set is unreachable or has none."""
    with _reaching(name):
        present = datasets.get_dataset_split_names(*_path_and_configuration(name))
    found: dict[str, str] = {}
    for split in present:
        ours = _SPLIT_NAMES.get(split)
        if ours in found:
            raise DataError(
                f"{name}: the splits {found[ours].rpartition(':')[2]} and {split} both map to {ours}. "
                "Save the right one as Parquet files and use those."
            )
        if ours is not None:
            found[ours] = f"{name}:{split}"
    if not found:
        raise DataError(
            f"{name}: the splits are {', '.join(present)}, but at least one of {', '.join(_SPLIT_NAMES)} is needed. "
            "Save the rows as Parquet files and use those."
        )
    return found


def hub_revision(file: str) -> str:
    """Return a string that changes whenever the content of a split changes."""
    name, split = file.rsplit(":", 1)
    with _reaching(name):
        builder = datasets.load_dataset_builder(*_path_and_configuration(name))
    return f"{builder.config.name}:{builder.hash}:{split}"


def _path_and_configuration(name: str) -> tuple[str, str | None]:
    parts = name.split("/")
    if len(parts) == 3 and all(parts) and not Path(name).exists():
        return "/".join(parts[:2]), parts[2]
    return name, None


@contextmanager
def _reaching(place: str) -> Iterator[None]:
    """Turn an error of `datasets` into a DataError that begins with `place`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{place}: no such local path, and the data set cannot be read from the Hugging Face hub ({text:.300}). "
            "Check the name and the connection."
        ) from error
