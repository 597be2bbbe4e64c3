"""tools/bench/plan.py: real ranks at a tiny size, how it compares orders."""

import pytest
import torch

from dhen.runtime.topology import Topology
from tests.ranks import run_ranks
from tools.bench import plan as bench_plan
from tools.bench.plan import TECHNIQUES, Point, machine_of, techniques


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


def measured(topology: Topology) -> list[Point]:
    arguments = bench_plan.parse_arguments(["--rounds", "1", "--gflops", "1000", "--techniques", "dp", "hsdp"])
    torch.manual_seed(0)
    machine = bench_plan.with_measured_links(machine_of(arguments), topology)
    ring = {"nodes": 2, "ranks": 4}
    nothing, message = (machine.all_reduced(size, **ring) + machine.gathered(size, **ring) for size in (0, 2**18))
    assert 0 < nothing < message < 1
    return bench_plan.measure_techniques(topology, 2, arguments, machine)


def test_points_are_measured_beside_predictions():
    points = run_ranks(4, measured, local_size=2)[0]
    assert [point.technique for point in points] == ["dp", "hsdp"]
    for point in points:
        assert abs(point.error) < 0.05
        assert point.seconds > 0


def test_every_technique_is_another():
    assert len(set(techniques(4, TECHNIQUES))) == len(TECHNIQUES) >= 10
