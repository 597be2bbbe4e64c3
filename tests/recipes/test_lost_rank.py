"""A rank that is killed in the middle of training ends the job on all others, which name it; the run goes on after."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed

from tests.recipes.launch import TINY, last_step, losses, run_script
from tests.recipes.test_stopping import at_step


def flags(run: Path, click_log: Path) -> list[str]:
    return [f"--dataset_name={click_log}", *TINY, f"--output_dir={run}", "--ds_config=ds_configs/zero3.json",
            "--per_device_train_batch_size=6", "--max_steps=40", "--save_steps=10"]  # fmt: skip


@pytest.fixture(scope="module")
def straight(click_log, tmp_path_factory) -> Path:
    """A run that nobody kills."""
    run = tmp_path_factory.mktemp("straight") / "run"
    done = run_script("train.py", *flags(run, click_log), ranks=4)
    assert done.status == 0, done.output
    return run


@pytest.mark.parametrize("killed", [0, 2])
def test_the_others_name_a_killed_rank_and_end(tmp_path, click_log, straight, killed):
    broken, arguments = tmp_path / "broken", flags(tmp_path / "broken", click_log)
    done = run_script("train.py", *arguments, ranks=4, kill_when=lambda: last_step(broken) >= 15, killed_rank=killed)
    assert done.status != 0
    others = {rank for rank in range(4) if f"[rank {rank}] error: rank {killed} of 4 is gone" in done.output}
    assert others == {0, 1, 2, 3} - {killed}, done.output
    resumed = run_script("train.py", *arguments, "--resume_from_checkpoint=true", ranks=4)
    assert resumed.status == 0, resumed.output
    assert losses(broken) == losses(straight)


def test_a_rank_that_stands_still_is_named_after_the_timeout(tmp_path, click_log):
    run = tmp_path / "run"

    def stop_one(pids: list[int]) -> None:
        os.kill(pids[1], signal.SIGSTOP)
        threading.Timer(20, os.kill, (pids[1], signal.SIGKILL)).start()  # so that this test can end

    done = run_script(
        "train.py", *flags(run, click_log), "--timeout_minutes=0.1", ranks=2, kill_when=at_step(run, 15), send=stop_one
    )
    assert "[rank 0] error: rank 1 of 2 is gone, so the job ends" in done.output


class DiesWhileItOpensTheData:
    """Rank 1 ends without a word before training begins."""

    def __call__(self) -> None:
        from dhen.training import dataset

        right = dataset.open_data

        def dies(*arguments):
            if os.environ["RANK"] == "1":
                os._exit(9)
            return right(*arguments)

        dataset.open_data = dies


def test_a_rank_that_is_lost_before_training_is_named_too(tmp_path, click_log):
    done = run_script(
        "train.py", *flags(tmp_path / "run", click_log), ranks=2, patch=DiesWhileItOpensTheData(),
        kill_when=lambda: True, send=lambda pids: None,
    )  # fmt: skip
    assert "[rank 0] error: rank 1 of 2 is gone, so the job ends" in done.output


class DiesBeforeAGroup:
    """Rank 1 ends before it joins one of the groups that the ranks make: the first, DeepSpeed's, the last."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self) -> None:
        from torch.distributed import distributed_c10d

        right = distributed_c10d.new_group

        def new_group(*arguments, **more):
            self.left -= 1
            if os.environ["RANK"] == "1" and not self.left:
                os._exit(9)
            return right(*arguments, **more)

        torch.distributed.new_group = distributed_c10d.new_group = new_group


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_rank_that_is_lost_while_groups_are_made_is_named_after_the_timeout(tmp_path, click_log, number):
    done = run_script(
        "train.py", *flags(tmp_path / "run", click_log), "--timeout_minutes=0.25", ranks=2,
        patch=DiesBeforeAGroup(number), kill_when=lambda: True, send=lambda pids: None,
    )  # fmt: skip
    assert "[rank 0] error: rank 1 of 2 is gone, so the job ends" in done.output
    assert "Traceback" not in done.output


def test_the_launchers_signal_after_a_users_mistake_says_nothing_more(tmp_path):
    """Rank 0, which reads the rows and holds the store, ends with its error. Then the launcher ends the others."""
    rows = tmp_path / "rows.tsv"
    rows.write_text("no format\n")

    def as_a_launcher(pids: list[int]) -> None:
        while psutil.pid_exists(pids[0]) and psutil.Process(pids[0]).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        os.kill(pids[1], signal.SIGTERM)

    arguments = flags(tmp_path / "run", rows)
    done = run_script("train.py", *arguments, ranks=2, kill_when=lambda: True, send=as_a_launcher)
    assert done.status == 1
    (line,) = done.output.strip().splitlines()
    assert line.startswith("[rank 0] error: ")
