"""tools/bench/tables.py at a tiny size."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec

import pytest
from pydantic import TypeAdapter

from tests.ranks import free_port, rank_environment
from tests.tools.forked_python import call
from tools.bench import tables
from tools.bench.table_systems import Case, placement

TINY = ("--ranks", "1", "--dims", "8", "--batch_size", "32", "--max_rows", "50", "--rounds", "3")


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
    has_torchrec = find_spec("torchrec") is not None
    names = ["ours", *(["torchrec"] if has_torchrec else []), "embedding bag"]
    results, printed = results_of("--ids_per_bag", "1")
    assert [result["system"] for result in results] == names
    for result in results:
        assert len(result["forward"]) == len(result["backward"]) == len(result["cpu"]) == 3
        assert min(result["forward"] + result["backward"]) > 0
    assert ("torchrec is not installed, so it is left out" in printed) != has_torchrec
    assert "x embedding bag" in printed


def test_dtypes_and_placements_are_compared_with_the_first(results_of):
    names = ["ours cut", "ours by size", "ours round-robin", "ours fp16", "ours fp16 rounded", "ours fp16 wire"]
    results, printed = results_of("--ids_per_bag", "1,3", "--systems", *names)
    assert [result["system"] for result in results] == names
    rows = [line.split() for line in printed.splitlines() if line.split()[:3] == ["1", "8", "1,3"]]
    assert [" ".join(row[3:-8]) for row in rows] == names
    assert rows[0][-5:] == ["1.00", "1.00-1.00", "1.00", "1.00", "1.00"]
    assert all(float(row[-6]) > 0 for row in rows), "predicted"


def test_tables_go_where_the_system_says():
    case = Case(ranks=4, dim=16, ids_per_bag=(1, 3, 10, 20), batch_size=64, max_rows=200_000)
    plans = {
        placed: placement(case, 4, "cpu", placed=placed) for placed in ("cut", "by cost", "by size", "round-robin")
    }
    assert [shard.rank for shard in sorted(plans["round-robin"].shards, key=lambda shard: shard.table)][:5] == [
        0,
        1,
        2,
        3,
        0,
    ]
    assert len(plans["by cost"].shards) == len(case.tables)
    assert plans["cut"].makespan <= plans["by cost"].makespan <= plans["by size"].makespan
    assert plans["by cost"].makespan < plans["round-robin"].makespan
