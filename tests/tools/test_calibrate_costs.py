"""tools/calibrate_costs.py at a tiny size: every rate is measured, or the file says that it is not."""

import sys

from dhen.tables.placement.costs import StepSetting, read_costs
from tests.ranks import free_port, rank_environment
from tools import calibrate_costs


def test_a_calibration_measures_every_rate_and_says_what_it_did_not(tmp_path, monkeypatch):
    """As one GPU would be: a job of one rank, which has nobody to exchange with."""
    for name, value in rank_environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(calibrate_costs, "GRID", ((50, 4, 1), (50, 8, 2), (200, 4, 2)))
    monkeypatch.setattr(calibrate_costs, "BATCH", 16)
    monkeypatch.setattr(calibrate_costs, "TABLES", 2)
    output = tmp_path / "costs.json"
    monkeypatch.setattr(sys, "argv", ["calibrate_costs.py", f"--output={output}", "--rounds=1"])
    assert calibrate_costs.main() == 0
    settings = [
        StepSetting(1, 1, 16, optimizer, dtype, table_rounding=rounding)
        for optimizer in ("rowwise_adagrad", "adagrad", "sgd")
        for dtype, rounding in (("fp32", "nearest"), ("fp16", "nearest"), ("fp16", "stochastic"))
    ]
    costs = read_costs(str(output), *settings)
    assert "not measured: intra_node and inter_node_bytes_per_second" in costs.source
    assert costs.intra_node_bytes_per_second == read_costs("cpu").intra_node_bytes_per_second


def test_unmeasured_links_are_no_faster_between_nodes_than_inside():
    default = read_costs("gpu")
    (intra, inter), note = calibrate_costs.with_defaults((1e9, None), default)
    assert (intra, inter) == (1e9, 1e9)
    assert note == "; not measured: inter_node_bytes_per_second"
    (intra, inter), note = calibrate_costs.with_defaults((None, 1e12), default)
    assert (intra, inter) == (1e12, 1e12)
    assert calibrate_costs.with_defaults((2e9, 1e9), default) == ((2e9, 1e9), "")
