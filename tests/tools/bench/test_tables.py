"""The benchmark of the tables runs on a tiny case, without torchrec too, and counts each optimizer's bytes."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests import ROOT
from tools.bench.table_systems import Case
from tools.bench.tables import table_bytes

TINY = ("--ranks", "1", "--dims", "8", "--ids_per_bag", "1", "--batch_size", "32", "--max_rows", "50", "--rounds", "3")


def run(output, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools/bench/tables.py"), *TINY, f"--output={output}", *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done


def test_every_system_is_timed(tmp_path):
    done = run(tmp_path / "out.json")
    has_torchrec = find_spec("torchrec") is not None
    assert ("torchrec isn't installed, so it is left out" in done.stderr) != has_torchrec
    results = json.loads((tmp_path / "out.json").read_text())
    names = ["ours", "ours fp16", "ours fp16 rounded", "ours fp16 wire"]
    names += [*(["torchrec"] if has_torchrec else []), "embedding bag"]
    assert [result["system"] for result in results] == names
    for result in results:
        assert len(result["forward"]) == len(result["backward"]) == 3
        assert min(result["forward"] + result["backward"]) > 0
    assert "x Bag" in done.stdout
    assert "times (" in done.stdout, "what rounding costs"


def test_whole_steps_are_timed_with_and_without_rounding(tmp_path):
    done = run(tmp_path / "out.json", "--whole_step", "--systems", "ours fp16", "ours fp16 rounded", "embedding bag")
    systems = [result["system"] for result in json.loads((tmp_path / "out.json").read_text())]
    assert systems == ["ours fp16", "ours fp16 rounded"]
    assert "stochastic rounding, 1 ranks, dim 8, 1 ids a bag:" in done.stdout


def test_bytes_are_those_of_each_systems_dtype_and_optimizer():
    case = Case(ranks=1, dim=16, ids_per_bag=1, batch_size=1, max_rows=10**9)
    # A row read for the lookup and the embedding written; the gradient read, row and state read and written.
    row, state, pooled = 16 * 4, 4, 16 * 4
    assert table_bytes(case, "ours") == pytest.approx(26 * (row + pooled + pooled + 2 * (row + state)))
    assert table_bytes(case, "embedding bag") == pytest.approx(26 * (row + pooled + pooled + 2 * (row + row)))
    assert table_bytes(case, "ours fp16") == pytest.approx(26 * (row / 2 + pooled + pooled + 2 * (row / 2 + state)))
