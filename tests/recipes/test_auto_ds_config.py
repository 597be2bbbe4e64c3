"""--ds_config auto and the memory plan at the start of a run, through real launches on small data."""

import json
from pathlib import Path

import pytest

from dhen.planner.nearest_machine import machine_of_gpu
from dhen.training import session
from tests.recipes.launch import TINY, run_script, summary

SMALL = (*TINY, "--per_device_train_batch_size=16", "--max_steps=3", "--eval_steps=3")
INTERACTION = '''
from dhen.model.interactions import Interaction, MixEmbeddings, register_interaction


@register_interaction("signed")
class Signed(Interaction):
    """What it does depends on the numbers, which tensors without values don't have."""

    def __init__(self, context, *, use_dense: bool = False):
        super().__init__(context, use_dense=use_dense)
        self.mix = MixEmbeddings(self.num_rows, context.num_outputs)

    def forward(self, x_BMD, dense_BN):
        rows = self.rows(x_BMD, dense_BN)
        return self.mix(rows if rows.sum().item() > 0 else -rows)
'''


def flags(run: Path, click_log: Path, *more: str, ds_config: str = "auto") -> list[str]:
    return [f"--ds_config={ds_config}", f"--dataset_name={click_log}", f"--output_dir={run}", *SMALL, *more]


@pytest.fixture(scope="module")
def sharded(click_log, tmp_path_factory) -> Path:
    """A run of 2 ranks under ZeRO stage 3."""
    run = tmp_path_factory.mktemp("auto") / "sharded"
    done = run_script("train.py", *flags(run, click_log, ds_config="ds_configs/zero3.json"), ranks=2)
    assert done.status == 0, done.output
    return run


def test_auto_trains_on_two_ranks_with_what_it_chose_and_says_why(tmp_path, click_log):
    run = tmp_path / "run"
    done = run_script("train.py", *flags(run, click_log), ranks=2)
    assert done.status == 0, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("ds_config: auto: ")]
    assert "is the fastest that fits" in line
    resolved = json.loads((run / "ds_config.json").read_text())
    stage = resolved["zero_optimization"]["stage"]
    assert line.startswith(f"ds_config: auto: {'dp' if stage == 0 else f'zero{stage}'}, because")
    assert resolved["train_batch_size"] == 32
    assert summary(run)["zero_stage"] == stage
    assert summary(run)["ds_config"] == "auto"
    again = run_script(
        "train.py", *flags(tmp_path / "again", click_log, ds_config=str(run / "ds_config.json")), ranks=2
    )
    assert summary(tmp_path / "again")["test"] == summary(run)["test"], again.output


def has_next_to_nothing() -> None:
    session.rank_memory_bytes = lambda topology: 600_000


def test_auto_refuses_where_nothing_fits(tmp_path, click_log):
    done = run_script("train.py", *flags(tmp_path / "run", click_log), ranks=2, patch=has_next_to_nothing)
    assert done.status != 0
    assert "do not fit on" in done.output
    assert "Possible solutions" in done.output
    assert "Traceback" not in done.output


def test_the_memory_plan_is_said_at_start(click_log, sharded, tmp_path):
    named = flags(tmp_path / "run", click_log, ds_config="ds_configs/zero2.json")
    roomy = run_script("train.py", *named)
    (line,) = [line for line in roomy.output.splitlines() if line.startswith("memory: ")]
    assert "a rank is expected to need at most" in line
    assert "activations" in line
    tight = run_script("train.py", *named, "--overwrite_output_dir", patch=has_next_to_nothing)
    assert tight.status == 0, "a prediction fails no run"
    assert "this is more than a rank has. `python tools/plan.py`" in tight.output


def test_what_cannot_be_traced_trains_without_a_memory_plan(click_log, tmp_path):
    (tmp_path / "mine.py").write_text(INTERACTION)
    own = (f"--interaction_files={tmp_path / 'mine.py'}", "--interactions=linear,signed")
    done = run_script("train.py", *flags(tmp_path / "run", click_log, *own, ds_config="ds_configs/zero2.json"))
    assert done.status == 0, done.output
    assert "memory: cannot be predicted: the model cannot be traced" in done.output
    done = run_script("train.py", *flags(tmp_path / "other", click_log, *own))
    assert done.status != 0
    assert "ds_config auto: the model cannot be traced" in done.output
    assert "Name a ds_config" in done.output


def test_a_resumed_run_keeps_the_stage_of_its_checkpoint(click_log, sharded, tmp_path):
    """Also of a checkpoint that has been taken out of its run folder."""
    copy = tmp_path / "copy" / "checkpoint-3"
    copy.parent.mkdir()
    copy.symlink_to(sharded / "checkpoint-3")
    resume = (f"--resume_from_checkpoint={copy}", "--max_steps=6")
    done = run_script("train.py", *flags(tmp_path / "run", click_log, *resume), ranks=2)
    assert done.status == 0, done.output
    assert f"ds_config: auto: taken from {copy}" in done.output
    assert "resuming from" in done.output
    assert summary(tmp_path / "run")["zero_stage"] == 3
    assert summary(tmp_path / "run")["steps"] == 6


@pytest.mark.parametrize(
    ("device", "gib", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 79.3, "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA L4", 22.0, None),
    ],
)
def test_gpus_are_known_by_their_names(device, gib, name):
    assert machine_of_gpu(device, int(gib * 2**30)) == name
