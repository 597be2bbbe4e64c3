"""Raw files on this machine, or at a URL that fsspec reads: s3://, gs://, hdfs://, http(s)://, memory:// and others.

fsspec finds credentials in the environment or its configuration. They may not stand in the URL, because messages and
schema.json name it.
"""

import glob
import io
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec

from dhen.data.formats.raw_rows import DataError

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_HIDDEN = re.compile(r"(^|/)[._?][^/]*$")
_HTTP = ("http://", "https://")
_CREDENTIAL = re.compile(r"(?<!http)(?<!https)://[^@]*:.*@|https?://([^/]*@|.*\?)")
"""A password anywhere, and a user or a query (as of a signed URL) of a web page."""
_AHEAD_BYTES = 2 << 20
"""How much is read from a URL beyond what is asked for."""
_VERSIONS = ("ETag", "etag", "Content-MD5", "Last-Modified", "LastModified", "last_modified", "mtime", "modified")
"""What file systems call the thing that changes with a file's content. The first one that is there is used."""
_THREADS = 16
_Result = TypeVar("_Result")


class UnreachableError(DataError):
    """A URL cannot be read now. What is finished of the data stays."""


def is_url(file: str) -> bool:
    """Whether this is a URL, and not a path on this machine."""
    return _URL.match(file) is not None


def open_file(file: str, ahead_bytes: int = _AHEAD_BYTES) -> BinaryIO:
    """Open a file for reading. Reading a URL raises FileNotFoundError or UnreachableError."""
    if not is_url(file):
        return open(file, "rb")
    block_size = ahead_bytes if can_seek(file) else 0  # 0: as a stream
    with _reaching(file):
        system, path = _system(file)
        content = system.open(path, "rb", block_size=block_size)
    return io.BufferedReader(_RemoteFile(file, content), min(ahead_bytes, io.DEFAULT_BUFFER_SIZE))


def size_of(file: str) -> int:
    """Return the size of a file in bytes, or 0 where none is known, as of a split of a hub's data set."""
    if is_url(file):
        return _info(file)["size"] or 0
    return Path(file).stat().st_size if Path(file).is_file() else 0


def mark_of(file: str) -> list[int | str]:
    """Return what changes with a file's content: its size and, unless a server does not tell, its time or version."""
    if not is_url(file):
        status = Path(file).stat()
        return [status.st_size, status.st_mtime_ns]
    info = _info(file, is_fresh=True)
    versions = [str(info[key]) for key in _VERSIONS if info.get(key)]
    return [info["size"] or 0, *versions[:1]]


@lru_cache(maxsize=4096)
def can_seek(file: str) -> bool:
    """Whether a file can be read from its middle. Some web servers send it only as a whole."""
    if not file.startswith(_HTTP):
        return True
    with _reaching(file):
        system, path = _system(file)
        with system.open(path, "rb", block_size=1) as content:
            try:
                content.seek(1)
                content.read(1)
            except ValueError:
                return False
    return True


def files_at(url: str) -> list[str]:
    """Return the files of a URL, which may be a glob or a folder, sorted by name. Raises FileNotFoundError."""
    with _reaching(url):
        system, path = _system(url)
        if glob.has_magic(path):
            found = system.glob(path, detail=True)
        elif url.endswith("/") or system.info(path)["type"] == "directory":
            found = {info["name"]: info for info in system.ls(path, detail=True)}
        else:
            return [url]
    names = [name for name, info in sorted(found.items()) if info["type"] == "file" and not _HIDDEN.search(name)]
    if not names:
        raise FileNotFoundError(f"{url}: no file is there. Check the URL.")
    path = path.rstrip("/")
    if not url.rstrip("/").endswith(path):
        return [system.unstrip_protocol(name) for name in names]
    return [url.rstrip("/").removesuffix(path) + name for name in names]


def of_each(function: Callable[[str], _Result], files: Sequence[str]) -> list[_Result]:
    """Return a function's result for each file, in order. Several are asked at a time, since servers take a while."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(function, files))


class _RemoteFile(io.RawIOBase):
    """A file that fsspec opened. Whatever its file system raises becomes an error that names the URL."""

    def __init__(self, url: str, content: Any) -> None:
        self._url, self._content, self._at = url, content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return can_seek(self._url)

    def readinto(self, buffer: memoryview) -> int:
        with _reaching(self._url):
            self._content.seek(self._at)
            data = self._content.read(len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = size_of(self._url) if whence == io.SEEK_END else self._at if whence == io.SEEK_CUR else 0
        self._at = start + offset
        return self._at

    def close(self) -> None:
        self._content.close()
        super().close()


def _system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path in it."""
    if _CREDENTIAL.search(url):
        raise DataError(
            f"{_URL.match(url)[0]}…: a URL may have no user, password or query, because messages and schema.json name "
            "it. Give credentials to fsspec by the environment or by its configuration."
        )
    return fsspec.url_to_fs(url, **_patience(url))


def _patience(url: str) -> dict[str, Any]:
    """A web server that cannot seek sends for as long as the file is prepared; aiohttp ends that after five minutes."""
    if not url.startswith(_HTTP) or "client_kwargs" in fsspec.config.conf.get("http", {}):
        return {}
    from fsspec.implementations import http  # needs aiohttp

    return {"client_kwargs": {"timeout": http.aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=300)}}


def _info(url: str, *, is_fresh: bool = False) -> dict[str, Any]:
    with _reaching(url):
        system, path = _system(url)
        if is_fresh:
            system.invalidate_cache(path)
        return system.info(path)


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Turn what a file system raises into an error that names the URL. Its own may hold a secret, and is not shown."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        protocol = _URL.match(url)[0]
        raise DataError(
            f"{url}: a package for {protocol} is missing ({_line(error)}). For s3://, gs:// and http://: "
            "pip install 'dhen[remote]'."
        ) from None
    except Exception as error:  # each file system has its own
        cause = error.__cause__ or error  # of a web page that is not found
        if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
            raise FileNotFoundError(f"{url}: no such file. Check the URL.") from None
        raise UnreachableError(
            f"{url}: cannot be read ({_line(cause)}). Check the URL, the connection and the credentials."
        ) from None


def _line(error: BaseException) -> str:
    text = " ".join(re.sub(r"\?[^\s'\"]*", "?…", str(error)).split())
    return f"{type(error).__name__}: {text:.300}" if text else type(error).__name__
