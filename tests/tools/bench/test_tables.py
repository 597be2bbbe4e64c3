"""tools/bench/tables.py at a tiny size, and the bytes that it counts for each optimizer."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec

import pytest
from pydantic import TypeAdapter

from tests.ranks import free_port, rank_environment
from tests.tools.forked_python import call
from tools.bench import tables
from tools.bench.table_systems import Case

TINY = ("--ranks", "1", "--dims", "8", "--ids_per_bag", "1", "--batch_size", "32", "--max_rows", "50", "--rounds", "3")


@pytest.fixture
def results_of(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[list[dict], str]]:
    """What the benchmark writes and prints. Its rank forks; test_launch.py has the launcher."""

    def rank(ranks: int, kind: type) -> list[tables.Measured]:
        arguments = [*sys.argv[1:], f"--output={tmp_path / 'rank.json'}"]
        done = call("tools/bench/tables.py", *arguments, **rank_environment(0, ranks, free_port()))
        assert done.status == 0, done.stderr
        return TypeAdapter(kind).validate_json((tmp_path / "rank.json").read_text())

    def run(*more: str) -> tuple[list[dict], str]:
        output = tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", ["tables.py", *TINY, *more, f"--output={output}"])
        tables.start_and_show(tables.parse_arguments())
        said = capsys.readouterr()
        return json.loads(output.read_text()), said.out + said.err

    monkeypatch.setattr(tables, "results_of_ranks", rank)
    return run


def test_every_system_is_timed(results_of):
    results, printed = results_of()
    has_torchrec = find_spec("torchrec") is not None
    names = ["ours", "ours fp16", "ours fp16 rounded", "ours fp16 wire"]
    names += [*(["torchrec"] if has_torchrec else []), "embedding bag"]
    assert [result["system"] for result in results] == names
    for result in results:
        assert len(result["forward"]) == len(result["backward"]) == 3
        assert min(result["forward"] + result["backward"]) > 0
    assert ("torchrec is not installed, so it is left out" in printed) != has_torchrec
    assert "x Bag" in printed
    assert "stochastic rounding, 1 ranks, dim 8, 1 ids per bag:" in printed


def test_whole_steps_are_timed_with_and_without_rounding(results_of):
    results, printed = results_of("--whole_step", "--systems", "ours fp16", "ours fp16 rounded", "embedding bag")
    assert [result["system"] for result in results] == ["ours fp16", "ours fp16 rounded"]
    assert "stochastic rounding, 1 ranks, dim 8, 1 ids per bag:" in printed


def test_bytes_are_those_of_each_systems_dtype_and_optimizer():
    case = Case(ranks=1, dim=16, ids_per_bag=1, batch_size=1, max_rows=10**9)
    # A lookup reads a row and writes an embedding; an update reads a gradient, and reads and writes row and state.
    row, state, pooled = 16 * 4, 4, 16 * 4
    assert tables.table_bytes(case, "ours") == pytest.approx(26 * (row + pooled + pooled + 2 * (row + state)))
    assert tables.table_bytes(case, "embedding bag") == pytest.approx(26 * (row + pooled + pooled + 2 * (row + row)))
    assert tables.table_bytes(case, "ours fp16") == pytest.approx(
        26 * (row / 2 + pooled + pooled + 2 * (row / 2 + state))
    )
