"""Prepares raw files for training: a prepared folder (dhen/data/schema.py), in up to three stages over their pieces.

1. Count rows, without parsing them, where the row numbers or the splits of later pieces depend on it.
2. Count keys and fit numbers of the train split: only for a vocabulary, an `auto`, bins or a scale.
3. Encode all rows and write them.

Each stage leaves a folder per piece (pieces.py) in the unfinished folder, in which a preparation that was killed goes
on with the pieces that are missing, and which several machines can fill together. Whoever prepares a piece, and in
whatever order: the result is the same to the bit.

Rows are read, encoded and written chunk by chunk. A process therefore holds a few copies of one input block (8 MiB of
text, or 65,536 Parquet rows) and one row group per split, regardless of the input's size. While keys are counted, each
feature with a vocabulary takes up to 300 MB, and while its counts are merged, up to 2 GB. Each feature with bins takes
up to 16 MB.
"""

import hashlib
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dhen.data.formats.canonical import canonical_keys
from dhen.data.formats.raw_files import mark_of, of_each
from dhen.data.formats.raw_rows import DataError
from dhen.data.preparation import pieces as cutting
from dhen.data.preparation.encoding import (
    MOST_KEYS,
    AskedEncoding,
    Encoder,
    asked_encodings,
    check_same_features,
    hash_rows,
    new_columns,
)
from dhen.data.preparation.key_sketch import KeySketch, estimated_keys
from dhen.data.preparation.numbers import number_fits
from dhen.data.preparation.origins import add_origins
from dhen.data.preparation.pieces import Piece
from dhen.data.preparation.raw_stream import LogProgress, ProgressCallback, Raw, Report
from dhen.data.preparation.runners import LocalProcesses, Runner, num_cores
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.preparation.sources import Source, open_sources
from dhen.data.preparation.unfinished import Shard, Unfinished, unfinished_folder
from dhen.data.preparation.vocabulary import (
    VOCABULARY_FOLDER,
    KeyCounts,
    KeyIds,
    build_vocabulary,
    copy_vocabulary,
    load_vocabulary,
    save_key_ids,
)
from dhen.data.preparation.writing import SplitWriter, first_bad_row, join_bad_rows, join_parts, list_bad_rows, sum_of
from dhen.data.schema import ESTIMATED_KEYS, FORMAT_VERSION, SCHEMA_FILE, SHARES, Schema, SplitCounts

COUNTING, KEYS, WRITING = "counting rows", "counting keys", "writing"
_KEYS_FOLDER, _NUMBERS_FOLDER, _ENCODER, _RESULT = "keys", "numbers", "encoder", "result"
logger = logging.getLogger(__name__)


def prepare(
    settings: PreparationSettings,
    folder: str | Path,
    *,
    progress: ProgressCallback | None = None,
    runner: Runner | None = None,
    shard: Shard | None = None,
) -> Schema | None:
    """Write the prepared folder atomically and return its schema; of a shard, prepare its pieces and return None.

    progress: called after each chunk. Without it, progress is logged every ten seconds. runner: runs the work on the
    pieces; by default, a process per core.

    Raises FileExistsError if `folder` exists, FileNotFoundError, ValueError for wrong settings, and DataError (a
    ValueError) for data that cannot be used. The message of a DataError names file and row.
    """
    folder = Path(folder)
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(folder)):
        raise ValueError(f"{folder}: a prepared folder is written to a disk, not to a URL. Use a path.")
    if folder.exists():
        raise FileExistsError(f"{folder}: the folder already exists. Remove it or choose another one.")
    reader, format_name, sources = open_sources(settings)
    facts = _facts(settings, sources, format_name)
    with unfinished_folder(folder, facts, is_shared=shard is not None) as path:
        work = Unfinished(path, runner or LocalProcesses(num_cores()), progress or LogProgress(), shard)
        try:
            pieces, encoder = _run_stages(work, Raw(reader, settings), sources)
        except (ValueError, OSError) as error:
            work.give_up(error)
            raise
        if _facts(settings, sources, format_name) != facts:
            raise DataError("a file has changed while it was prepared. Run the same command again.")
        if shard is not None:
            return None
        source = _source(settings, format_name, sources)
        schema = _join(work, pieces, encoder, source, is_head=settings.head is not None)
        try:
            os.rename(path / _RESULT, folder)
        except OSError as error:
            if not folder.exists():
                raise
            raise FileExistsError(f"{folder}: another process has created this folder in the meantime.") from error
    return schema


