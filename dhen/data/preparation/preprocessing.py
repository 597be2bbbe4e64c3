"""Streams raw files into a prepared folder (dhen/data/schema.py).

Hashed ids need one pass over the data. A vocabulary, `auto`, bins or a scale add a pass before it, which counts keys
and fits numbers of the train split. A sequential split adds a first pass that counts lines without parsing them.

Rows are read, encoded and written chunk by chunk. Memory therefore holds a few copies of one input block (8 MiB of
text, or 65,536 Parquet rows) and one row group per split, regardless of the input's size. Only the distinct keys of
features encoded by a vocabulary grow with the data (`KeyCounts` says how much memory a key takes). Each feature with
bins takes up to 16 MB.
"""

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa

from dhen.data.formats.canonical import canonical_keys
from dhen.data.formats.raw_rows import BadRow, DataError
from dhen.data.preparation.encoding import (
    MOST_KEYS,
    AskedEncoding,
    Encoder,
    asked_encodings,
    check_same_features,
    new_columns,
)
from dhen.data.preparation.numbers import BinFit, ScaleFit, number_fits
from dhen.data.preparation.origins import add_origins
from dhen.data.preparation.raw_stream import LogProgress, ProgressCallback, RawStream
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.preparation.sources import Source, open_sources
from dhen.data.preparation.vocabulary import KeyCounts, Vocabulary, load_vocabulary
from dhen.data.preparation.writing import SplitWriter, list_bad_rows
from dhen.data.schema import SHARES, Schema, SplitCounts

_UNFINISHED = ".unfinished-"


