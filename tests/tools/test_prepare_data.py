"""tools/prepare_data.py as users call it."""

import functools
import json

import pytest

from dhen.data.schema import Schema
from tests.data.preparation.reference_preparation import criteo_lines
from tests.tools import forked_python

call = functools.partial(forked_python.call, "tools/prepare_data.py")


@pytest.fixture
def raw(tmp_path):
    lines = criteo_lines(40)
    lines[7] = "2" + lines[7][1:]
    (tmp_path / "raw.txt").write_text("\n".join(lines))
    return tmp_path / "raw.txt"


def test_it_prepares_and_reports_as_json(tmp_path, raw):
    arguments = ("--dataset_name", raw, "--format", "criteo", "--output", tmp_path / "out", "--bad_rows", "skip")
    result = call(*arguments, "--split_fractions", 0.5, 0.25, 0.25, "--hash_size", 64, "--json")
    assert result.status == 0, result.stderr
    said = json.loads(result.stdout)
    schema = Schema.load(tmp_path / "out")
    assert said["rows"] == 39
    assert said["num_embeddings"]["C26"] == 64
    assert {split: counts["bad_rows"] for split, counts in said["splits"].items()} == {
        split: counts.bad_rows for split, counts in schema.splits.items()
    }
    again = call(*arguments, "--overwrite")
    assert again.status == 0, again.stderr
    assert "1 bad rows skipped" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "raw.txt: row 8: column 'label': the label is '2'; it must be 0 or 1"),
        (("--hash_size", "1"), "hash_size: 1 is not allowed. Use a whole number from 2 to 2^40, or auto."),
        (("--hash_size", "Auto"), "hash_size: 'Auto' is not allowed. Use a whole number from 2 to 2^40, or auto."),
        (("--format", "csv"), "the format csv needs dataset_schema"),
    ],
)
def test_a_mistake_is_one_line_and_a_failure(tmp_path, raw, arguments, message):
    result = call("--dataset_name", raw, "--output", tmp_path / "out", *arguments)
    assert result.status == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_overwrite_removes_nothing_but_prepared_folders(tmp_path, raw):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    result = call("--dataset_name", raw, "--output", tmp_path / "out", "--overwrite")
    assert result.status == 1
    assert "is not a prepared data folder" in result.stderr
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_sealing_is_a_command_of_its_own(tmp_path, raw):
    refused = call("--seal", tmp_path / "out", "--dataset_name", raw)
    assert refused.status == 2
    assert "--seal reads no raw rows, so --dataset_name has no effect" in refused.stderr
    assert call("--dataset_name", raw).stderr.splitlines()[-1].endswith("give --output FOLDER.")
    nothing = call("--seal", tmp_path)
    assert nothing.status == 1
    assert "schema.json: no such file" in nothing.stderr
