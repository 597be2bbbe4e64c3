"""tools/bench/tables.py at a tiny size, by its launcher too; the bytes that it counts for each optimizer."""

import json
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec

import pytest

from tests import ROOT
from tests.ranks import run_ranks
from tools.bench import tables
from tools.bench.table_systems import Case

TINY = ("--ranks", "1", "--dims", "8", "--ids_per_bag", "1", "--batch_size", "32", "--max_rows", "50", "--rounds", "3")


def test_every_system_is_timed(tmp_path, monkeypatch, capsys):
    """All but the launcher, which the next test has."""
    output = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["tables.py", *TINY, f"--output={output}"])
    arguments = tables.parse_arguments()
    has_torchrec = find_spec("torchrec") is not None
    assert ("torchrec is not installed, so it is left out" in capsys.readouterr().err) != has_torchrec

    def results_of_ranks(ranks: int, script: str) -> list[dict]:
        return [asdict(result) for result in run_ranks(ranks, tables.measure_all, arguments)[0]]

    monkeypatch.setattr(tables, "results_of_ranks", results_of_ranks)
    assert tables.main() == 0
    results = json.loads(output.read_text())
    names = ["ours", "ours fp16", "ours fp16 rounded", "ours fp16 wire"]
    names += [*(["torchrec"] if has_torchrec else []), "embedding bag"]
    assert [result["system"] for result in results] == names
    for result in results:
        assert len(result["forward"]) == len(result["backward"]) == 3
        assert min(result["forward"] + result["backward"]) > 0
    printed = capsys.readouterr().out
    assert "x Bag" in printed
    assert "stochastic rounding, 1 ranks, dim 8, 1 ids per bag:" in printed


def test_whole_steps_are_timed_with_and_without_rounding(tmp_path):
    command = [sys.executable, "tools/bench/tables.py", *TINY, f"--output={tmp_path / 'out.json'}", "--whole_step"]
    command += ["--systems", "ours fp16", "ours fp16 rounded", "embedding bag"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    systems = [result["system"] for result in json.loads((tmp_path / "out.json").read_text())]
    assert systems == ["ours fp16", "ours fp16 rounded"]
    assert "stochastic rounding, 1 ranks, dim 8, 1 ids per bag:" in done.stdout


def test_bytes_are_those_of_each_systems_dtype_and_optimizer():
    case = Case(ranks=1, dim=16, ids_per_bag=1, batch_size=1, max_rows=10**9)
    # A lookup reads a row and writes an embedding; an update reads a gradient, and reads and writes row and state.
    row, state, pooled = 16 * 4, 4, 16 * 4
    assert tables.table_bytes(case, "ours") == pytest.approx(26 * (row + pooled + pooled + 2 * (row + state)))
    assert tables.table_bytes(case, "embedding bag") == pytest.approx(26 * (row + pooled + pooled + 2 * (row + row)))
    assert tables.table_bytes(case, "ours fp16") == pytest.approx(
        26 * (row / 2 + pooled + pooled + 2 * (row / 2 + state))
    )
