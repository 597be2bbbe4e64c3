"""A raw file is prepared only once for the same content and settings."""

import os
import shlex
import shutil

import pytest

from dhen.data.formats.raw_rows import DataError
from dhen.data.preparation import caching
from dhen.data.preparation.caching import command_for, prepare_cached
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import Schema
from tests.data.preparation.reference_preparation import criteo_lines
from tools import prepare_data


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "raw.txt").write_text("\n".join(criteo_lines(60)))
    return tmp_path / "raw.txt"


def must_not_prepare(state):
    raise AssertionError("it was prepared again")


def test_the_second_call_takes_the_first_ones_folder(tmp_path, raw):
    first = prepare_cached(PreparationSettings(str(raw)), tmp_path / "cache")
    assert sum(counts.rows for counts in Schema.load(first).splits.values()) == 60
    again = PreparationSettings(str(raw), block_bytes=1000)
    assert prepare_cached(again, tmp_path / "cache", progress=must_not_prepare) == first


def test_other_content_or_settings_are_prepared_anew(tmp_path, raw):
    folders = [prepare_cached(PreparationSettings(str(raw)), tmp_path / "cache")]
    for other in ({"hash_size": 10}, {"split_seed": 1}, {"id_encoding": "vocabulary"}):
        folders.append(prepare_cached(PreparationSettings(str(raw), **other), tmp_path / "cache"))
    times = raw.stat()
    text = raw.read_text()
    raw.write_text(("1" if text[0] == "0" else "0") + text[1:])
    # Same size and modification time: only the content differs.
    os.utime(raw, ns=(times.st_atime_ns, times.st_mtime_ns))
    folders.append(prepare_cached(PreparationSettings(str(raw)), tmp_path / "cache"))
    assert len(set(folders)) == 5


def test_another_yaml_schema_is_prepared_anew(tmp_path):
    (tmp_path / "raw.csv").write_text("label,a,b\n1,2,3\n0,1,2\n")
    (tmp_path / "schema.yaml").write_text("sparse: [a, b]")
    wanted = PreparationSettings(
        str(tmp_path / "raw.csv"), dataset_schema=tmp_path / "schema.yaml", split_fractions=(1, 0, 0)
    )
    first = prepare_cached(wanted, tmp_path / "cache")
    (tmp_path / "schema.yaml").write_text("sparse: [a]\nignored: [b]")
    assert prepare_cached(wanted, tmp_path / "cache") != first


def test_two_at_once_end_with_one_folder(tmp_path, raw):
    wanted = PreparationSettings(str(raw))
    inner = []

    def meanwhile(state):
        if not inner:
            inner.append(None)
            inner[0] = prepare_cached(wanted, tmp_path / "cache")

    assert prepare_cached(wanted, tmp_path / "cache", progress=meanwhile) == inner[0]
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == inner


def test_a_touched_copy_is_found_again_and_an_edit_in_the_middle_is_seen(tmp_path):
    raw, copy = tmp_path / "raw.txt", tmp_path / "copy" / "other.txt"
    raw.write_text("\n".join(criteo_lines(20_000)))
    assert raw.stat().st_size > 3 << 20
    wanted = PreparationSettings(str(raw), split_fractions=(1, 0, 0))
    first = prepare_cached(wanted, tmp_path / "cache")
    copy.parent.mkdir()
    copy.write_bytes(raw.read_bytes())
    os.utime(copy, (1, 1))
    again = PreparationSettings(str(copy), split_fractions=(1, 0, 0))
    assert prepare_cached(again, tmp_path / "cache", progress=must_not_prepare) == first
    times, text = raw.stat(), raw.read_text().splitlines()
    text[10_000] = ("1" if text[10_000][0] == "0" else "0") + text[10_000][1:]
    raw.write_text("\n".join(text))
    os.utime(raw, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prepare_cached(wanted, tmp_path / "cache") != first


def test_a_file_that_is_as_it_was_is_not_read_again(tmp_path, raw, monkeypatch):
    first = prepare_cached(PreparationSettings(str(raw)), tmp_path / "cache")
    monkeypatch.delattr("hashlib.file_digest")
    assert prepare_cached(PreparationSettings(str(raw)), tmp_path / "cache") == first
    (tmp_path / "cache" / ".digests.json").write_text("damaged")
    with pytest.raises(AttributeError):
        prepare_cached(PreparationSettings(str(raw)), tmp_path / "cache")


def test_a_prepared_folder_is_taken_as_it_is(tmp_path, raw):
    prepare(PreparationSettings(str(raw)), tmp_path / "prepared")
    given = PreparationSettings(str(tmp_path / "prepared"))
    assert prepare_cached(given, tmp_path / "cache") == tmp_path / "prepared"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="this is already a prepared folder"):
        prepare(given, tmp_path / "out")


def test_large_files_are_not_prepared_while_other_machines_wait(tmp_path, raw, monkeypatch):
    monkeypatch.setattr(caching, "LARGE_BYTES", 100)
    wanted = PreparationSettings(str(raw), hash_size=77)
    with pytest.raises(DataError, match=r"0\.0 GiB.*--hash_size 77 --output data/prepared.*--prepare_here"):
        prepare_cached(wanted, tmp_path / "cache", may_be_large=False)
    folder = prepare_cached(wanted, tmp_path / "cache")
    assert prepare_cached(wanted, tmp_path / "cache", may_be_large=False) == folder, "it is there already"


@pytest.mark.parametrize(
    "settings",
    [
        {"dataset_name": ("raw.txt", "with a space.txt"), "split_fractions": (0.5, 0.25, 0.25), "split_seed": 3},
        {"train_file": "raw.txt", "test_file": "with a space.txt", "id_encoding": "vocabulary", "min_count": 2},
    ],
)
def test_the_command_prepares_the_same(tmp_path, raw, monkeypatch, capsys, settings):
    shutil.copy(raw, tmp_path / "with a space.txt")
    monkeypatch.chdir(tmp_path)
    wanted = PreparationSettings(**settings)
    monkeypatch.setattr("sys.argv", shlex.split(command_for(wanted))[1:])
    assert prepare_data.main() == 0, capsys.readouterr().err
    made, expected = Schema.load(tmp_path / "data/prepared"), prepare(wanted, tmp_path / "direct")
    assert (made.sparse, made.splits) == (expected.sparse, expected.splits)
