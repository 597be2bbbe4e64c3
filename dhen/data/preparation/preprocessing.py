"""Raw files to a prepared folder (dhen/data/schema.py), in a stream.

Hashed ids take one pass over the data, a vocabulary one more before it (which counts the rows of the train
split), a sequential split a first one that counts lines without
parsing them. Rows are read, encoded and written chunk by chunk, so
memory holds a block of the input (8 MiB of text, or 65,536 Parquet rows) with its few copies, and one row group of
each split, whatever the input's size. One thing grows with the data: the distinct keys of the features that are
encoded by a vocabulary (`KeyCounts` says how much a key takes).
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from dhen.data.formats.raw_rows import BadRow, DataError
from dhen.data.formats.text_blocks import one_array
from dhen.data.preparation.encoding import Encoder, check_same_features, new_columns
from dhen.data.preparation.origins import add_origins
from dhen.data.preparation.raw_stream import LogProgress, ProgressCallback, RawStream
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.preparation.sources import Source, open_sources
from dhen.data.preparation.vocabulary import KeyCounts, Vocabulary, flat_keys, load_vocabulary
from dhen.data.preparation.writing import BadRowList, SplitWriter
from dhen.data.schema import Schema, SplitCounts

PREPARATION_VERSION = 2
"""Goes up when the same input and settings give another folder: then nothing old is taken from a cache."""
_UNFINISHED = ".unfinished-"


def prepare(settings: PreparationSettings, folder: str | Path, *, progress: ProgressCallback | None = None) -> Schema:
    """Write the prepared folder and return its schema. The folder appears whole or not at all.

    progress: called after each chunk; without it a log line tells the state every ten seconds.

    Raises FileExistsError where `folder` exists, FileNotFoundError, ValueError, and DataError (a ValueError) for data
    that can't be used: the message names file and row.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder}: it exists already. Remove it or choose another folder.")
    with _appearing_whole(folder) as unfinished:
        return _prepare_in(unfinished, settings, progress or LogProgress())


def settings_without_effect(settings: PreparationSettings, schema: Schema) -> list[str]:
    """A sentence about each setting, other than the default, that made no difference to what was prepared."""
    hashed, looked_up = ([c for c in schema.sparse if c.encoding == kind] for kind in ("hash", "vocabulary"))
    has_own_splits = len(schema.source.get("files", {})) > 1 or bool(settings.files_by_split())
    reasons = {
        "hash_size": "" if any(c.num_embeddings == settings.hash_size for c in hashed) else "no table takes its size",
        "min_count": "" if any(c.min_count == settings.min_count for c in looked_up) else "no vocabulary is made by it",
        "id_encoding": "" if any(c.encoding == settings.id_encoding for c in schema.sparse) else "no feature takes it",
    }
    reasons |= dict.fromkeys(
        ("split_fractions", "split_order", "split_seed"), "the data has splits of its own" if has_own_splits else ""
    )
    if not has_own_splits and settings.split_order == "sequential":
        reasons["split_seed"] = "rows are split in their order"
    default = {item.name: item.default for item in fields(PreparationSettings)}
    return [
        f"{name} has no effect: {reason}"
        for name, reason in reasons.items()
        if reason and getattr(settings, name) != default[name]
    ]


def _prepare_in(folder: Path, settings: PreparationSettings, progress: ProgressCallback) -> Schema:
    reader, format_name, sources = open_sources(settings)
    stream = RawStream(reader, sources, settings, progress)
    encoder = _given_encoder(stream, settings) if settings.schema_from is not None else _new_encoder(stream, settings)
    for name, vocabulary in encoder.vocabularies.items():
        vocabulary.save(folder, name)
    splits = _write_splits(folder, stream, encoder, with_origins=not settings.is_label_required)
    schema = Schema(encoder.dense, encoder.sparse, splits, _source(settings, format_name, sources))
    schema.save(folder)
    return schema


def _given_encoder(stream: RawStream, settings: PreparationSettings) -> Encoder:
    origin = Path(settings.schema_from)
    schema = Schema.load(origin)
    check_same_features(stream.roles, schema.dense, schema.sparse, str(origin))
    with_vocabulary = [column.name for column in schema.sparse if column.encoding == "vocabulary"]
    return Encoder(schema.dense, schema.sparse, {name: load_vocabulary(origin, name) for name in with_vocabulary})


def _new_encoder(stream: RawStream, settings: PreparationSettings) -> Encoder:
    vocabularies = _count_vocabularies(stream, settings)
    return Encoder(*new_columns(stream.roles, settings, vocabularies), vocabularies)


