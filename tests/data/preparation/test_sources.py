"""Where raw data may be, and how it may be compressed: the prepared folder is the same to the byte."""

import json
from pathlib import Path

import pytest

from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.runners import LocalProcesses
from dhen.data.preparation.settings import PreparationSettings
from tests.data.preparation.reference_preparation import PACK, criteo_lines

HERE = LocalProcesses(1)
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
