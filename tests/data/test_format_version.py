"""A prepared folder says its format's version; another one is refused, none means the first."""

import json
from pathlib import Path

import pytest

from dhen.data.format_version import FormatVersionError, check_format_version
from dhen.data.schema import FORMAT_VERSION, SCHEMA_FILE, DenseColumn, Schema, SplitCounts

SCHEMA = Schema((DenseColumn("age"),), (), {"train": SplitCounts(rows=4, clicks=1)})


@pytest.fixture
def folder(tmp_path) -> Path:
    SCHEMA.save(tmp_path)
    return tmp_path


def edit(folder: Path, **changes) -> None:
    """Set entries of schema.json; None removes one."""
    path = folder / SCHEMA_FILE
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_a_schema_says_its_version_and_is_read_again(folder):
    assert json.loads((folder / SCHEMA_FILE).read_text())["format_version"] == FORMAT_VERSION
    assert Schema.load(folder) == SCHEMA


def test_a_schema_without_a_version_is_read(folder):
    edit(folder, format_version=None)
    assert Schema.load(folder) == SCHEMA


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99, "2026-01", 0])
def test_a_schema_of_another_version_is_refused_in_one_line(folder, version):
    """Also where entries of it are unknown here: the version is what the user has to know."""
    edit(folder, format_version=version, dense=[{"name": "age", "transform": "quantile"}])
    with pytest.raises(FormatVersionError) as caught:
        Schema.load(folder)
    advice = "Use the earlier release that wrote it" if version == 0 else "Update this code"
    assert str(caught.value) == (
        f"{folder / SCHEMA_FILE}: format_version is {version!r}, but this code reads version {FORMAT_VERSION}. "
        f"{advice}, or create this folder again with this code."
    )


def test_a_file_without_a_version_is_too_old_once_the_format_has_changed():
    with pytest.raises(FormatVersionError, match=r"is 1, but this code reads version 2\. Use the earlier"):
        check_format_version(Path("schema.json"), {}, 2, "prepare the data again")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_schema_is_still_named(folder, text):
    (folder / SCHEMA_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"schema\.json: the file: "):
        Schema.load(folder)
