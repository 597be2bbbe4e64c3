"""The cluster on one machine: real launchers on two nodes train as one node does, and nothing is left afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from tests import ROOT
from tests.recipes.launch import TINY, losses, prepared_click_log, run_script
from tools import cluster
from tools.bench.sharding_ranks import SCHEMES, Measured

TOOL = str(ROOT / "tools" / "cluster.py")
NODES = ["--nodes", "2", "--ranks_per_node", "2", "--link_mbit", "0", "--local_mbit", "0"]
FLAGS = [*TINY, "--per_device_train_batch_size=6", "--max_steps=20", "--save_steps=10", "--seed=3"]


def why_not() -> str | None:
    """Why this machine cannot make network namespaces; None if it can."""
    try:
        with cluster.Cluster(1):
            return None
    except cluster.ClusterError as error:
        return str(error)


REASON = why_not()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=f"no cluster on this machine: {REASON}")


@pytest.fixture(scope="module")
def click_log(tmp_path_factory) -> Path:
    os.environ.setdefault("PYTEST_TMP", str(tmp_path_factory.mktemp("output")))
    return prepared_click_log(tmp_path_factory.mktemp("click_log"))


@pytest.fixture(scope="module")
def on_one_node(click_log, tmp_path_factory) -> Path:
    """The same training by four ranks of one node, with shards over two of them."""
    folder = tmp_path_factory.mktemp("one_node")
    raw = json.loads((ROOT / "ds_configs/hsdp.json").read_text())
    raw["dhen"]["shard_group"] = 2
    (folder / "hsdp.json").write_text(json.dumps(raw))
    flags = [f"--ds_config={folder / 'hsdp.json'}", f"--dataset_name={click_log}", f"--output_dir={folder / 'run'}"]
    done = run_script("train.py", *flags, *FLAGS, ranks=4)
    assert done.status == 0, done.output
    return folder / "run"


def train(run: Path, click_log: Path, *more: str, script: str = "recipes/train.py") -> list[str]:
    """The command that trains on the cluster, with shards within its nodes."""
    flags = ["--ds_config=ds_configs/hsdp.json", f"--dataset_name={click_log}"]
    return [sys.executable, TOOL, *NODES, script, *flags, f"--output_dir={run}", *FLAGS, *more]


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines()]


def left_behind() -> list[str]:
    """Nodes of clusters whose process is gone; those of other runs on this machine may stand."""
    owners = {name: name.removeprefix(cluster.PREFIX).split("-")[0] for name in namespaces() if "-" in name}
    return [name for name, owner in owners.items() if owner.isdigit() and not Path(f"/proc/{owner}").exists()]


DYING = f"""
import itertools, os, runpy, signal
from dhen.training.parallel_model import ParallelDhen

step, calls = ParallelDhen.step, itertools.count(1)


