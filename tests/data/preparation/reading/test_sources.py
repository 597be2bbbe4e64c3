"""Where raw data may be, and how it may be compressed: the prepared folder is the same to the byte."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import polars as pl
import pytest

from dhen.data.formats import raw_files
from dhen.data.formats.raw_files import UnreachableError
from dhen.data.formats.raw_rows import DataError
from dhen.data.preparation.caching import prepare_cached
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.reading import pieces as cutting
from dhen.data.preparation.running.runners import LocalProcesses
from dhen.data.preparation.settings import PreparationSettings
from tests.data.preparation.reference_preparation import PACK, criteo_lines

HERE = LocalProcesses(1)
PACK_OR_NOT = {"": bytes, **PACK}
LINES = criteo_lines(400)
TEXT = "".join(f"{line}\n" for line in LINES).encode()


def prepared(out: Path, name: object, runner: LocalProcesses = HERE, **settings: object) -> dict[str, bytes]:
    """The files of the prepared folder; of the schema, all but where the rows came from."""
    prepare(PreparationSettings(name, **settings), out, runner=runner)
    files = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    schema = json.loads(files["schema.json"])
    del schema["source"]["files"], schema["source"]["settings"]["dataset_name"]
    return files | {"schema.json": json.dumps(schema).encode()}


@pytest.fixture
def plain(tmp_path) -> dict[str, bytes]:
    (tmp_path / "log.tsv").write_bytes(TEXT)
    return prepared(tmp_path / "plain", str(tmp_path / "log.tsv"))


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["log.tsv", "log"])
def test_compressed_files_are_prepared_like_plain_ones(tmp_path, plain, suffix, name):
    middle = len(TEXT) // 2
    for content in (PACK[suffix](TEXT), PACK[suffix](TEXT[:middle]) + PACK[suffix](b"") + PACK[suffix](TEXT[middle:])):
        for path in (tmp_path / f"{name}{suffix}", tmp_path / "without_suffix"):
            path.write_bytes(content)
            assert prepared(tmp_path / f"{path.name}-{len(content)}", str(path)) == plain


class ByRange(SimpleHTTPRequestHandler):
    """Serves a folder, and parts of its files."""

    broken: list[int] = []  # noqa: RUF012
    """If it holds a number, nothing is sent from this byte of a file on."""

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            super().do_GET()
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        start, end = int(asked[1]), min(int(asked[2]) + 1, len(content))
        if self.broken and end > self.broken[0]:
            self.send_error(503)
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        self.wfile.write(content[start:end])

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class Whole(ByRange):
    """Python's own server, which sends all of a file whatever part is asked for."""

    def do_GET(self) -> None:
        SimpleHTTPRequestHandler.do_GET(self)


@contextmanager
def served(folder: Path, handler: type[ByRange] = ByRange) -> Iterator[str]:
    """The URL of a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def web(tmp_path) -> Path:
    """The log, plain and compressed, in a folder that a server can serve."""
    (tmp_path / "web").mkdir()
    for suffix, pack in PACK_OR_NOT.items():
        (tmp_path / "web" / f"log.tsv{suffix}").write_bytes(pack(TEXT))
    return tmp_path / "web"


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


@pytest.mark.parametrize("suffix", PACK_OR_NOT)
def test_a_file_in_memory_is_prepared_like_a_local_one(tmp_path, plain, memory, suffix):
    memory.pipe(f"/logs/log.tsv{suffix}", PACK_OR_NOT[suffix](TEXT))
    for i, url in enumerate((f"memory://logs/log.tsv{suffix}", "memory://logs/*.tsv*", "memory://logs/")):
        assert prepared(tmp_path / str(i), url) == plain


@pytest.mark.parametrize("handler", [ByRange, Whole])
def test_a_file_on_a_web_server_is_prepared_like_a_local_one(tmp_path, plain, web, handler):
    with served(web, handler) as url:
        for suffix in PACK_OR_NOT:
            assert prepared(tmp_path / f"out{suffix}", f"{url}/log.tsv{suffix}") == plain
        assert prepared(tmp_path / "pattern", f"{url}/*.gz") == plain
        for file in web.glob("*.tsv.*"):
            file.unlink()
        assert prepared(tmp_path / "folder", f"{url}/") == plain


class Counting(LocalProcesses):
    """Notes how many pieces each stage has to do."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.pieces: list[int] = []

    def __call__(self, task, pieces, report):
        self.pieces.append(len(pieces))
        super().__call__(task, pieces, report)


