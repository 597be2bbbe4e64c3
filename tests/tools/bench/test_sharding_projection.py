"""tools/bench/sharding_projection.py finds the constants of measurements that its own simulation made up."""

import json
from dataclasses import replace

import pytest

from dhen.planner.machine import read_machine
from tests.tools.forked_python import Finished, call
from tools.bench.launch import write_json
from tools.bench.sharding_projection import LEFT_OUT, step_seconds
from tools.bench.sharding_schemes import Benchmark, Measured

LAYER_BYTES, COMPUTE_MS = 2_000_000, 30.0
LINKS = {"node_bytes_per_second": 50 * 125e3, "local_bytes_per_second": 1200 * 125e3}
MACHINE = read_machine("cpu", **LINKS, link_efficiency=0.8, seconds_per_collective=0.006)


def made_up(link_mbit: float | None) -> Benchmark:
    results = [
        Measured(name, depth, 2, 2 * 2, depth * LAYER_BYTES, LAYER_BYTES, [seconds] * 3, None)
        for depth in (4, 8)
        for name in ("fsdp", "hsdp_sync", "hsdp")
        for seconds in [step_seconds(name, MACHINE, 2, depth, LAYER_BYTES, COMPUTE_MS / 1e3)]
    ]
    return Benchmark(link_mbit, 1200, COMPUTE_MS, results)


def project(path, *more) -> Finished:
    return call("tools/bench/sharding_projection.py", "--measured", path, *more)


def test_rates_and_compute_are_those_of_the_benchmark(tmp_path):
    write_json(tmp_path / "measured.json", made_up(50))
    done = project(tmp_path / "measured.json", "--json", tmp_path / "projection.json")
    assert done.status == 0, done.stderr
    assert "fitted: 80% of the nominal rates, 6 ms per hop" in done.stdout
    assert done.stdout.count("+0%") + done.stdout.count("-0%") == 6, "it is off by nothing"
    assert LEFT_OUT in " ".join(done.stdout.split())
    written = json.loads((tmp_path / "projection.json").read_text())
    assert written["fit"] == vars(MACHINE)
    assert all(each["simulated"] == pytest.approx(each["measured"]) for each in written["check"])
    assert all(each["over_hsdp_sync"] >= 1 for each in written["projection"])
    assert written["projection"][0]["over_fsdp"] > 1


def test_unusable_measurements_are_said_so(tmp_path):
    write_json(tmp_path / "measured.json", made_up(None))
    done = project(tmp_path / "measured.json")
    assert done.status == 2
    assert "Measure with --link_mbit" in done.stderr
    done = project(tmp_path / "none.json")
    assert done.status == 2
    assert "none.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("scheme", ["fsdp", "hsdp"])
def test_a_faster_link_takes_no_longer(scheme):
    faster = replace(MACHINE, node_bytes_per_second=10 * MACHINE.node_bytes_per_second)
    times = [step_seconds(scheme, machine, 2, 8, LAYER_BYTES, 0.0) for machine in (MACHINE, faster)]
    assert times[1] < times[0]
