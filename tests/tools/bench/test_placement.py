"""tools/bench/placement.py and tools/calibrate_costs.py at tiny sizes: real jobs of ranks, whole files written."""

import importlib.util
import json
import subprocess
import sys

import pytest

from dhen.tables.placement.costs import StepSetting, read_costs
from tests import ROOT


@pytest.fixture
def calibrate_costs():
    spec = importlib.util.spec_from_file_location("calibrate_costs", ROOT / "tools" / "calibrate_costs.py")
    module = sys.modules["calibrate_costs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["calibrate_costs"]


def test_placements_are_predicted_and_measured_in_one_job(tmp_path):
    output = tmp_path / "results.json"
    tiny = ["--ranks=8", "--measured_ranks=2", "--dims=8", "--batch_size=8", "--max_rows=20", "--rounds=2"]
    tiny += ["--ids_per_bag", "1", "2"]
    command = [sys.executable, ROOT / "tools/bench/placement.py", *tiny, f"--output={output}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    ways = ["cost", "cost, none cut", "size", "round-robin"]
    assert [result["way"] for result in results] == 4 * ways
    assert [result["ranks"] for result in results] == 8 * [8] + 8 * [2]
    for result in results:
        assert len(result["wall"]) == len(result["cpu"]) == (2 if result["ranks"] == 2 else 0)
        assert result["lower_bound"] <= result["predicted"] * (1 + 1e-9)
    assert results[4]["predicted"] < min(result["predicted"] for result in results[5:8]), "multi-valued, cut"
    assert "round-robin" in done.stdout


def test_a_calibration_measures_every_rate_and_says_what_it_did_not(tmp_path, calibrate_costs, monkeypatch):
    """As one GPU would be: a job of one rank, which has nobody to exchange with."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    calibrate_costs.GRID = ((50, 4, 1), (50, 8, 2), (200, 4, 2))
    calibrate_costs.BATCH, calibrate_costs.TABLES = 16, 2
    output = tmp_path / "costs.json"
    monkeypatch.setattr(sys, "argv", ["calibrate_costs.py", f"--output={output}", "--rounds=1"])
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert calibrate_costs.main() == 0
    settings = [
        StepSetting(1, 1, 16, optimizer, dtype, table_rounding=rounding)
        for optimizer in ("rowwise_adagrad", "adagrad", "sgd")
        for dtype, rounding in (("fp32", "nearest"), ("fp16", "nearest"), ("fp16", "stochastic"))
    ]
    costs = read_costs(str(output), *settings)
    assert "not measured: intra_node and inter_node_bytes_per_second" in costs.source
    assert costs.intra_node_bytes_per_second == read_costs("cpu").intra_node_bytes_per_second


def test_unmeasured_links_are_no_faster_between_nodes_than_inside(calibrate_costs):
    default = read_costs("gpu")
    (intra, inter), note = calibrate_costs.with_defaults((1e9, None), default)
    assert (intra, inter) == (1e9, 1e9)
    assert note == "; not measured: inter_node_bytes_per_second"
    (intra, inter), note = calibrate_costs.with_defaults((None, 1e12), default)
    assert (intra, inter) == (1e12, 1e12)
    assert calibrate_costs.with_defaults((2e9, 1e9), default) == ((2e9, 1e9), "")


def test_as_many_ranks_as_devices_calibrate_and_the_cpu_only_where_there_is_none(calibrate_costs, monkeypatch):
    started = []
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(
        calibrate_costs.subprocess,
        "run",
        lambda command, env: (
            started.append((command[5], env.get("DS_ACCELERATOR"))) or subprocess.CompletedProcess([], 0)
        ),
    )
    for gpus in (0, 1, 8):
        assert calibrate_costs.start_ranks(gpus) == 0
    assert started == [("2", "cpu"), ("1", None), ("8", None)]
