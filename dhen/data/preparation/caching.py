"""Prepared folders kept by content: the same raw files and settings are prepared once."""

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

from dhen.data.preparation.preprocessing import PREPARATION_VERSION, prepare
from dhen.data.preparation.raw_stream import ProgressCallback
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.preparation.sources import open_sources
from dhen.data.preparation.vocabulary import VOCABULARY_FOLDER
from dhen.data.schema import SCHEMA_FILE

_DIGESTS_FILE = ".digests.json"
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
    folder = Path(cache) / _digest(settings, FileDigests(Path(cache)))
    if not (folder / SCHEMA_FILE).is_file():
        try:
            prepare(settings, folder, progress=progress)
        except FileExistsError:
            if not (folder / SCHEMA_FILE).is_file():
                raise
    else:
        logger.info("%s: prepared earlier from the same files and settings", folder)
    return folder


def _digest(settings: PreparationSettings, digests: "FileDigests") -> str:
    """What the result depends on: the files, the settings and this program's format."""
    said = {name: value for name, value in asdict(settings).items() if name not in _NOT_THE_CONTENT}
    _, format_name, sources = open_sources(settings)
    inputs = [
        (source.splits, [_fingerprint(format_name, file, digests) for file in source.files]) for source in sources
    ]
    if not settings.is_label_required:  # such rows carry the names of their files
        inputs.append([source.files for source in sources])
    digest = hashlib.blake2b(json.dumps([PREPARATION_VERSION, format_name, said, inputs]).encode(), digest_size=16)
    if settings.dataset_schema is not None:
        digest.update(Path(settings.dataset_schema).read_bytes())
    if settings.schema_from is not None:
        origin = Path(settings.schema_from)
        for file in (origin / SCHEMA_FILE, *sorted((origin / VOCABULARY_FOLDER).glob("*.parquet"))):
            digest.update(f"{file.name}:{digests.of(file)}".encode())
    digests.save()
    return digest.hexdigest()


def _fingerprint(format_name: str, file: str, digests: "FileDigests") -> str:
    if format_name != "hub":
        return digests.of(Path(file))
    from dhen.data.formats.hub import hub_revision  # `datasets` takes a second to import: only those who use it wait

    return hub_revision(file)


class FileDigests:
    """Digests of whole files. Those read before are kept in the cache, by path, and hold while size and times do."""

    def __init__(self, cache: Path) -> None:
        self._path = cache / _DIGESTS_FILE
        self._known: dict[str, list[int | str]] = {}
        self._is_new = False
        with contextlib.suppress(OSError, ValueError):  # none yet, or damaged: then files are read again
            self._known = json.loads(self._path.read_text(encoding="utf-8"))

    def of(self, file: Path) -> str:
        """The digest of a file's content, whatever its name and times."""
        status = file.stat()
        # The time of change too: whoever edits a file can set the time of its last modification back, but not this one.
        mark = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        path = str(file.resolve())
        known = self._known.get(path, [])
        if known[:-1] == mark:
            return known[-1]
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        self._known[path] = [*mark, digest]
        self._is_new = True
        return digest

    def save(self) -> None:
        """Keep them for the next time. Of two processes that do so at once one is forgotten, and reads again."""
        if self._is_new:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft = self._path.with_name(f"{self._path.name}.{os.getpid()}.draft")
            draft.write_text(json.dumps(self._known), encoding="utf-8")
            draft.replace(self._path)
