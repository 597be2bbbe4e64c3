"""The projection finds the constants of a benchmark that its own simulation made up, and says what it leaves out."""

import subprocess
import sys

import pytest

from tests import ROOT
from tools.bench.sharding_projection import LEFT_OUT, Machine, step_seconds
from tools.bench.sharding_schemes import Benchmark, Measured

LAYER_BYTES, COMPUTE_MS = 2_000_000, 30.0
MACHINE = Machine(2, 2, 50 * 125e3, 1200 * 125e3, True, efficiency=0.8, latency=0.006)


def made_up(link_mbit: float | None) -> Benchmark:
    results = [
        Measured(name, depth, 2, 2 * 2, depth * LAYER_BYTES, LAYER_BYTES, [seconds] * 3, None)
        for depth in (4, 8)
        for name in ("fsdp", "hsdp_sync", "hsdp")
        for seconds in [step_seconds(name, MACHINE, depth, LAYER_BYTES, COMPUTE_MS / 1e3)]
    ]
    return Benchmark(link_mbit, 1200, COMPUTE_MS, results)


def project(path) -> subprocess.CompletedProcess:
    tool = str(ROOT / "tools/bench/sharding_projection.py")
    return subprocess.run([sys.executable, tool, "--measured", str(path)], capture_output=True, text=True)


def test_rates_and_compute_are_those_of_the_benchmark(tmp_path):
    made_up(50).write(tmp_path / "measured.json")
    done = project(tmp_path / "measured.json")
    assert done.returncode == 0, done.stderr
    assert "fitted: 80% of the nominal rates, 6 ms a collective" in done.stdout
    assert done.stdout.count("+0%") + done.stdout.count("-0%") == 6, "it is off by nothing"
    assert LEFT_OUT in " ".join(done.stdout.split())


def test_links_of_unknown_rate_are_asked_for(tmp_path):
    made_up(None).write(tmp_path / "measured.json")
    done = project(tmp_path / "measured.json")
    assert done.returncode == 2
    assert "Say --link_mbit" in done.stderr


@pytest.mark.parametrize("scheme", ["fsdp", "hsdp"])
def test_a_faster_link_takes_no_longer(scheme):
    faster = Machine(**vars(MACHINE) | {"link": 10 * MACHINE.link})
    times = [step_seconds(scheme, machine, 8, LAYER_BYTES, 0.0) for machine in (MACHINE, faster)]
    assert times[1] < times[0]