def _count_vocabularies(stream: RawStream, settings: PreparationSettings) -> dict[str, Vocabulary]:
    """The first of two passes. Keys of the train split count: a key that only tests know has nothing to learn from."""
    roles = {r.name: r for r in stream.roles.sparse if (r.encoding or settings.id_encoding) == "vocabulary"}
    if not roles:
        return {}
    if "train" not in stream.splits:
        raise DataError("a vocabulary is made from the train split, but there is none. Give train rows or schema_from.")
    counts = {name: KeyCounts() for name in roles}
    for part in stream.chunks("counting keys", only="train"):
        table = part.chunk.table.filter(part.split_of_row == part.splits.index("train"))
        for name, count in counts.items():
            count.add(flat_keys(one_array(table[name])))
    return {name: count.vocabulary(roles[name].min_count or settings.min_count) for name, count in counts.items()}


def _write_splits(folder: Path, stream: RawStream, encoder: Encoder, *, with_origins: bool) -> dict[str, SplitCounts]:
    """The last pass. with_origins: with the file and row of each row."""
    first_bad: BadRow | None = None
    writers = {split: SplitWriter(folder / split) for split in stream.splits}
    bad_rows = dict.fromkeys(stream.splits, 0)
    with ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.close)
        bad_row_list = stack.enter_context(BadRowList(folder))
        for part in stream.chunks("writing"):
            bad_row_list.write(part.chunk.bad)
            first_bad = first_bad or next(iter(part.chunk.bad), None)
            encoded = encoder.encode(part.chunk.table)
            if with_origins:
                encoded = add_origins(encoded, part.chunk)
            for index, split in enumerate(part.splits):
                is_here = part.split_of_row == index
                writers[split].write(encoded if is_here.all() else encoded.filter(is_here))
                bad_rows[split] += int(np.count_nonzero(part.split_of_bad == index))
    counts = {split: writer.counts(bad_rows[split]) for split, writer in writers.items()}
    _refuse_mostly_bad(counts, first_bad)
    for split, count in counts.items():
        if count.rows == 0:
            raise DataError(
                f"the split {split} has no rows ({count.bad_rows} bad ones were skipped), of "
                f"{sum(c.rows for c in counts.values())} in all. Give more rows, or other files or split_fractions."
            )
    return counts


def _refuse_mostly_bad(counts: dict[str, SplitCounts], first_bad: BadRow | None) -> None:
    """Raise DataError where most rows were skipped: then it isn't the rows that are wrong."""
    good, bad = (sum(getattr(count, name) for count in counts.values()) for name in ("rows", "bad_rows"))
    if bad > good:
        raise DataError(
            f"{bad:,} of {good + bad:,} rows are bad, more than half, so the format or the schema is probably another. "
            f"The first is {first_bad}"
        )


def _source(settings: PreparationSettings, format_name: str, sources: tuple[Source, ...]) -> dict[str, object]:
    """What schema.json says about where the rows came from."""
    said = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    del said["block_bytes"]
    files = {"+".join(source.splits): list(source.files) for source in sources}
    return {"format": format_name, "preparation_version": PREPARATION_VERSION, "files": files, "settings": said}


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A hidden sibling to write into, which takes the folder's name at the end, or goes if anything fails.

    A killed process leaves the sibling, `.<name>.unfinished-*`, which the next one that prepares into the same place
    removes. Where another process finished the same folder first, raises FileExistsError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_what_killed_ones_left(folder.parent)
    unfinished, lock = _locked_folder(f".{folder.name}{_UNFINISHED}", folder.parent)
    # mkdtemp makes it for the owner alone; the finished folder is like any other.
    unfinished.chmod(0o777 & ~_umask())
    try:
        yield unfinished
        try:
            os.rename(unfinished, folder)
        except OSError as error:
            if not folder.exists():
                raise
            raise FileExistsError(f"{folder}: another process has made it in the meantime.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.close(lock)


def _locked_folder(prefix: str, parent: Path) -> tuple[Path, int]:
    """A new folder and an open descriptor of it, which locks it as long as this process lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        descriptor = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks: then nobody takes it for left behind
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.exists():
            return folder, descriptor
        os.close(descriptor)  # another process took it for left behind, before it was locked


def _remove_what_killed_ones_left(parent: Path) -> None:
    """Unfinished folders that no living process has locked."""
    for folder in parent.glob(f".*{_UNFINISHED}*"):
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
