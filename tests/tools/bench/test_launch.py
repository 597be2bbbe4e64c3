"""tools/bench/launch.py: ranks that fail end the benchmark with a status and without results."""

import sys

import pytest

from tools.bench.launch import results_of_ranks


def test_a_rank_that_fails_is_the_benchmarks_failure(tmp_path, monkeypatch, capfd):
    (tmp_path / "failing.py").write_text("import sys; print(sys.argv[1:]); sys.exit('no such thing')")
    monkeypatch.setattr(sys, "argv", ["failing.py", "--ranks", "1"])
    with pytest.raises(SystemExit) as end:
        results_of_ranks(1, str(tmp_path / "failing.py"))
    assert end.value.code == 1
    said = capfd.readouterr()
    assert "['--ranks', '1', '--output=" in said.out
    assert "no such thing" in said.err
