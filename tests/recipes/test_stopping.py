"""A run that is asked to stop saves and leaves with status 75; `--resume_from_checkpoint auto` goes on to the bit."""

import os
import signal
import time
from pathlib import Path

import pytest

from dhen.runtime import stopping
from dhen.training.saved import checkpoint_writing
from dhen.training.saved.checkpoint_folder import checkpoints
from tests.recipes.launch import TINY, last_step, losses, run_script, summary

AUTO = "--resume_from_checkpoint=auto"


def flags(run: Path, click_log: Path, stage: int = 0) -> list[str]:
    """Steps end on no logging step, no save and no evaluation, so a stop finds work that is half done."""
    return [
        f"--ds_config=ds_configs/zero{stage}.json", f"--dataset_name={click_log}", f"--output_dir={run}", *TINY,
        "--logging_steps=7", "--max_steps=70", "--eval_steps=35", "--per_device_train_batch_size=12", "--dropout=0.1",
    ]  # fmt: skip


def at_step(run: Path, step: int):
    """Whether metrics.csv has this step."""
    return lambda: last_step(run) >= step


def to(number: int, *ranks: int):
    """Sends the signal to these ranks, three times, as launchers do that pass on what the terminal already sent."""

    def send(pids: list[int]) -> None:
        for _ in range(3):
            for rank in ranks:
                os.kill(pids[rank], number)

    return send


@pytest.mark.parametrize(
    ("stage", "ranks", "number", "signalled"),
    [(0, 1, signal.SIGTERM, [0]), (2, 2, signal.SIGUSR1, [1]), (3, 2, signal.SIGINT, [0, 1])],
)
def test_a_signal_is_a_save_and_auto_goes_on_to_the_bit(tmp_path, click_log, stage, ranks, number, signalled):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    done = run_script("train.py", *flags(straight, click_log, stage), AUTO, ranks=ranks)
    assert done.status == 0, done.output
    assert f"{straight} has no checkpoint yet: the run starts at step 0" in done.output
    arguments = [*flags(broken, click_log, stage), AUTO]
    stopped = run_script("train.py", *arguments, ranks=ranks, kill_when=at_step(broken, 7), send=to(number, *signalled))
    assert stopped.status == stopping.STATUS == 75, stopped.output
    (saved,) = checkpoints(broken)
    assert stopped.output.count("stopped by") == 1
    step = int(saved.name.removeprefix("checkpoint-"))
    assert f"stopped by {number.name} at step {step} of 70, which is saved in {saved}" in stopped.output
    resumed = run_script("train.py", *arguments, ranks=ranks)
    assert resumed.status == 0, resumed.output
    assert f"resuming from {saved} at step {step} of 70" in resumed.output
    assert losses(broken) == losses(straight)
    assert summary(broken)["test"] == summary(straight)["test"]
    again = run_script("train.py", *arguments, ranks=ranks)
    assert (again.status, "There is nothing left to train" in again.output) == (0, True), again.output


def interrupt_twice(pids: list[int]) -> None:
    os.kill(pids[0], signal.SIGINT)
    time.sleep(stopping._SECONDS_BETWEEN_INTERRUPTS + 0.2)
    os.kill(pids[0], signal.SIGINT)


def save_for_ever() -> None:
    """The second save never ends, and a stop waits two seconds for it."""
    stopping._SECONDS_TO_SAVE = 2.0
    write = checkpoint_writing.write_in_pieces

    def slow(path: Path, *arguments) -> None:
        write(path, *arguments)
        if path.parent.name != "checkpoint-7":
            time.sleep(120)

    checkpoint_writing.write_in_pieces = slow


@pytest.mark.parametrize(
    ("send", "status", "line"),
    [
        (to(signal.SIGTERM, 0), 75, "stopped by SIGTERM: not saved within 2 s, so the last whole checkpoint stays"),
        (interrupt_twice, 130, "stopped by a second SIGINT: the last whole checkpoint stays"),
    ],
)
def test_a_save_that_does_not_end_is_given_up(tmp_path, click_log, send, status, line):
    run = tmp_path / "run"
    arguments = [*flags(run, click_log), "--save_steps=7", "--max_steps=14"]
    done = run_script("train.py", *arguments, kill_when=(run / "checkpoint-14").is_dir, send=send, patch=save_for_ever)
    assert (done.status, line in done.output) == (status, True), done.output
    assert [folder.name for folder in checkpoints(run)] == ["checkpoint-7"]


