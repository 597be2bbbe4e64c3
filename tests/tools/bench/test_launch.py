"""tools/bench/launch.py by the real launcher: what ranks get and send back, and that a failure ends the benchmark."""

import sys

import pytest

from tools.bench.launch import results_of_ranks

SCRIPT = """
import json, os, sys
if "--fail" in sys.argv:
    sys.exit("no such thing")
if os.environ["RANK"] == "0":
    output = sys.argv[-1].removeprefix("--output=")
    names = ("WORLD_SIZE", "OMP_NUM_THREADS")
    json.dump([sys.argv[1:-1], *(os.environ[name] for name in names)], open(output, "w"))
"""


@pytest.fixture
def script(tmp_path) -> str:
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


def test_ranks_get_the_arguments_and_send_results_back(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--ranks", "2"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert results_of_ranks(2, list) == [["--ranks", "2"], "2", "3"]


def test_a_rank_that_fails_is_the_benchmarks_failure(script, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [script, "--fail"])
    with pytest.raises(SystemExit) as end:
        results_of_ranks(1, list)
    assert end.value.code == 1
    assert "no such thing" in capfd.readouterr().err
