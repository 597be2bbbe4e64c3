"""Every launcher starts a training run, on the number of ranks it was asked for, and nothing of ours warns."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.ranks import free_port
from tests.recipes.launch import TINY, summary

SCRIPTS = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": (["deepspeed", "--num_gpus", "2", "--master_port", "{port}"], 2),
    "torchrun": (["torchrun", "--nproc_per_node", "2", "--master_port", "{port}"], 2),
    "accelerate": (
        ["accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
         "--dynamo_backend", "no", "--main_process_port", "{port}"],
        1,  # on CPU it starts more only through MPI
    ),
    "python": ([sys.executable], 1),
}  # fmt: skip
# What the launchers say on their own account, before and after our script runs.
OF_THE_LAUNCHER = re.compile(
    r"\[(runner|launch|real_accelerator)\.py|OMP_NUM_THREADS|^\W*$|torch/distributed/run\.py|To avoid this warning"
)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_trains_without_a_warning(name, tmp_path, click_log):
    launcher, ranks = LAUNCHERS[name]
    command = [word.format(port=free_port()) for word in launcher]
    command[0] = command[0] if name == "python" else str(SCRIPTS / command[0])
    flags = ["--ds_config=ds_configs/zero2.json", f"--dataset_name={click_log}", f"--output_dir={tmp_path / 'run'}",
             "--max_steps=3", "--per_device_train_batch_size=16", *TINY]  # fmt: skip
    # As a user's shell would have it: nothing set but what every shell sets.
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [*command, "recipes/train.py", *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert summary(tmp_path / "run")["world_size"] == ranks
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["world_size"] == ranks
    assert "recipes/train.py" in environment["command"]
    assert flags[0] in environment["command"]
    ours = [line for line in output.splitlines() if not OF_THE_LAUNCHER.search(line)]
    ours = [line for line in ours if not line.startswith("arguments: ")]  # names bad_rows: error
    suspicious = [line for line in ours if re.search(r"warn|deprecat|error|traceback", line, re.IGNORECASE)]
    assert not suspicious, output
    assert any(line.startswith("step 3/3 100.0% | loss") for line in ours), output
