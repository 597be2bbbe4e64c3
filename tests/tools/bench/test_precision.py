"""The comparison of precisions runs with its defaults on a small log, measures each dtype, and keeps what it has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.recipes.launch import TINY, prepared_click_log
from tests.tools.test_cluster import needs_namespaces

VARIANTS = ("fp32", "paper")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    folder: Path = tmp_path_factory.mktemp("precision")
    os.environ.setdefault("PYTEST_TMP", str(folder))
    click_log = prepared_click_log(folder / "click_log", rows=160)
    command = [sys.executable, str(ROOT / "tools/bench/precision.py"), f"--output={folder / 'out'}", "--seeds", "0"]
    command += ["--config", "recipes/configs/criteo.yaml", "--variants", *VARIANTS]
    flags = [f"--dataset_name={click_log}", *TINY, "--embedding_dim=16", "--per_device_train_batch_size=16"]
    done = subprocess.run([*command, *flags, "--max_steps=4"], cwd=ROOT, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr
    assert all(variant in done.stdout for variant in VARIANTS)
    return {result["variant"]: result for result in json.loads((folder / "out/results.json").read_text())}


@needs_namespaces
def test_every_variant_has_its_metrics_and_its_bytes(results):
    assert list(results) == list(VARIANTS)
    for result in results.values():
        assert 0 < result["ne"] < 10
        assert result["bytes_a_step"] > 0
    assert results["paper"]["bytes_a_step"] < results["fp32"]["bytes_a_step"]
    # Row-wise Adagrad keeps 4 bytes a row beside 16 columns, and as many again for each further slice of a table. The
    # placements differ, as do the costs of the two types.
    halved = results["fp32"]["table_bytes"] * (16 * 2 + 4) / (16 * 4 + 4)
    assert results["paper"]["table_bytes"] == pytest.approx(halved, rel=0.02)


@needs_namespaces
def test_the_engines_tensors_are_measured_by_role_and_dtype(results):
    fp32, paper = results["fp32"]["dense_bytes"], results["paper"]["dense_bytes"]
    assert {key.split()[1] for key in fp32 if key.split()[0] != "buffers"} == {"float32"}
    for role in ("weights", "masters", "gradients"):  # a norm of the gradients is kept in float64
        assert {key for key, size in paper.items() if key.startswith(role) and size > 8} == {f"{role} bfloat16"}
    # ZeRO 2 over 4 ranks: whole weights; masters, gradients and twice as much for Adam's moments in shards.
    padding = 4 * 64
    assert fp32["weights float32"] == pytest.approx(4 * fp32["masters float32"], abs=padding)
    assert fp32["moments float32"] == pytest.approx(2 * fp32["masters float32"], abs=padding)
    assert fp32["gradients float32"] >= fp32["masters float32"]
    assert paper["moments bfloat16"] == pytest.approx(2 * paper["masters bfloat16"], abs=padding)
