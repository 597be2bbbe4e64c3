"""tools/paper.py with an experiment on nodes: runs are measured on a cluster, and compared by seed."""

import functools
import json
import os
from dataclasses import replace

import pytest
import yaml

from dhen.data.schema import Schema
from tests import ROOT
from tests.recipes.launch import TINY, prepared_click_log
from tests.tools import forked_python
from tests.tools.test_cluster import needs_namespaces
from tools.experiments import Outcome, Result, read_experiment, read_results
from tools.paper_tables import on_nodes

call = functools.partial(forked_python.call, "tools/paper.py")
COMMON = ROOT / "recipes/experiments/common_optimizations_planted.yaml"


@needs_namespaces
def test_the_papers_optimizations_have_their_metrics_and_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_TMP", os.environ.get("PYTEST_TMP", str(tmp_path)))
    click_log = prepared_click_log(tmp_path / "click_log", rows=160)
    tiny = dict(flag.removeprefix("--").split("=") for flag in TINY)
    arguments = {name: yaml.safe_load(value) for name, value in tiny.items()}
    of_run = {"dataset_name": str(click_log), "per_device_train_batch_size": 64, "max_steps": 4}
    arguments |= of_run | {"embedding_dim": 16}
    values = yaml.safe_load(COMMON.read_text()) | {"arguments": arguments, "config": "recipes/configs/criteo.yaml"}
    (tmp_path / "common.yaml").write_text(yaml.safe_dump(values))
    flags = ["run", tmp_path / "common.yaml", "--seeds=1", "--entries=dp,fp16_tables,paper_dp"]
    flags += [f"--results={tmp_path}", f"--runs={tmp_path / 'runs'}"]
    done = call(*flags)
    assert done.status == 0, done.stdout + done.stderr
    dp, fp16_tables, paper = read_results(tmp_path / "common.jsonl")
    assert (dp.entry, fp16_tables.entry, paper.entry) == ("dp", "fp16_tables", "paper_dp")
    assert dp.ranks == 4
    assert paper.measured["seconds_per_step"] > 0
    assert 0 < paper.metric("ne") < 10
    assert 0 < paper.measured["bytes_per_step"] < 0.75 * dp.measured["bytes_per_step"], "half precision on every wire"
    # Row-wise Adagrad keeps 4 bytes per row beside 16 columns of fp16, and so do the counts of uses.
    rows = sum(column.num_embeddings for column in Schema.load(click_log).sparse)
    for each, weight_bytes in ((dp, 4), (fp16_tables, 2), (paper, 2)):
        assert each.measured["table_bytes"] == pytest.approx(rows * (16 * weight_bytes + 4 + 4), rel=0.02)
    again = call(*flags)
    assert "skipped: paper_dp, seed 0, has its line" in again.stdout


def test_the_report_compares_each_entry_with_the_first_by_seed():
    experiment = read_experiment(COMMON)
    measured = {"bytes_per_step": 1000.0, "table_bytes": 400.0}
    first = Result(entry="dp", seed=0, digest="", arguments={}, ranks=4, test={"ne": 0.5})
    dp = {seed: replace(first, seed=seed, measured=measured | {"seconds_per_step": 0.4 + seed}) for seed in (0, 1)}
    half = {
        seed: replace(
            run, entry="paper_dp", test={"ne": 0.51}, measured={key: of / 2 for key, of in run.measured.items()}
        )
        for seed, run in dp.items()
    }
    half[7] = replace(half[0], seed=7)  # without a partner
    by_entry = {entry.name: {} for entry in experiment.entries} | {"dp": dp, "paper_dp": half}
    lines = list(on_nodes(experiment, Outcome(by_entry, [], [])))
    assert "| data parallelism | 2 of 3 | 1.00 | 1.00 | 1.00 |  |" in lines
    assert "| all of them (`paper_dp.json`) | 2 of 3 | 2.00 | 0.50 | 0.50 | +2.000 ± 0.000 |" in lines
    assert "| BF16 autocast | not run |  |  |  |  |" in lines


def test_changes_of_the_ds_config_decide_the_result():
    experiment = read_experiment(COMMON)
    dp, fp16_tables, *_ = experiment.entries
    assert experiment.ds_config_of(fp16_tables)["dhen"] == {"table_optimizer": "auto", "table_dtype": "fp16"}
    zero0 = json.loads((ROOT / "ds_configs/zero0.json").read_text())
    assert experiment.ds_config_of(dp) == zero0
    assert experiment.digest(dp) != experiment.digest(fp16_tables)
    assert experiment.digest(dp) != replace(experiment, nodes=3).digest(dp)


def test_without_network_namespaces_nothing_is_run(tmp_path):
    done = call("common_optimizations", f"--results={tmp_path}", f"--runs={tmp_path / 'runs'}", PATH="")
    assert done.status == 1
    assert done.stderr == "paper: ip and tc not found. Install iproute2.\n"
    assert not list(tmp_path.iterdir())


def test_ranks_per_run_are_those_of_the_nodes():
    done = call("common_optimizations", "--data=planted", "--nproc=2", "--budget=tiny")
    assert done.status == 1
    assert "runs on 2 nodes of two ranks. Leave out --nproc." in done.stderr
