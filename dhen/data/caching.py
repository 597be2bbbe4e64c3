"""Prepared folders kept by content: the same raw files and settings are prepared once."""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path

from dhen.data.preprocessing import FORMAT_VERSION, prepare
from dhen.data.raw_stream import ProgressCallback
from dhen.data.schema import SCHEMA_FILE
from dhen.data.settings import PreparationSettings
from dhen.data.sources import open_sources
from dhen.data.vocabulary import VOCABULARY_FOLDER

_SAMPLE_BYTES = 1 << 20
_NOT_THE_CONTENT = {
    *("dataset_name", "train_file", "validation_file", "test_file", "dataset_schema", "schema_from"),
    "block_bytes",
}
"""Settings that say where something is (what it holds is digested), or that don't change the result."""

logger = logging.getLogger(__name__)


def prepare_cached(
    settings: PreparationSettings, cache: str | Path, *, progress: ProgressCallback | None = None
) -> Path:
    """The prepared folder for these settings: under `cache`, made now if it isn't there yet.

    Where dataset_name is a prepared folder itself, that is it. Safe to be called by several processes at once: the
    first to finish gives the folder, the others drop theirs. Raises what `prepare` raises.
    """
    name = settings.dataset_name
    if isinstance(name, str | Path) and settings.schema_from is None and (Path(name) / SCHEMA_FILE).is_file():
        return Path(name)
    folder = Path(cache) / _digest(settings)
    if not (folder / SCHEMA_FILE).is_file():
        try:
            prepare(settings, folder, progress=progress)
        except FileExistsError:
            if not (folder / SCHEMA_FILE).is_file():
                raise
    else:
        logger.info("%s: prepared earlier from the same files and settings", folder)
    return folder


def _digest(settings: PreparationSettings) -> str:
    """What the result depends on: the files, the settings and this program's format."""
    said = {name: value for name, value in asdict(settings).items() if name not in _NOT_THE_CONTENT}
    _, format_name, sources = open_sources(settings)
    inputs = [(source.splits, [_fingerprint(format_name, file) for file in source.files]) for source in sources]
    digest = hashlib.blake2b(json.dumps([FORMAT_VERSION, format_name, said, inputs]).encode(), digest_size=16)
    if settings.dataset_schema is not None:
        digest.update(Path(settings.dataset_schema).read_bytes())
    if settings.schema_from is not None:
        origin = Path(settings.schema_from)
        for file in (origin / SCHEMA_FILE, *sorted((origin / VOCABULARY_FOLDER).glob("*.parquet"))):
            digest.update(file_fingerprint(file).encode())
    return digest.hexdigest()


def _fingerprint(format_name: str, file: str) -> str:
    if format_name != "hub":
        return file_fingerprint(file)
    from dhen.data.hub import hub_revision  # `datasets` takes a second to import: only those who use it wait

    return hub_revision(file)


def file_fingerprint(file: str | Path) -> str:
    """Name, size, time of the last change, and a digest of the first and the last MiB: cheap for files of any size."""
    file = Path(file)
    status = file.stat()
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as content:
        digest.update(content.read(_SAMPLE_BYTES))
        content.seek(max(status.st_size - _SAMPLE_BYTES, 0))
        digest.update(content.read(_SAMPLE_BYTES))
    return f"{file.name}:{status.st_size}:{status.st_mtime_ns}:{digest.hexdigest()}"
