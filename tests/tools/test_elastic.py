"""torchrun --nnodes=1:2 loses a node and gets it back: the run goes on by itself, with the same losses."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests import ROOT
from tests.recipes.launch import TINY, last_step, losses, prepared_click_log, run_script
from tests.tools.test_cluster import needs_namespaces
from tools.cluster import INTERFACE, Cluster

STEPS_BETWEEN = 40
SECONDS = 240


@needs_namespaces
def test_a_job_goes_on_without_a_node_and_with_it_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_TMP", os.environ.get("PYTEST_TMP", str(tmp_path)))
    run, log = tmp_path / "run", tmp_path / "log"
    click_log = prepared_click_log(tmp_path / "click_log", rows=1600)
    flags = [
        *TINY, "--ds_config=ds_configs/zero2.json", f"--dataset_name={click_log}", "--num_train_epochs=1000",
        "--per_device_train_batch_size=16", "--save_steps=20",
    ]  # fmt: skip
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip

    def start(cluster: Cluster, node: int) -> subprocess.Popen:
        command = ["ip", "netns", "exec", cluster.names[node], sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes=1:2", "--nproc_per_node=1", "--max_restarts=9", "--rdzv_backend=c10d", "--rdzv_id=job"]
        command += [f"--rdzv_endpoint={cluster.address(0)}:29400", f"--local_addr={cluster.address(node)}"]
        command += [f"--rdzv_conf=last_call_timeout=5,is_host={int(node == 0)}", "recipes/train.py", *flags]
        command += [f"--output_dir={run}", "--resume_from_checkpoint=auto"]
        with log.open("a") as file:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def wait_for(happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not happened():
            assert first.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def starts() -> list[int]:
        """Number of ranks of each start that trains."""
        lines = (run / "train.log").read_text().splitlines() if (run / "train.log").is_file() else []
        return [int(line.split(" ranks on cpu")[0].split()[-1]) for line in lines if " ranks on cpu" in line]

    def trains_on(ranks: int) -> Callable[[], bool]:
        reached = last_step(run)
        return lambda: starts()[-1:] == [ranks] and last_step(run) >= reached + STEPS_BETWEEN

    with Cluster(2, ranks_per_node=1, link_mbit=0, local_mbit=0) as cluster:
        first, second = start(cluster, 0), start(cluster, 1)
        wait_for(trains_on(2))
        os.killpg(second.pid, signal.SIGKILL)
        wait_for(trains_on(1))
        second = start(cluster, 1)
        wait_for(trains_on(2))
        for launcher in (first, second):
            launcher.send_signal(signal.SIGTERM)
        for launcher in (first, second):
            launcher.wait(60)
    assert [ranks for ranks, _ in itertools.groupby(starts())] == [2, 1, 2], log.read_text()
    done = losses(run)
    assert sorted(done) == list(range(1, last_step(run) + 1)), "a step is missing"
    straight = tmp_path / "straight"
    steps = [f"--output_dir={straight}", f"--max_steps={last_step(run)}"]
    assert run_script("train.py", *flags, *steps, ranks=2).status == 0
    assert {step: float(loss) for step, loss in done.items()} == pytest.approx(
        {step: float(loss) for step, loss in losses(straight).items()}, abs=0.02
    ), "hundreds of steps enlarge the rounding of other sums; another batch would be off by tenths"
