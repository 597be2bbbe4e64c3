"""tools/bench/precision.py on a small log: a variant is trained on a cluster; results are compared by seed."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from dhen.data.schema import Schema
from tests import ROOT
from tests.recipes.launch import TINY, prepared_click_log
from tests.tools.test_cluster import needs_namespaces
from tools.bench.precision import show
from tools.bench.precision_results import FILE, Result, add, common_section, read


@needs_namespaces
def test_the_papers_variant_has_its_metrics_and_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_TMP", os.environ.get("PYTEST_TMP", str(tmp_path)))
    click_log = prepared_click_log(tmp_path / "click_log", rows=160)
    command = [sys.executable, "tools/bench/precision.py", f"--output={tmp_path / 'out'}", "--seeds", "0"]
    command += ["--config", "recipes/configs/criteo.yaml", f"--dataset_name={click_log}", "--variants", "fp32", "paper"]
    flags = [*TINY, "--embedding_dim=16", "--per_device_train_batch_size=16", "--max_steps=4"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("paper ") for line in done.stdout.splitlines())
    again = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=590)
    assert "skipped: paper, seed 0, has its line" in again.stdout
    fp32, paper = map(json.loads, (tmp_path / "out/results.jsonl").read_text().splitlines())
    assert paper["variant"] == "paper"
    assert paper["seconds_per_step"] > 0
    assert 0 < paper["ne"] < 10
    assert 0 < paper["bytes_per_step"] < 0.75 * fp32["bytes_per_step"], "half precision on every wire"
    # Row-wise Adagrad keeps 4 bytes per row beside 16 columns of fp16, and so do the counts of uses.
    rows = sum(column.num_embeddings for column in Schema.load(click_log).sparse)
    assert paper["table_bytes"] == pytest.approx(rows * (16 * 2 + 4 + 4), rel=0.02)


def test_ne_is_compared_with_the_first_variants(capsys):
    fp32, paper = (Result(variant, 0, 1024.0, 2**20, ne, 0.8) for variant, ne in (("fp32", 0.5), ("paper", 0.51)))
    show([fp32, paper])
    assert [line.split()[-2] for line in capsys.readouterr().out.splitlines()[1:3]] == ["+0.00%", "+2.00%"]


def test_the_report_compares_each_optimization_with_data_parallelism_by_seed(tmp_path):
    dp = [Result("dp", seed, 1000.0, 400, 0.5, 0.8, seconds_per_step=0.4 + seed) for seed in (0, 1)]
    half = [replace(each, variant="paper_dp", bytes_per_step=500.0, table_bytes=200, ne=0.51) for each in dp]
    half = [replace(each, seconds_per_step=each.seconds_per_step / 2) for each in half]
    for each in (*dp, *half, replace(half[0], seed=7)):  # seed 7 has no partner
        add(tmp_path / FILE, each)
    text = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(text.replace("{", '{"dense_bytes": {}, ', 1))  # a key of an older version
    lines = common_section(read(tmp_path / FILE)).splitlines()
    assert "| dp | 2 | 1.00 | 1.00 | 1.00 |  |" in lines
    assert "| paper_dp | 2 | 2.00 | 0.50 | 0.50 | +2.000 ± 0.000 |" in lines
    assert "| dp, bf16 autocast | not run |  |  |  |  |" in lines
    assert common_section([]).endswith("Not run.")
