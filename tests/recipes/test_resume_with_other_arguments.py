"""A resumed run says which arguments are others than before and uses them. With nothing left to train, it stops."""

import json
import shutil
from pathlib import Path

import pytest

from tests.recipes.launch import TINY, Finished, losses, run_script, summary
from tests.recipes.test_resume_refused import DENSE, SPARSE, write_log
from tests.recipes.test_user_errors import contents

OTHER = {
    "learning_rate": ("0.001", "0.01"), "adam_beta1": ("0.9", "0.5"), "adam_epsilon": ("1e-08", "0.001"),
    "weight_decay": ("0.0", "0.25"), "max_steps": ("8", "10"), "metric_for_best_model": ("ne", "auc"),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """With a validation and a test split."""
    flags = write_log(tmp_path_factory.mktemp("data") / "log", DENSE, SPARSE)
    return [flag.replace("--train_file", "--dataset_name") for flag in flags]


def train(data: list[str], run: Path, stage: int = 0, **more: object) -> Finished:
    values = {"per_device_train_batch_size": 12, "save_steps": 4, "output_dir": run, "max_steps": 8}
    flags = [f"--{name}={value}" for name, value in (values | more.pop("arguments", {})).items()]
    return run_script("train.py", *data, *TINY, f"--ds_config=ds_configs/zero{stage}.json", *flags, **more)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> dict[int, Path]:
    """By ZeRO stage, a run of 8 steps with checkpoints at 4 and 8; read only. Stage 2 is on two ranks."""
    folder, runs = tmp_path_factory.mktemp("finished"), {}
    for stage, ranks in ((0, 1), (2, 2)):
        runs[stage] = folder / f"zero{stage}"
        batch = {"per_device_train_batch_size": 12 // ranks}
        done = train(data, runs[stage], stage, ranks=ranks, arguments=batch)
        assert done.status == 0, done.output
        assert json.loads((runs[stage] / "checkpoint-8/trainer_state.json").read_text())["best_step"] == 8
    return runs


def print_options() -> None:
    """A patch: the trainer prints its optimizer's options and the best value so far."""
    from dhen.training.loop import Trainer

    as_before = Trainer.train

    def train(self: Trainer, *arguments: object) -> bool:
        outer = self.model.engine.optimizer
        (group,) = getattr(outer, "optimizer", outer).param_groups
        options = [group["betas"][0], group["eps"], group["weight_decay"], self._best.value, self.state.best_step]
        print(f"options: {json.dumps(options)}")
        return as_before(self, *arguments)

    Trainer.train = train


@pytest.mark.parametrize("stage", [0, 2])  # stage 2 also goes from two ranks to one
def test_other_arguments_are_said_and_honoured(tmp_path, finished, data, stage):
    run = Path(shutil.copytree(finished[stage], tmp_path / "run"))
    changes = {"resume_from_checkpoint": True} | {name: new for name, (_, new) in OTHER.items()}
    done = train(data, run, stage, patch=print_options, arguments=changes)
    assert done.status == 0, done.output
    was = {name: [line for line in done.output.splitlines() if line.startswith(f"{name} was ")] for name in OTHER}
    assert was == {
        name: [f"{name} was {old} until step 8, now {new}: the resumed run honours it"]
        for name, (old, new) in OTHER.items()
    }
    assert done.output.count(": the resumed run honours it") == len(OTHER) + (stage == 2)  # and the batch per rank
    assert f"options: {json.dumps([0.5, 0.001, 0.25, None, None])}" in done.output
    assert summary(run)["steps"] == 10


def test_with_nothing_left_to_train_nothing_changes(tmp_path, finished, data):
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    before = contents(run)
    for steps in (8, 5):
        done = train(data, run, arguments={"resume_from_checkpoint": True, "max_steps": steps, "learning_rate": 0.5})
        assert done.status == 0, done.output
        assert f"the run already did step 8 of {steps}. There is nothing left to train" in done.output
        assert "tested and exported" not in done.output
        assert contents(run) == before
    # A run that trained to its end but was not tested is tested, and not trained.
    (run / "summary.json").unlink()
    done = train(data, run, arguments={"resume_from_checkpoint": True})
    assert "tested and exported" in done.output, done.output
    assert summary(run)["test"] == summary(finished[0])["test"]
    assert losses(run) == losses(finished[0])
