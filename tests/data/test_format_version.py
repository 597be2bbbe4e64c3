"""A prepared folder says its format's version; another one, or none, is refused."""

import json
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("version", [None, 1, FORMAT_VERSION + 1, "2026-01"])
def test_a_schema_of_another_version_is_refused_in_one_line(folder, version):
    """Also where entries of it are unknown here: the version is what the user has to know."""
    edit(folder, format_version=version, dense=[{"name": "age", "transform": "quantile"}])
    with pytest.raises(ValueError, match="format_version") as caught:
        Schema.load(folder)
    assert str(caught.value) == (
        f"{folder / SCHEMA_FILE}: format_version is {version!r}, but this code reads version {FORMAT_VERSION}. Use the "
        "code that wrote the file, or prepare the data and train the model again."
    )


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_schema_is_still_named(folder, text):
    (folder / SCHEMA_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"schema\.json: the file: "):
        Schema.load(folder)
