"""tools/bench/placement.py at a tiny size, with real ranks."""

import json
import sys

from tests.ranks import run_ranks
from tools.bench import placement


def test_placements_are_predicted_and_measured(tmp_path, monkeypatch, capsys):
    """With forked ranks; test_launch.py has the launcher."""
    output = tmp_path / "results.json"
    tiny = ["--ranks=8", "--measured_ranks=2", "--dims=8", "--batch_size=8", "--max_rows=20", "--rounds=2"]
    monkeypatch.setattr(sys, "argv", ["placement.py", *tiny, "--ids_per_bag", "1", "2", f"--output={output}"])
    arguments = placement.parse_arguments()

    def results_of_ranks(ranks: int, kind: type, **environment: str) -> list[placement.Result]:
        return run_ranks(ranks, placement.measure_all, arguments)[0]

    monkeypatch.setattr(placement, "results_of_ranks", results_of_ranks)
    placement.predict_measure_show(arguments)
    results = json.loads(output.read_text())
    ways = ["cost", "cost, none cut", "size", "round-robin"]
    assert [result["way"] for result in results] == 4 * ways
    assert [result["ranks"] for result in results] == 8 * [8] + 8 * [2]
    for result in results:
        assert len(result["wall"]) == len(result["cpu"]) == (2 if result["ranks"] == 2 else 0)
        assert result["lower_bound"] <= result["predicted"] * (1 + 1e-9)
    assert results[4]["predicted"] < min(result["predicted"] for result in results[5:8]), "multi-valued, cut"
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[-1] == "-" for row in rows if "round-robin" in row] == [True, True, False, False], "measured last"