def prepare(settings: PreparationSettings, folder: str | Path, *, progress: ProgressCallback | None = None) -> Schema:
    """Write the prepared folder atomically and return its schema.

    progress: called after each chunk. Without it, progress is logged every ten seconds.

    Raises FileExistsError if `folder` exists, FileNotFoundError, ValueError for wrong settings, and DataError (a
    ValueError) for data that cannot be used. The message of a DataError names file and row.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder}: the folder already exists. Remove it or choose another one.")
    with _atomic_folder(folder) as unfinished:
        return _prepare_in(unfinished, settings, progress or LogProgress())


def settings_without_effect(settings: PreparationSettings, schema: Schema) -> list[str]:
    """Return a sentence for each setting that differs from its default but did not affect the prepared data."""
    hashed, looked_up = ([c for c in schema.sparse if c.encoding == kind] for kind in ("hash", "vocabulary"))
    has_own_splits = len(schema.source.get("files", {})) > 1 or bool(settings.files_by_split())
    reasons = {
        "hash_size": "" if any(c.num_embeddings == settings.hash_size for c in hashed) else "no table has this size",
        "min_count": "" if any(c.min_count == settings.min_count for c in looked_up) else "no vocabulary uses it",
        "id_encoding": "" if any(c.encoding == settings.id_encoding for c in schema.sparse) else "no feature uses it",
        "vocabulary_keys": "" if settings.like and looked_up else "no trained model has a vocabulary here",
    }
    reasons |= dict.fromkeys(
        ("split_fractions", "split_order", "split_seed"), "the data has its own splits" if has_own_splits else ""
    )
    if not has_own_splits and settings.split_order == "sequential":
        reasons["split_seed"] = "rows are split in order"
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
    source = _source(settings, format_name, sources)
    if settings.head is not None:
        source[SHARES] = stream.share_read
    schema = Schema(encoder.dense, encoder.sparse, splits, source)
    schema.save(folder)
    return schema


def _given_encoder(stream: RawStream, settings: PreparationSettings) -> Encoder:
    origin = Path(settings.schema_from)
    schema = Schema.load(origin)
    check_same_features(stream.roles, schema.dense, schema.sparse, str(origin))
    with_vocabulary = [column.name for column in schema.sparse if column.encoding == "vocabulary"]
    vocabularies = {name: load_vocabulary(origin, name) for name in with_vocabulary}
    return Encoder(schema.dense, schema.sparse, vocabularies)


def _new_encoder(stream: RawStream, settings: PreparationSettings) -> Encoder:
    asked = asked_encodings(stream.roles, settings)
    trained = Schema.load(Path(settings.like)) if settings.like else None
    fitted, fits = number_fits(stream.roles, trained)
    vocabularies = _read_train(stream, settings, asked, fits)
    fitted |= {name: fit.result(name) for name, fit in fits.items()}
    if trained and settings.vocabulary_keys == "union":
        looked_up = {column.name for column in trained.sparse if column.encoding == "vocabulary"}
        vocabularies |= {
            name: load_vocabulary(Path(settings.like), name).union(new)
            for name, new in vocabularies.items()
            if name in looked_up
        }
    return Encoder(*new_columns(stream.roles, asked, vocabularies, fitted), vocabularies)


def _read_train(
    stream: RawStream,
    settings: PreparationSettings,
    asked: Mapping[str, AskedEncoding],
    fits: Mapping[str, BinFit | ScaleFit],
) -> dict[str, Vocabulary]:
    """Count keys and fit numbers in a separate pass. Returns the vocabularies.

    Only the train split counts: a key that never occurs there cannot be trained.

    A feature whose encoding is auto gets no vocabulary if it has more than MOST_KEYS keys.
    """
    counts = {name: KeyCounts() for name, of_feature in asked.items() if of_feature.encoding != "hash"}
    if not counts and not fits:
        return {}
    if "train" not in stream.splits:
        if all(asked[name].encoding == "auto" for name in counts) and not fits:
            return {}
        raise DataError(
            f"{f'the bins or the scale of {next(iter(fits))!r}' if fits else 'a vocabulary'} is built from the train "
            f"split, but there is none. Add train rows or set schema_from."
        )
    for part in stream.chunks("counting keys", only="train"):
        table = part.chunk.table.filter(part.split_of_row == part.splits.index("train"))
        for name, fit in fits.items():
            fit.add(table[name].drop_null().to_numpy())
        for name, count in list(counts.items()):
            keys = table[name].combine_chunks()
            keys = keys.flatten() if pa.types.is_list(keys.type) else keys
            count.add(canonical_keys(keys))
            if asked[name].encoding == "auto" and count.num_merged > MOST_KEYS:
                del counts[name]
        if not counts and not fits:
            return {}
    vocabularies = {name: count.vocabulary(asked[name].min_count) for name, count in counts.items()}
    return {
        name: vocabulary
        for name, vocabulary in vocabularies.items()
        if asked[name].encoding == "vocabulary" or counts[name].num_merged <= MOST_KEYS
    }


def _write_splits(folder: Path, stream: RawStream, encoder: Encoder, *, with_origins: bool) -> dict[str, SplitCounts]:
    """Encode and write all rows in the last pass. with_origins: also write the file and row number of each row."""
    first_bad: BadRow | None = None
    writers = {split: SplitWriter(folder / split) for split in stream.splits}
    bad_rows = dict.fromkeys(stream.splits, 0)
    unknown_keys = {split: Counter() for split in stream.splits}
    with ExitStack() as stack:
        for writer in writers.values():
            stack.enter_context(closing(writer))
        for part in stream.chunks("writing"):
            list_bad_rows(folder, part.chunk.bad)
            first_bad = first_bad or next(iter(part.chunk.bad), None)
            encoded, unknown = encoder.encode_and_count(part.chunk.table)
            if with_origins:
                encoded = add_origins(encoded, part.chunk)
            for index, split in enumerate(part.splits):
                is_here = part.split_of_row == index
                writers[split].write(encoded if is_here.all() else encoded.filter(is_here))
                bad_rows[split] += int(np.count_nonzero(part.split_of_bad == index))
                unknown_keys[split].update({name: int(of_row[is_here].sum()) for name, of_row in unknown.items()})
    counts = {
        split: replace(writer.counts(bad_rows[split]), unknown_keys=dict(unknown_keys[split]))
        for split, writer in writers.items()
    }
    _refuse_mostly_bad(counts, first_bad)
    for split, count in counts.items():
        if count.rows == 0:
            raise DataError(
                f"the split {split} has no rows ({count.bad_rows} bad rows were skipped); all splits together have "
                f"{sum(c.rows for c in counts.values())}. Add rows, or change the files or split_fractions."
            )
    return counts


def _refuse_mostly_bad(counts: dict[str, SplitCounts], first_bad: BadRow | None) -> None:
    """Raise DataError if most rows were skipped: the format or schema is then probably wrong, not the rows."""
    good, bad = (sum(getattr(count, name) for count in counts.values()) for name in ("rows", "bad_rows"))
    if bad > good:
        raise DataError(
            f"{bad:,} of {good + bad:,} rows are bad. This is more than half, so the format or the schema is probably "
            f"wrong. The first bad row: {first_bad}"
        )


def _source(settings: PreparationSettings, format_name: str, sources: tuple[Source, ...]) -> dict[str, object]:
    """Return the `source` entry of schema.json, which says where the rows came from."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    del values["block_bytes"], values["head"]
    files = {"+".join(source.splits): list(source.files) for source in sources}
    return {"format": format_name, "files": files, "settings": values}


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Provide a hidden sibling folder for writing. It is renamed to `folder` on success and removed on failure.

    If the process is killed, the sibling `.<name>.unfinished-*` remains. The next preparation in the same parent folder
    removes it, unless another one runs there. Raises FileExistsError if another process has created `folder` in the
    meantime.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}{_UNFINISHED}{uuid4().hex}")
    lock = os.open(folder.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # another preparation runs, or the file system has no locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in folder.parent.glob(f".*{_UNFINISHED}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        unfinished.mkdir()  # with the usual permissions; those of tempfile's folders exclude other users
        yield unfinished
        try:
            os.rename(unfinished, folder)
        except OSError as error:
            if not folder.exists():
                raise
            raise FileExistsError(f"{folder}: another process has created this folder in the meantime.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.close(lock)