def settings_without_effect(settings: PreparationSettings, schema: Schema) -> list[str]:
    """Return a sentence for each setting that differs from its default but did not affect the prepared data."""
    hashed, looked_up = ([c for c in schema.sparse if c.encoding == kind] for kind in ("hash", "vocabulary"))
    has_own_splits = len(schema.source.get("files", {})) > 1 or bool(settings.files_by_split())
    sizes, estimated = {c.num_embeddings for c in hashed}, schema.source.get(ESTIMATED_KEYS)
    reasons = {
        "hash_size": "" if settings.hash_size in sizes | {"auto" if estimated else 0} else "no table has this size",
        "max_hash_size": "" if estimated else "no hash_size is auto",
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


def _facts(settings: PreparationSettings, sources: tuple[Source, ...], format_name: str) -> str:
    """A digest of what an unfinished folder depends on. Raw files and vocabularies count by their size and time."""
    values = {name: str(value) for name, value in asdict(settings).items() if name != "block_bytes"}
    files = [file for source in sources for file in source.files]
    models = [Path(model) for model in (settings.schema_from, settings.like) if model is not None]
    texts = [model / SCHEMA_FILE for model in models] + [Path(path) for path in (settings.dataset_schema,) if path]
    files += [str(file) for model in models for file in sorted((model / VOCABULARY_FOLDER).glob("*.parquet"))]
    if format_name == "hub":
        from dhen.data.formats.hub import hub_revision  # here, because importing `datasets` takes a second

        marks = [hub_revision(file) for source in sources for file in source.files]
    else:
        marks = list(zip(files, of_each(mark_of, files), strict=True))
    facts = [FORMAT_VERSION, cutting.PIECE_BYTES, values, marks, *(path.read_text(encoding="utf-8") for path in texts)]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


def _run_stages(work: Unfinished, raw: Raw, sources: tuple[Source, ...]) -> tuple[list[Piece], Path]:
    """Run all stages. Returns the pieces, and the folder of the encoder."""
    settings = raw.settings
    pieces = cutting.cut(raw.reader, sources, cutting.PIECE_BYTES if settings.head is None else math.inf)
    if counted := cutting.to_count(pieces, in_order=settings.split_order == "sequential"):
        work.run(COUNTING, partial(_count_rows, raw), counted)
    pieces = cutting.place(pieces, {piece.index: work.result(COUNTING, piece)["parts"] for piece in counted})
    encoder = _fit_encoder(work, raw, pieces) if settings.schema_from is None else _given_encoder(work, raw)
    work.run(WRITING, partial(_write_rows, raw, encoder), pieces)
    return pieces, encoder


def _count_rows(raw: Raw, piece: Piece, folder: Path, report: Report) -> dict[str, Any]:
    counts = raw.count(piece, report)
    return {"rows": sum(counts), "parts": counts}


def _given_encoder(work: Unfinished, raw: Raw) -> Path:
    """Copy the encoder of a prepared folder or a saved model."""
    origin = Path(raw.settings.schema_from)
    schema = Schema.load(origin)
    check_same_features(raw.reader.roles, schema.dense, schema.sparse, str(origin))

    def make(folder: Path) -> None:
        for name in schema.looked_up:
            copy_vocabulary(origin, folder, name)
        _save_encoder(folder, replace(schema, splits={}, source={}))

    return work.once(_ENCODER, make)


def _fit_encoder(work: Unfinished, raw: Raw, pieces: list[Piece]) -> Path:
    """Count keys and fit numbers in a stage of its own, where needed. Returns the folder of the encoder.

    Only the train split counts: a key that never occurs there cannot be trained.
    """
    roles, settings = raw.reader.roles, raw.settings
    asked = asked_encodings(roles, settings)
    trained = Schema.load(Path(settings.like)) if settings.like else None
    kept, fits = number_fits(roles, trained)
    counted = {name: each for name, each in asked.items() if each.encoding != "hash" or each.hash_size == "auto"}
    train = [piece for piece in pieces if "train" in piece.splits]
    if not train:
        needs = {"vocabulary": "a vocabulary", "hash": "the hash_size auto"}
        wanted = [f"the bins or the scale of {name!r}" for name in fits]
        wanted += [needs[each.encoding] for each in counted.values() if each.encoding in needs]
        if wanted:
            raise DataError(
                f"{wanted[0]} is built from the train split, but there is none. Add train rows or set schema_from."
            )
        counted = {}
    if counted or fits:
        work.run(KEYS, partial(_count_keys, raw, counted, trained), train)

    def make(folder: Path) -> None:
        made = [work.folder(KEYS, piece) for piece in train]
        for name, fit in fits.items():
            for path in made:
                fit.merge(path / _NUMBERS_FOLDER / f"{name}.npz")
        table_rows: dict[str, int] = {}
        num_keys: dict[str, int] = {}
        for name, of_feature in counted.items():
            folders = [path / _KEYS_FOLDER / name for path in made]
            if of_feature.encoding == "hash":
                num_keys[name] = estimated_keys(folders)
                rows = hash_rows(num_keys[name], settings.max_hash_size)
                logger.info("%s: %s rows for about %s distinct keys", name, f"{rows:,}", f"{num_keys[name]:,}")
                asked[name] = replace(of_feature, hash_size=rows)
                continue
            if not all(path.exists() for path in folders):
                continue  # auto, and too many keys in one piece alone
            files = [file for path in folders for file in sorted(path.iterdir())]
            most_keys = MOST_KEYS if of_feature.encoding == "auto" else None
            rows = build_vocabulary(files, folder, name, min_count=of_feature.min_count, most_keys=most_keys)
            if rows is not None:
                table_rows[name] = rows
        if trained and settings.vocabulary_keys == "union":
            for name in set(trained.looked_up) & set(table_rows):
                union = load_vocabulary(Path(settings.like), name).union(load_vocabulary(folder, name))
                union.save(folder, name)
                table_rows[name] = union.num_embeddings
        fitted = kept | {name: fit.result(name) for name, fit in fits.items()}
        source = {ESTIMATED_KEYS: num_keys} if num_keys else {}
        _save_encoder(folder, Schema(*new_columns(roles, asked, table_rows, fitted), {}, source))

    return work.once(_ENCODER, make)


def _save_encoder(folder: Path, schema: Schema) -> None:
    """Write what the workers encode with, beside the vocabularies. All of them share the files of a vocabulary."""
    schema.save(folder)
    for name in schema.looked_up:
        save_key_ids(folder, name)


def _count_keys(
    raw: Raw,
    counted: Mapping[str, AskedEncoding],
    trained: Schema | None,
    piece: Piece,
    folder: Path,
    report: Report,
) -> dict[str, Any]:
    """Count the keys of the train rows in a piece, or estimate their number for a hash_size, and fit its numbers.

    A feature whose encoding is auto gets no counts if it has more than MOST_KEYS keys.
    """
    counts: dict[str, KeyCounts | KeySketch] = {}
    for name, of_feature in counted.items():
        path, most_keys = folder / _KEYS_FOLDER / name, 2 * MOST_KEYS if of_feature.encoding == "auto" else None
        counts[name] = KeySketch(path) if of_feature.encoding == "hash" else KeyCounts(path, most_keys)
    fits = number_fits(raw.reader.roles, trained, piece.index)[1]
    rows = 0
    for part in raw.chunks(piece, report):
        table = part.chunk.table.filter(part.split_of_row == part.splits.index("train"))
        rows += table.num_rows
        for name, fit in fits.items():
            fit.add(table[name].drop_null().to_numpy())
        for name, count in list(counts.items()):
            keys = table[name].combine_chunks()
            keys = keys.flatten() if pa.types.is_list(keys.type) else keys
            count.add(canonical_keys(keys))
            if counted[name].encoding == "auto" and count.num_merged > MOST_KEYS:
                del counts[name]
        if not counts and not fits:
            break
    for name, fit in fits.items():
        fit.save(folder / _NUMBERS_FOLDER / f"{name}.npz")
    for count in counts.values():
        count.save()
    return {"rows": rows}


@lru_cache(maxsize=1)
def _encoder_of(folder: Path, mark: int) -> Encoder:
    """The encoder in a folder, kept for the next piece. mark: of the folder with this name."""
    schema = Schema.load(folder)
    return Encoder(schema.dense, schema.sparse, {name: KeyIds.load(folder, name) for name in schema.looked_up})


def _write_rows(raw: Raw, encoder_folder: Path, piece: Piece, folder: Path, report: Report) -> dict[str, Any]:
    """Encode and write the rows of a piece. Rows to predict get the file and row number that they came from."""
    encoder, bytes_read = _encoder_of(encoder_folder, encoder_folder.stat().st_ino), 0
    writers = {split: SplitWriter(folder / split) for split in piece.splits}
    bad_rows = dict.fromkeys(piece.splits, 0)
    unknown_keys = {split: Counter() for split in piece.splits}

    def report_and_add(rows: int, num_bytes: int) -> None:
        nonlocal bytes_read
        bytes_read += num_bytes
        report(rows, num_bytes)

    with ExitStack() as stack:
        for writer in writers.values():
            stack.enter_context(closing(writer))
        for part in raw.chunks(piece, report_and_add):
            list_bad_rows(folder, part.chunk.bad)
            encoded, unknown = encoder.encode_and_count(part.chunk.table)
            if not raw.settings.is_label_required:
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
    return {
        "rows": sum(count.rows for count in counts.values()),
        "splits": {split: asdict(count) for split, count in counts.items()},
        "parts": {split: writer.num_parts for split, writer in writers.items()},
        "share_read": min(bytes_read / piece.num_bytes, 1.0) if piece.num_bytes else 1.0,
    }


def _join(work: Unfinished, pieces: list[Piece], encoder: Path, source: dict[str, Any], *, is_head: bool) -> Schema:
    """Move the rows of all pieces into one prepared folder, with what belongs beside them."""
    folder, results = work.path / _RESULT, [work.result(WRITING, piece) for piece in pieces]
    folder.mkdir(exist_ok=True)
    in_order = [work.folder(WRITING, piece) for piece in pieces]
    splits: dict[str, SplitCounts] = {}
    for split in dict.fromkeys(split for piece in pieces for split in piece.splits):
        splits[split] = sum_of([SplitCounts(**r["splits"][split]) for r in results if split in r["splits"]])
    _refuse_mostly_bad(splits, in_order)
    for split, count in splits.items():
        if count.rows == 0:
            raise DataError(
                f"the split {split} has no rows ({count.bad_rows} bad rows were skipped); all splits together have "
                f"{sum(c.rows for c in splits.values())}. Add rows, or change the files or split_fractions."
            )
        parts = [
            (path / split, r["parts"][split]) for path, r in zip(in_order, results, strict=True) if split in r["parts"]
        ]
        join_parts(parts, folder / split)
    join_bad_rows(in_order, folder)
    if is_head:
        source = source | {SHARES: {split: r["share_read"] for r in results for split in r["splits"]}}
    columns = Schema.load(encoder)
    for name in columns.looked_up:
        copy_vocabulary(encoder, folder, name)
    schema = Schema(columns.dense, columns.sparse, splits, source | columns.source)
    schema.save(folder)
    return schema


def _refuse_mostly_bad(counts: Mapping[str, SplitCounts], pieces: Sequence[Path]) -> None:
    """Raise DataError if most rows were skipped: the format or schema is then probably wrong, not the rows."""
    good, bad = (sum(getattr(count, name) for count in counts.values()) for name in ("rows", "bad_rows"))
    if bad > good:
        first = next(filter(None, map(first_bad_row, pieces)))
        raise DataError(
            f"{bad:,} of {good + bad:,} rows are bad. This is more than half, so the format or the schema is probably "
            f"wrong. The first bad row: {first}"
        )


def _source(settings: PreparationSettings, format_name: str, sources: tuple[Source, ...]) -> dict[str, object]:
    """Return the `source` entry of schema.json, which says where the rows came from."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    del values["block_bytes"], values["head"]
    files = {"+".join(source.splits): list(source.files) for source in sources}
    return {"format": format_name, "files": files, "settings": values}
