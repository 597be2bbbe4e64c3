"""tools/bench/launch.py by the real launcher: what ranks get, and that a failure ends the benchmark."""

import json
import sys

import pytest

from tools.bench.launch import run_ranks

SCRIPT = """
import json, os, sys
if "--fail" in sys.argv:
    sys.exit("no such thing")
if os.environ["RANK"] == "0":
    names = ("WORLD_SIZE", "OMP_NUM_THREADS")
    json.dump([sys.argv[1:], *(os.environ[name] for name in names)], open(__file__ + ".json", "w"))
"""


@pytest.fixture
def script(tmp_path) -> str:
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


def test_ranks_get_the_arguments(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--rounds", "2"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run_ranks(2)
    assert json.loads((tmp_path / "script.py.json").read_text()) == [["--rounds", "2"], "2", "3"]


def test_a_rank_that_fails_is_the_benchmarks_failure(script, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [script, "--fail"])
    with pytest.raises(SystemExit) as end:
        run_ranks(1)
    assert end.value.code == 1
    assert "no such thing" in capfd.readouterr().err
