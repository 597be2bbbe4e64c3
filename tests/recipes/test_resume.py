"""Checkpoints: a killed run goes on as if nothing had happened, and a save that is cut off is never picked up."""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dhen.training.saved import checkpoint, checkpoint_folder, checkpoint_writing
from dhen.training.saved.checkpoint_folder import CheckpointError, candidates, checkpoints, is_whole
from tests import ROOT
from tests.recipes.launch import TINY, Finished, last_step, losses, run_script, summary

STEPS = 40
AVERAGE = ("--ema_decay=0.9", "--table_optimizer=adam", "--whole_table_l2=0.01", "--batch_norm=true")
SETTINGS = (*TINY, "--per_device_train_batch_size=12", "--dropout=0.1", "--lr_scheduler_type=cosine", "--save_steps=20")


def flags(run: Path, click_log: Path, stage: int, *more: str) -> list[str]:
    return [
        f"--ds_config=ds_configs/zero{stage}.json", f"--dataset_name={click_log}", f"--output_dir={run}",
        f"--max_steps={STEPS}", "--eval_steps=20", *SETTINGS, *more,
    ]  # fmt: skip


def in_mid_run(run: Path) -> Callable[[], bool]:
    """Whether a checkpoint, which is written while training goes on, is complete, and training has gone on."""
    return lambda: last_step(run) >= 25 and bool(checkpoints(run))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(tmp_path, click_log, stage):
    # 640 rows, 24 a step: the kill falls into the second epoch, and the checkpoint into the first.
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert run_script("train.py", *flags(straight, click_log, stage, *AVERAGE), ranks=2).status == 0
    killed = run_script("train.py", *flags(broken, click_log, stage, *AVERAGE), ranks=2, kill_when=in_mid_run(broken))
    assert killed.status != 0
    assert [folder.name for folder in checkpoints(broken)] == ["checkpoint-20"]
    resumed = run_script(
        "train.py", *flags(broken, click_log, stage, *AVERAGE, "--resume_from_checkpoint=true"), ranks=2
    )
    assert resumed.status == 0, resumed.output
    assert "step 20 of 40" in resumed.output
    assert losses(broken) == losses(straight)
    assert sorted(losses(straight)) == list(range(1, STEPS + 1))
    assert summary(broken)["test"] == summary(straight)["test"]


