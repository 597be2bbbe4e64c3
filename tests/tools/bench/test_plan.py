"""tools/bench/plan.py: real ranks and a real cap at a tiny size, how it compares orders, its search for depths."""

import subprocess
import sys

import pytest
import torch

from dhen.runtime.topology import Topology
from tests import ROOT
from tests.ranks import run_ranks
from tests.tools.test_cluster import needs_namespaces
from tools.bench import plan as bench_plan
from tools.bench import plan_ranks
from tools.bench.plan_ranks import TECHNIQUES, Point, machine_of, techniques


def test_order_is_compared_by_pairs():
    assert bench_plan.kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert bench_plan.kendall_tau([1, 2, 3, 4], [40, 30, 20, 10]) == -1
    assert bench_plan.kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert bench_plan.kendall_tau([1, 2, 3], [1, 1, 3]) == pytest.approx(2 / 3), "a tie is no agreement"


def test_the_table_says_how_far_off(capsys):
    points = [Point(4, "dp", 100 << 20, 1.0, 97 << 20, 1.1), Point(4, "zero1", 50 << 20, 2.0, 51 << 20, 2.1)]
    bench_plan.show(points)
    text = capsys.readouterr().out
    assert "-3.0%" in text
    assert "2 points: median error 2.5%, worst 3.0%" in text
    assert "Kendall's tau 1.00" in text
    assert "2.00x" in text


@pytest.mark.parametrize("deepest", [0, 1, 7, 20])
def test_the_deepest_is_found(deepest):
    asked = []
    assert bench_plan.deepest(lambda depth: asked.append(depth) or depth <= deepest, 20) == deepest
    assert len(asked) == len(set(asked)) <= 5, "each depth is a job"


def measured(topology: Topology) -> list[Point]:
    arguments = bench_plan.parse_arguments(["--rounds", "1", "--gflops", "1000", "--techniques", "dp", "hsdp"])
    torch.manual_seed(0)
    machine = plan_ranks.with_measured_links(machine_of(arguments), topology)
    ring = {"nodes": 2, "ranks": 4}
    nothing, message = (machine.all_reduced(size, **ring) + machine.gathered(size, **ring) for size in (0, 2**18))
    assert 0 < nothing < message < 1
    return plan_ranks.measure(topology, 2, arguments, machine)


def test_points_are_measured_beside_predictions():
    points = run_ranks(4, measured, local_size=2)[0]
    assert [point.technique for point in points] == ["dp", "hsdp"]
    for point in points:
        assert abs(point.error) < 0.05
        assert point.seconds > 0


@needs_namespaces
def test_under_a_cap_the_deepest_model_is_found(tmp_path):
    """A cap that holds a few layers: the predicted depth is that of the deepest that trains, or one off."""
    command = [sys.executable, "tools/bench/plan.py", "--cap_mib", "150", "--deepest", "5", "--techniques", "dp"]
    command += ["--nodes", "1"]
    command += ["--embedding_dim", "32", "--num_embeddings_out", "12", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    row = next(line.split() for line in done.stdout.splitlines() if line.startswith("dp"))
    predicted, trained = int(row[1]), int(row[2])
    assert 2 <= predicted < 5
    assert trained >= 1
    assert abs(predicted - trained) <= 1


def test_every_technique_is_another():
    assert len(set(techniques(4, TECHNIQUES))) == len(TECHNIQUES) >= 10
