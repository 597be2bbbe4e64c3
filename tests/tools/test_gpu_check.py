"""tools/gpu_check.py at tiny sizes on the CPU: every part runs, a failing part is passed over, goals are compared."""

import json

import pytest

from tests.tools.forked_python import call
from tools.gpu_check import GOALS, SECONDS, lines_of

PARTS = [part for part in SECONDS if part not in ("quickstart", "tests")]


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    output = tmp_path_factory.mktemp("gpu_check")
    options = ("--size=tiny", f"--output={output}", "--only", *PARTS)
    return output, call("tools/gpu_check.py", *options, TORCHDYNAMO_DISABLE="1")  # compiling has tests of its own


def test_every_part_has_results(checked):
    output, done = checked
    assert done.status == 0, done.stdout + done.stderr
    results = json.loads((output / "results.json").read_text())
    assert results["failures"] == []
    assert {result["part"] for result in results["results"]} == set(PARTS)
    for result in results["results"]:
        assert f"| {result['part']} | {result['case']} |" in done.stdout
    dense = [result for result in results["results"] if result["part"] == "dense"]
    rates = results["results"][0]
    for result in dense:
        assert result["share of peak"] == pytest.approx(result["TFLOP/s"] / rates["bf16 product TFLOP/s"])
    assert results["goals"][GOALS[0].what] == max(result["share of peak"] for result in dense)


def test_a_failing_part_is_reported_and_passed_over(tmp_path):
    only = ("--only", "tables", "machine")
    done = call("tools/gpu_check.py", "--size=tiny", f"--output={tmp_path}", *only, RANK="0")  # of a job that is not
    assert done.status == 1
    assert "FAILED tables: failed with status 1" in done.stdout
    assert "| machine | rates |" in done.stdout


def test_the_full_size_needs_a_gpu(tmp_path):
    done = call("tools/gpu_check.py", f"--output={tmp_path}", CUDA_VISIBLE_DEVICES="")
    assert done.status == 2
    assert done.stderr.startswith("gpu_check: torch sees no GPU here. --size tiny")


def test_a_line_has_every_figure():
    result = {"part": "dense", "case": "1 layer", "ms": 1.25, "GiB": None, "slowest": {"kernel": 0.5}}
    assert list(lines_of([result])) == [["dense", "1 layer", "ms 1.25; GiB -"]]