def test_a_forgotten_random_state_is_caught(tmp_path, click_log):
    """Negative control: without the random state dropout differs, and the losses with it."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_script("train.py", *flags(straight, click_log, 0))
    run_script("train.py", *flags(broken, click_log, 0), kill_when=in_mid_run(broken))
    run_script("train.py", *flags(broken, click_log, 0, "--resume_from_checkpoint=true"), patch=forget_random_state)
    assert losses(broken) != losses(straight)


def forget_random_state() -> None:
    checkpoint._set_random_state = lambda state: None


def die_in(name: str, call: int):
    """A patch: the process dies at the call-th call of that function of the checkpoint modules."""
    return _Die(name, call)


class _Die:
    def __init__(self, name: str, call: int) -> None:
        self.name, self.left = name, call

    def __call__(self) -> None:
        modules = (checkpoint, checkpoint_folder, checkpoint_writing)
        module = next(module for module in modules if hasattr(module, self.name))
        right = getattr(module, self.name)

        def dies(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                os._exit(9)
            return right(*args, **kwargs)

        setattr(module, self.name, dies)


@pytest.mark.parametrize(
    ("name", "call"), [("write_in_pieces", 2), ("_random_state", 2), ("write_atomically", 3), ("write_atomically", 4)]
)
def test_a_save_that_is_cut_off_leaves_the_one_before(tmp_path, click_log, name, call):
    run = tmp_path / "run"
    cut = run_script("train.py", *flags(run, click_log, 2), patch=die_in(name, call))
    assert cut.status == 9
    assert (run / "checkpoint-40").is_dir(), "it died before the second save, so this shows nothing"
    # Whole but not yet named by `latest` is whole; anything less is never found.
    is_finished = (name, call) == ("write_atomically", 4)
    assert is_whole(run / "checkpoint-40") == is_finished
    assert candidates("true", run)[0].name == "checkpoint-20"
    resumed = run_script("train.py", *flags(run, click_log, 2, "--resume_from_checkpoint=true"))
    assert resumed.status == 0, resumed.output
    assert candidates("true", run)[0].name == "checkpoint-40"


def test_an_unfinished_folder_is_refused_by_name(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        candidates(str(tmp_path / "checkpoint-5"), tmp_path)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        candidates("true", tmp_path)
    assert candidates("auto", tmp_path) == []


@dataclass(frozen=True)
class SetUp:
    """A way to run: ZeRO stage, ranks, ranks of a shard group, and ranks of a table group."""

    stage: int
    ranks: int
    shard_group: int | str = "world"
    table_group: int | str = "world"

    def __str__(self) -> str:
        return f"zero{self.stage} {self.ranks} ranks {self.shard_group} {self.table_group}"

    def run(self, run: Path, click_log: Path, *more: str) -> Finished:
        raw = json.loads((ROOT / f"ds_configs/zero{self.stage}.json").read_text())
        raw["dhen"] = {"shard_group": self.shard_group, "table_optimizer": "adagrad"}
        raw["dhen"] |= {"table_group": self.table_group}
        run.mkdir(parents=True, exist_ok=True)
        (run / "set_up.json").write_text(json.dumps(raw))
        own = (f"--ds_config={run / 'set_up.json'}", f"--per_device_train_batch_size={24 // self.ranks}")
        own += ("--ema_decay=0.9",)
        return run_script("train.py", *flags(run, click_log, 0, "--dropout=0", *own, *more), ranks=self.ranks)


HSDP = SetUp(3, 4, 2)
ONE_GROUP = SetUp(0, 4)
TWO_GROUPS = replace(ONE_GROUP, table_group=2)


@pytest.fixture(scope="module")
def saved(click_log, tmp_path_factory):
    """A run by a set-up, 40 steps with a checkpoint at 20; one for all tests that ask for it."""

    @functools.cache
    def make(set_up: SetUp, *more: str) -> Path:
        run = tmp_path_factory.mktemp("saved") / "run"
        done = set_up.run(run, click_log, *more)
        assert done.status == 0, done.output
        return run

    return make


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (HSDP, SetUp(3, 4)),
        (HSDP, SetUp(3, 2)),  # the same cut, fewer replicas
        (HSDP, SetUp(3, 6, 3)),
        (SetUp(3, 4), HSDP),
        (SetUp(3, 4), SetUp(3, 2)),
        (SetUp(2, 2), SetUp(2, 4, 2)),
        (SetUp(2, 2), SetUp(2, 4)),
        (SetUp(1, 2), SetUp(1, 3)),
        (SetUp(0, 2), SetUp(0, 3)),
        (ONE_GROUP, TWO_GROUPS),
        (TWO_GROUPS, ONE_GROUP),
        (TWO_GROUPS, replace(TWO_GROUPS, ranks=6, table_group=3)),
        (replace(TWO_GROUPS, stage=2, shard_group=2), replace(TWO_GROUPS, stage=2, ranks=2, table_group="world")),
    ],
    ids=lambda set_up: str(set_up),
)
def test_other_ranks_and_shard_groups_go_on_with_the_same_losses(tmp_path, click_log, saved, before, after):
    source = saved(before)
    resumed = tmp_path / "resumed"
    done = after.run(resumed, click_log, f"--resume_from_checkpoint={source / 'checkpoint-20'}")
    assert done.status == 0, done.output
    expected = {step: float(loss) for step, loss in losses(source).items() if step > 20}
    assert {step: float(loss) for step, loss in losses(resumed).items()} == pytest.approx(expected, rel=2e-5)
    assert not list(source.glob("checkpoint-20/*universal*")), "what was converted is left behind"


def test_batch_norms_statistics_are_resharded_too(tmp_path, click_log, saved):
    source, resumed = saved(HSDP, "--batch_norm"), tmp_path / "resumed"
    checkpoint = source / "checkpoint-20"
    done = SetUp(3, 4).run(resumed, click_log, "--batch_norm", f"--resume_from_checkpoint={checkpoint}")
    assert done.status == 0, done.output
    # Batch norm over 6 examples a rank makes more of rounding; without the statistics ne is far off.
    assert summary(resumed)["test"]["ne"] == pytest.approx(summary(source)["test"]["ne"], rel=1e-3)


def test_another_zero_stage_is_refused_with_a_way_out(tmp_path, click_log, saved):
    checkpoint = saved(SetUp(2, 2)) / "checkpoint-20"
    other = SetUp(3, 2).run(tmp_path / "other", click_log, f"--resume_from_checkpoint={checkpoint}")
    assert other.status != 0
    assert "saved by 2 ranks, 2 per replica, under ZeRO stage 2" in other.output
    assert "--model_name_or_path" in other.output


def test_a_save_after_a_resume_from_an_earlier_checkpoint_is_kept(tmp_path):
    for number, step in enumerate([20, 40, 60, 30]):  # resumed from 20, saved at 30, with the clock set back
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / checkpoint_folder.STATE_FILE).write_text(json.dumps({"number": number}))
        os.utime(folder / checkpoint_folder.STATE_FILE, (9 - number, 9 - number))
    checkpoint_folder.delete_old_checkpoints(tmp_path, 2, best_step=20)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-60", "checkpoint-30"]


def test_what_a_cut_off_save_left_goes_with_the_next_save(tmp_path):
    for step in (20, 40):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-40" / checkpoint_folder.STATE_FILE).write_text("{}")
    checkpoint_folder.delete_old_checkpoints(tmp_path, 2, best_step=None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-40"]