def die(gradient):
    print("killed in its backward", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def dying_step(self, loss):
    if self.topology.rank == 3 and next(calls) == 14:  # the first layer's gradients: others are on their way
        next(self.engine.module.model.layers[0].parameters()).register_hook(die)
    return step(self, loss)


ParallelDhen.step = dying_step
runpy.run_path({str(ROOT / "recipes/train.py")!r}, run_name="__main__")
"""
"""train.py whose last rank is killed in the middle of the backward of step 14."""


@dataclass(frozen=True)
class Killed:
    """A run on the cluster that lost a rank: its folder, the tool's status and output, how long it lived on."""

    run: Path
    status: int
    output: str
    seconds: float
    losses: dict[int, float]
    left_behind: list[str]


@pytest.fixture(scope="module")
def killed(click_log, tmp_path_factory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    (folder / "dying_train.py").write_text(DYING)
    job = subprocess.Popen(
        train(folder / "run", click_log, script=str(folder / "dying_train.py")),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    output, killed_at = "", None
    for line in job.stdout:
        output += line
        if "killed in its backward" in line:
            killed_at = time.monotonic()
    status = job.wait(timeout=60)
    assert killed_at is not None, output
    seconds, run = time.monotonic() - killed_at, folder / "run"
    return Killed(run, status, output, seconds, losses_of(run), left_behind())


def losses_of(run: Path) -> dict[int, float]:
    return {step: float(loss) for step, loss in losses(run).items()}


@needs_namespaces
def test_a_rank_killed_on_one_node_ends_the_job_on_all(killed):
    assert killed.status != 0
    assert killed.seconds < 60
    assert "rank 3 of 4 is gone, so the job ends" in killed.output, killed.output
    assert not killed.left_behind


@needs_namespaces
def test_nodes_train_as_one_machine_does(killed, on_one_node):
    assert "4 ranks on cpu, ZeRO stage 3 in shard groups of 2" in killed.output
    assert set(killed.losses) >= set(range(1, 11))
    whole = losses_of(on_one_node)
    assert killed.losses == pytest.approx({step: whole[step] for step in killed.losses}, rel=1e-6)


@needs_namespaces
def test_the_slurm_script_starts_every_node_and_resumes(tmp_path, click_log, killed, on_one_node):
    """With an srun that starts the tasks in the cluster's nodes, and the addresses for host names."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    write_stub(stubs / "scontrol", 'printf "10.77.0.1\\n10.77.0.2\\n"')
    write_stub(
        stubs / "srun",
        'shift\nfor node in 0 1; do SLURM_NODEID=$node ip netns exec "$CLUSTER-node$node" "$@" & done\n'
        "wait -n && wait -n",
    )
    program = (
        "import os, subprocess, sys; from tools.cluster import Cluster\n"
        "with Cluster(2, link_mbit=0, local_mbit=0) as cluster:\n"
        "    os.environ['CLUSTER'] = cluster.names[0].removesuffix('-node0')\n"
        "    sys.exit(subprocess.run(['bash', 'recipes/launch.slurm', *sys.argv[1:]]).returncode)\n"
    )
    environment = os.environ | {
        "PATH": os.pathsep.join([str(stubs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_SUBMIT_DIR": str(tmp_path), "RANKS_PER_NODE": "2",
        "DS_CONFIG": "ds_configs/hsdp.json", "GLOO_SOCKET_IFNAME": "eth0", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    flags = [f"--dataset_name={click_log}", f"--output_dir={killed.run}", *FLAGS, "--resume_from_checkpoint=true"]
    done = subprocess.run(
        [sys.executable, "-c", program, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert losses_of(killed.run) == pytest.approx(losses_of(on_one_node), rel=1e-6)
    assert (killed.run / "summary.json").is_file(), "several nodes test and export the model too"
    assert (killed.run / "model" / "config.json").is_file()
    assert not list(tmp_path.glob(".hostfile*"))


@pytest.mark.parametrize(("status", "requeues"), [(0, False), (1, False), (75, True)])
def test_the_slurm_script_requeues_a_job_that_was_stopped_on_request(tmp_path, status, requeues):
    stubs, calls = tmp_path / "bin", tmp_path / "calls"
    stubs.mkdir()
    write_stub(stubs / "scontrol", f'echo "$@" >> {calls}\necho node-a')
    write_stub(stubs / "srun", 'shift\nSLURM_NODEID=0 "$@"')
    write_stub(stubs / "deepspeed", f'echo "$@" >> {calls}\nkill -USR1 $$\nexit {status}')
    environment = os.environ | {
        "PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node-a", "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(["bash", "recipes/launch.slurm", "--max_steps=3"], cwd=ROOT, env=environment, check=False)
    assert done.returncode == (0 if requeues else status)
    assert "--resume_from_checkpoint auto --max_steps=3" in calls.read_text()
    assert ("requeue 7" in calls.read_text()) == requeues
    assert not list(tmp_path.glob(".hostfile*"))


def write_stub(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@needs_namespaces
def test_a_signal_takes_the_cluster_down(tmp_path, click_log):
    job = subprocess.Popen(
        train(tmp_path, click_log, "--max_steps=100000"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while f"dhen{job.pid}-node1" not in namespaces():
        time.sleep(0.1)
    time.sleep(2)
    job.terminate()
    job.stderr.close()
    assert job.wait(timeout=30) == 128 + signal.SIGTERM
    assert not left_behind()


@needs_namespaces
def test_bytes_between_nodes_are_those_of_the_theory(tmp_path):
    """Of every scheme, within 2 per cent, by the interfaces' counters."""
    results = {result.scheme: result for result in measured(tmp_path, "--depths", "2")}
    assert list(results) == list(SCHEMES)
    for name, result in results.items():
        assert result.bytes_sent == pytest.approx(result.bytes_in_theory, rel=0.02), name
    assert results["hsdp"].bytes_sent < 0.6 * results["fsdp"].bytes_sent
    assert (tmp_path / "figure6.png").stat().st_size > 10_000


@needs_namespaces
def test_memory_is_measured_under_a_cap(tmp_path):
    (result,) = measured(tmp_path, "--schemes", "hsdp", "--depths", "2", "--memory_cap_mib", "900")
    assert 1 < result.peak_mib < 900


def measured(folder: Path, *more: str) -> list[Measured]:
    command = [sys.executable, "tools/bench/sharding.py", "--rounds", "1", "--compute_ms", "0", f"--output={folder}"]
    limits = ["--link_mbit", "0", "--local_mbit", "0"]
    done = subprocess.run([*command, *limits, *more], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return TypeAdapter(list[Measured]).validate_json((folder / "measured.json").read_bytes())


def test_the_status_is_that_of_the_first_node_to_fail(monkeypatch):
    """Not of those that are ended because of it."""
    monkeypatch.setattr(cluster, "_GRACE_SECONDS", 0.2)
    commands = ["sleep 60", "exit 3"]
    launchers = [subprocess.Popen(["sh", "-c", command], start_new_session=True) for command in commands]
    assert cluster.wait(launchers) == 3


def test_a_second_signal_leaves_nothing_standing(monkeypatch):
    removed = []

    def remove(name: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        removed.append(name)

    monkeypatch.setattr(cluster, "remove_namespace", remove)
    handler = signal.getsignal(signal.SIGTERM)
    cluster.Cluster(2).__exit__()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert len(removed) == 3, "two nodes and the bridge's"


def test_what_is_missing_is_said():
    done = subprocess.run(
        [sys.executable, TOOL, "recipes/train.py"], cwd=ROOT, capture_output=True, text=True, env={"PATH": ""}
    )
    assert done.returncode == 2
    assert "Install iproute2" in done.stderr