@pytest.mark.parametrize("handler", [ByRange, Whole])
def test_several_processes_read_from_a_web_server(tmp_path, monkeypatch, handler):
    monkeypatch.setattr(cutting, "PIECE_BYTES", len(TEXT) // 3)
    (tmp_path / "web").mkdir()
    # A file that is sent only as a whole is read by one process. These are too small to be cut anyway.
    parts = [LINES] if handler is ByRange else [LINES[:160], LINES[160:]]
    files = [tmp_path / "web" / f"{i}.tsv" for i in range(len(parts))]
    for file, lines in zip(files, parts, strict=True):
        file.write_text("".join(f"{line}\n" for line in lines))
    local = prepared(tmp_path / "local", tuple(map(str, files)))
    runner = Counting(2)
    with served(tmp_path / "web", handler) as url:
        assert prepared(tmp_path / "remote", tuple(f"{url}/{file.name}" for file in files), runner) == local
    assert runner.pieces[-1] == (3 if handler is ByRange else 2)


def test_parquet_is_read_in_parts(tmp_path, monkeypatch, web):
    monkeypatch.setattr(cutting, "PIECE_BYTES", 1)
    frame = pl.DataFrame({"label": [i % 3 == 0 for i in range(900)], "user": [f"u{i % 50}" for i in range(900)]})
    frame.write_parquet(web / "log.parquet", row_group_size=300)
    (tmp_path / "schema.yaml").write_text("sparse: [user]\n")
    given = {"dataset_schema": tmp_path / "schema.yaml"}
    local = prepared(tmp_path / "local", str(web / "log.parquet"), **given)
    runner = Counting(2)
    with served(web) as url:
        assert prepared(tmp_path / "remote", f"{url}/log.parquet", runner, **given) == local
    assert runner.pieces[-1] == 3
    with served(web, Whole) as url, pytest.raises(DataError, match="sends only whole files, but Parquet is read in p"):
        prepared(tmp_path / "whole", f"{url}/log.parquet", **given)


@pytest.mark.parametrize("suffix", PACK)
def test_a_truncated_file_at_a_url_is_named(tmp_path, memory, web, suffix):
    content = PACK[suffix](TEXT)[:-9]
    memory.pipe(f"/cut.tsv{suffix}", content)
    (web / f"cut.tsv{suffix}").write_bytes(content)
    with served(web) as url:
        for name in (f"memory://cut.tsv{suffix}", f"{url}/cut.tsv{suffix}"):
            message = rf"{name}: the \{suffix} is truncated or damaged after row \d+ \("
            with pytest.raises(DataError, match=message) as caught:
                prepared(tmp_path / "out", name, dataset_format="criteo")
            assert "\n" not in str(caught.value)


def refusal(out: Path, name: str) -> str:
    """The message for a URL that cannot be used."""
    with pytest.raises((DataError, FileNotFoundError)) as caught:
        prepared(out, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_url_that_is_not_there_is_named(tmp_path, memory, web):
    memory.pipe("/prepared/schema.json", b"{}")
    with served(web) as url:
        for name in ("memory://nothing.tsv", f"{url}/nothing.tsv", f"{url}/nothing/"):
            assert refusal(tmp_path / "out", name) == f"{name}: no such file. Check the URL."
        for name in ("memory://*.tsv", f"{url}/*.csv"):
            assert refusal(tmp_path / "out", name) == f"{name}: no file is there. Check the URL."
    assert re.match(rf"{url}/log.tsv: cannot be read \(.*Cannot connect", refusal(tmp_path / "out", f"{url}/log.tsv"))
    assert refusal(tmp_path / "out", "other://log.tsv").startswith("other://log.tsv: cannot be read (ValueError: Proto")
    assert "a prepared folder cannot be at a URL" in refusal(tmp_path / "out", "memory://prepared")
    with pytest.raises(ValueError, match=r"s3:/bucket/out: a prepared folder is written to a disk, not to a URL"):
        prepared(Path("s3://bucket/out"), str(web / "log.tsv"))


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/log.tsv", "s3fs"), ("gs://bucket/*.gz", "gcsfs")])
def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch, url, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = refusal(tmp_path / "out", url)
    assert message.startswith(f"{url}: a package for {url[:5]} is missing (")
    assert package in message
    assert message.endswith("pip install 'dhen[remote]'.")


@pytest.mark.parametrize(
    "url",
    [
        "https://host/log.csv?X-Amz-Signature=SECRET",
        "https://SECRET@host/log.csv",
        "https://user:SECRET@host/log.csv",
        "s3://AKIA:sla/SECRET@bucket/log.csv",
        "zip://log.csv::https://host/log.zip?SECRET",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_shown(tmp_path, url):
    message = refusal(tmp_path / "out", url)
    assert "a URL may have no user, password or query" in message
    assert "SECRET" not in message


def must_not_prepare(state):
    raise AssertionError("it was prepared again")


def test_a_changed_file_at_a_url_is_prepared_again(tmp_path, memory):
    wanted, other = PreparationSettings("memory://log.tsv"), TEXT.replace(LINES[0].encode(), LINES[1].encode())
    memory.pipe("/log.tsv", TEXT)
    first = prepare_cached(wanted, tmp_path / "cache")
    assert prepare_cached(wanted, tmp_path / "cache", progress=must_not_prepare) == first
    memory.pipe("/log.tsv", other)
    assert prepare_cached(wanted, tmp_path / "cache") != first
    with pytest.raises(DataError, match="a file has changed while it was prepared"):
        prepare(wanted, tmp_path / "out", runner=HERE, progress=lambda _: memory.pipe("/log.tsv", TEXT))


@pytest.mark.parametrize("tells_time", [True, False])
def test_a_changed_file_on_a_web_server_is_prepared_again(tmp_path, monkeypatch, web, tells_time):
    if not tells_time:
        end = ByRange.send_header
        monkeypatch.setattr(ByRange, "send_header", lambda s, name, v: name == "Last-Modified" or end(s, name, v))
    with served(web) as url:
        wanted = PreparationSettings(f"{url}/log.tsv", dataset_format="criteo")
        first = prepare_cached(wanted, tmp_path / "cache")
        assert prepare_cached(wanted, tmp_path / "cache", progress=must_not_prepare) == first
        (web / "log.tsv").write_bytes(TEXT[::-1][1:][::-1] + b"\r")
        os.utime(web / "log.tsv", (1, 1))
        assert prepare_cached(wanted, tmp_path / "cache") != first


def test_what_is_finished_stays_when_a_server_fails(tmp_path, monkeypatch, web):
    monkeypatch.setattr(cutting, "PIECE_BYTES", len(TEXT) // 4)
    monkeypatch.setattr(raw_files.open_file, "__defaults__", (1000,))
    given = {"dataset_format": "criteo"}
    with served(web) as url:
        monkeypatch.setattr(ByRange, "broken", [len(TEXT) * 5 // 8])
        with pytest.raises(UnreachableError, match=rf"{url}/log.tsv: cannot be read \(.*503.*Check the URL"):
            prepared(tmp_path / "out", f"{url}/log.tsv", **given)
        monkeypatch.setattr(ByRange, "broken", [])
        runner = Counting(1)
        made = prepared(tmp_path / "out", f"{url}/log.tsv", runner, **given)
    assert made == prepared(tmp_path / "local", str(web / "log.tsv"), **given)
    assert 0 < runner.pieces[0] < 3, "some pieces were counted before"
