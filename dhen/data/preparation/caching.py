"""A cache of prepared folders: the same raw files and settings are prepared only once."""

import contextlib
import hashlib
import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from dhen.data.formats.raw_files import is_url, mark_of, of_each, open_file, size_of
from dhen.data.formats.raw_rows import DataError
from dhen.data.formats.roles import COLUMNS_FILE
from dhen.data.preparation.encoding.vocabulary import VOCABULARY_FOLDER
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.reading.pieces import PIECE_BYTES
from dhen.data.preparation.reading.sources import open_sources
from dhen.data.preparation.running.progress import ProgressCallback
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import FORMAT_VERSION, SCHEMA_FILE
from dhen.paths import write_atomically

_DIGESTS_FILE = ".digests.json"
_HEAD_BLOCK = 1 << 20
LARGE_BYTES = 5 << 30
"""Raw files of more bytes together are not prepared while other machines wait."""
_NOT_IN_DIGEST = {
    *("dataset_name", "train_file", "validation_file", "test_file", "dataset_schema", "schema_from", "like"),
    *("block_bytes", "head"),
}
"""Settings that are paths (the digest covers the files' contents instead) or that do not change the result."""

logger = logging.getLogger(__name__)


def prepare_cached(
    settings: PreparationSettings,
    cache: str | Path,
    *,
    progress: ProgressCallback | None = None,
    may_be_large: bool = True,
) -> Path:
    """Return the prepared folder for these settings, creating it under `cache` if needed.

    If dataset_name is already a prepared folder, returns it. Several processes may call this at once: the first to
    finish provides the folder, and the others discard theirs. With a `head`, reads no whole file, not even to find that
    the cache has its content from elsewhere. Raises what `prepare` raises, and DataError if the raw files are not yet
    prepared, have more than LARGE_BYTES, and may not.
    """
    name = settings.dataset_name
    if isinstance(name, str | Path) and settings.schema_from is None and (Path(name) / SCHEMA_FILE).is_file():
        return Path(name)
    head = settings.head
    too_large = not may_be_large and raw_bytes(settings) > LARGE_BYTES
    folder = Path(cache) / _digest(settings, FileDigests(Path(cache), only_known=too_large or head is not None))
    if (folder / SCHEMA_FILE).is_file():
        logger.info("%s: reusing the folder prepared earlier from the same files and settings", folder)
    elif head is not None:
        # A split in order would put all of these rows into train.
        settings, folder = replace(settings, split_order="random", block_bytes=_HEAD_BLOCK), head.folder / "prepared"
        prepare(settings, folder, progress=lambda _: None)
    elif too_large:
        raise DataError(
            f"the raw files have {raw_bytes(settings) / 2**30:.1f} GiB, and the other nodes of this job would wait "
            f"while they are prepared. First run `{command_for(settings)}`, then train with "
            f"--dataset_name data/prepared; or add --prepare_here."
        )
    else:
        try:
            prepare(settings, folder, progress=progress)
        except FileExistsError:
            if not (folder / SCHEMA_FILE).is_file():
                raise
    return folder


def raw_bytes(settings: PreparationSettings) -> int:
    """The size of all raw files, without those of the hub."""
    return sum(of_each(size_of, [file for source in open_sources(settings)[2] for file in source.files]))


def command_for(settings: PreparationSettings) -> str:
    """The command that prepares the same data into the folder data/prepared."""
    words = ["python", "tools/prepare_data.py"]
    for item in fields(PreparationSettings):
        value = getattr(settings, item.name)
        if value != item.default and item.name not in ("block_bytes", "head"):
            values = value if isinstance(value, tuple | list) else (value,)
            words += [f"--{item.name}", *map(str, values)]
    return shlex.join([*words, "--output", "data/prepared"])


def _digest(settings: PreparationSettings, digests: "FileDigests") -> str:
    """Return a digest of everything that determines the result: files, settings and the version."""
    relevant = {name: value for name, value in asdict(settings).items() if name not in _NOT_IN_DIGEST}
    if not settings.keep:
        del relevant["keep"]
    if settings.schema_from is not None:
        for name in ("id_encoding", "hash_size", "max_hash_size", "min_count"):  # they have no effect
            del relevant[name]
    if settings.like is None:
        del relevant["vocabulary_keys"]
    _, format_name, sources = open_sources(settings)
    inputs = [(source.splits, _fingerprints(format_name, source.files, digests)) for source in sources]
    if not settings.is_label_required:  # these rows include the names of their files
        inputs.append([source.files for source in sources])
    facts = [FORMAT_VERSION, COLUMNS_FILE, PIECE_BYTES, format_name, relevant, inputs]
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16)
    if settings.dataset_schema is not None:
        digest.update(Path(settings.dataset_schema).read_bytes())
    for origin in (settings.schema_from, settings.like):
        if origin is None:
            continue
        origin = Path(origin)
        columns = [origin / COLUMNS_FILE] if (origin / COLUMNS_FILE).is_file() else []
        for file in (origin / SCHEMA_FILE, *columns, *sorted((origin / VOCABULARY_FOLDER).glob("*.parquet"))):
            digest.update(f"{file.name}:{digests.of(str(file))}".encode())
    return digest.hexdigest()


def _fingerprints(format_name: str, files: Sequence[str], digests: "FileDigests") -> list[str]:
    if format_name != "hub":
        return [digests.of(file) for file in files]
    from dhen.data.formats.hub import hub_revision  # here, because importing `datasets` takes a second

    return [hub_revision(files)]


class FileDigests:
    """Digests of whole files, cached by path. A digest stays valid until the file's size or times change.

    only_known: other files have the digest "", which no prepared folder was made of.
    """

    def __init__(self, cache: Path, *, only_known: bool = False) -> None:
        self._path, self._only_known = cache / _DIGESTS_FILE, only_known
        self._known: dict[str, list[int | str]] = {}
        with contextlib.suppress(OSError, ValueError):  # missing or damaged: read the files again
            self._known = json.loads(self._path.read_text(encoding="utf-8"))

    def of(self, file: str) -> str:
        """Return the digest of a file's content, independent of its name and times.

        A URL is not read for it, unless its server tells nothing that changes with the content.
        Stores a new one for the next run. If two processes do so at once, one digest is lost and recomputed later.
        """
        mark = mark_of(file)
        if is_url(file):
            return f"{file}: {mark}" if len(mark) > 1 or self._only_known else _content_digest(file)
        # Include ctime, because whoever edits a file can reset mtime, but not ctime.
        mark.append(Path(file).stat().st_ctime_ns)
        path = str(Path(file).resolve())
        known = self._known.get(path, [])
        if known[:-1] == mark:
            return known[-1]
        if self._only_known:
            return ""
        digest = _content_digest(file)
        self._known[path] = [*mark, digest]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(self._known))
        return digest


def _content_digest(file: str) -> str:
    with open_file(file) as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