def test_outside_of_training_a_signal_ends_the_run_at_once(tmp_path, click_log):
    run = tmp_path / "run"
    tested = run_script("train.py", *flags(run, click_log), "--max_steps=7")
    assert tested.status == 0
    mark = tmp_path / "mark"
    done = run_script(
        "train.py", *flags(run, click_log), "--max_steps=14", AUTO,
        kill_when=mark.is_file, send=to(signal.SIGTERM, 0), patch=_Slow(mark),
    )  # fmt: skip
    assert done.status == 75, done.output
    assert "stopped by SIGTERM, outside of training: there is nothing to save" in done.output
    assert [folder.name for folder in checkpoints(run)] == ["checkpoint-7"]


def test_a_rank_that_is_late_leaves_with_the_others(tmp_path, click_log):
    """Rank 0 holds the store in which a rank reads that it shall leave."""
    output = leave_together(click_log, 3, _Slow(tmp_path / "mark", late_rank=2))
    assert output.count("stopped by SIGTERM, outside of training: there is nothing to save") == 1


def test_rank_0_that_leaves_with_another_and_is_signalled_too_waits_for_the_late_one(tmp_path, click_log):
    def send(pids: list[int]) -> None:
        os.kill(pids[1], signal.SIGTERM)
        time.sleep(0.3)
        os.kill(pids[0], signal.SIGTERM)

    leave_together(click_log, 3, _Slow(tmp_path / "mark", late_rank=2), send)


def test_a_rank_that_waits_in_the_store_takes_the_others_with_it(tmp_path, click_log):
    leave_together(click_log, 2, _InTheStore(tmp_path / "mark"))


def test_a_rank_that_has_only_just_joined_leaves_with_the_others(tmp_path, click_log):
    output = leave_together(click_log, 2, _JustJoined(tmp_path / "mark"))
    assert output.count("stopped by SIGTERM, outside of training: there is nothing to save") == 1


def leave_together(click_log: Path, ranks: int, patch, send=None) -> str:
    """Signal a patched run once its mark is there, by default rank 1. All must leave with 75. Returns their output."""
    done = run_script(
        "train.py", *flags(patch.mark.parent / "run", click_log), ranks=ranks,
        kill_when=patch.mark.is_file, send=send or to(signal.SIGTERM, 1), patch=patch,
    )  # fmt: skip
    assert done.statuses == {75}, done.output
    assert "is gone" not in done.output
    return done.output


class _JustJoined:
    """Rank 1 has joined, and stands still before it listens to the others. The mark says when that began."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __call__(self) -> None:
        from dhen.runtime import lost_ranks

        if os.environ["RANK"] == "1":
            lost_ranks.naming_lost_ranks = lambda _: (self.mark.touch(), time.sleep(120))


class _InTheStore:
    """Rank 1 waits in the store for rank 0, as it does for a new group. The mark says when that began."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __call__(self) -> None:
        from dhen.runtime import lost_ranks
        from dhen.training import dataset

        def wait(*_, **__) -> None:
            if os.environ["RANK"] == "0":
                time.sleep(120)
            self.mark.touch()
            lost_ranks._store().wait(["never"])

        dataset.open_data = wait


class _Slow:
    """The data takes long to open; the mark says when that began. One rank begins late to answer questions."""

    def __init__(self, mark: Path, late_rank: int | None = None) -> None:
        self.mark, self.late_rank = mark, late_rank

    def __call__(self) -> None:
        from dhen.runtime import lost_ranks
        from dhen.training import dataset

        if os.environ["RANK"] == str(self.late_rank):
            answer = lost_ranks._answer
            lost_ranks._answer = lambda *arguments: (time.sleep(1), answer(*arguments))

        def slow(*_, **__) -> None:
            self.mark.touch()
            time.sleep(120)

        dataset.open_data = slow


def test_other_ranks_go_on_at_the_same_global_batch(tmp_path, click_log):
    """As after a node was lost: the same command, on fewer ranks."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert run_script("train.py", *flags(straight, click_log, 2), "--dropout=0", ranks=2).status == 0
    arguments = [*flags(broken, click_log, 2), "--dropout=0", AUTO]
    stop = {"kill_when": at_step(broken, 7), "send": to(signal.SIGTERM, 1)}
    assert run_script("train.py", *arguments, ranks=2, **stop).status == 75
    uneven = run_script("train.py", *arguments, ranks=5)
    assert "error: the checkpoint's global batch, 24, cannot be divided evenly over 5 ranks" in uneven.output
    resumed = run_script("train.py", *arguments, ranks=1)
    assert resumed.status == 0, resumed.output
    assert "2 ranks saved the checkpoint, and 1 go on: per_device_train_batch_size is now 24" in resumed.output
    expected = {step: float(loss) for step, loss in losses(straight).items()}
    # The sums for the next line are those of the ranks that saved, so the first one after a resume covers less.
    last = max(expected)
    assert float(losses(broken)[last]) == pytest.approx(expected[last], rel=2e-5)
