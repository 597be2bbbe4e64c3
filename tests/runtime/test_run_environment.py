"""environment.json says where a run took place, and nothing about it can fail the run."""

import json
import platform
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist

import dhen
from dhen.runtime import run_environment
from dhen.runtime.environment import FBGEMM_PACKAGES
from dhen.runtime.run_environment import describe_environment
from dhen.runtime.topology import Topology

FACTS = {
    "command", "git", "python", "versions", "cuda", "platform", "host", "cpu", "cpu_count", "gpus", "device",
    "world_size", "ranks_per_node",
}  # fmt: skip


@pytest.fixture(scope="module")
def topology(tmp_path_factory) -> Topology:
    """This process alone."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    world = dist.ProcessGroupGloo(store, 0, 1, timedelta(seconds=30))
    return Topology(0, 1, 0, 1, torch.device("cpu"), world, timedelta(seconds=30))


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A repository with one commit."""
    (tmp_path / "checkout").mkdir()
    git(tmp_path / "checkout", "init")
    (tmp_path / "checkout" / "train.py").write_text("a = 1\n")
    git(tmp_path / "checkout", "add", ".")
    git(tmp_path / "checkout", "commit", "--message", "first")
    return tmp_path / "checkout"


def test_it_says_what_runs_and_on_what(topology, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/train.py", "--layers", '[{"interactions": ["linear"]}]'])
    found = describe_environment(topology)
    assert found.keys() == FACTS
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == """recipes/train.py --layers '[{"interactions": ["linear"]}]'"""
    versions = found["versions"]
    assert versions["dhen"] == dhen.__version__
    assert versions["torch"] == torch.__version__
    assert versions["deepspeed"] == deepspeed.__version__.partition("+")[0]
    assert len(versions.keys() & set(FBGEMM_PACKAGES)) == 1
    assert found["python"] == platform.python_version()
    assert found["gpus"] == [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    assert found["cuda"] == torch.version.cuda
    assert found["host"]
    assert found["cpu"]
    assert (found["device"], found["world_size"], found["ranks_per_node"]) == ("cpu", 1, 1)


def test_the_commit_is_that_of_the_checkout(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert run_environment._git(checkout) == {"commit": commit, "is_dirty": False}
    (checkout / "notes.txt").write_text("not tracked\n")
    assert run_environment._git(checkout) == {"commit": commit, "is_dirty": False}
    (checkout / "train.py").write_text("a = 2\n")
    assert run_environment._git(checkout) == {"commit": commit, "is_dirty": True}


def test_a_folder_in_somebody_elses_repository_has_no_commit(topology, checkout, monkeypatch):
    (checkout / "unpacked").mkdir()
    monkeypatch.setattr(run_environment, "repository", lambda: checkout / "unpacked")
    assert describe_environment(topology)["git"] is None
    monkeypatch.setattr(run_environment, "repository", lambda: checkout)
    assert describe_environment(topology)["git"] is not None, "negative control"


def test_no_fact_can_fail_a_run(monkeypatch):
    """No git, no repository, no topology, and a machine that answers nothing."""

    def fail() -> str:
        raise RuntimeError("no such thing here")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(platform, "platform", fail)
    monkeypatch.setattr(run_environment, "_CPU_INFO", Path("/no/such/file"))
    found = describe_environment(None)
    assert found.keys() == FACTS
    assert found["git"] is found["platform"] is found["world_size"] is None
    assert found["python"] == platform.python_version()
