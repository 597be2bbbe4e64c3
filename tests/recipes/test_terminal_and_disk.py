"""A terminal that is gone does not end a run, a full disk ends it in one line, and a long silence says what goes on."""

import importlib
import os
import resource
import time
from pathlib import Path

import pytest

from dhen.runtime import messages
from dhen.training.saved.checkpoint_folder import checkpoints
from tests.recipes.launch import TINY, losses, run_script, summary


def flags(run: Path, click_log: Path, *more: str) -> list[str]:
    return ["--ds_config=ds_configs/zero0.json", f"--dataset_name={click_log}", f"--output_dir={run}", *TINY,
            "--per_device_train_batch_size=24", "--max_steps=14", *more]  # fmt: skip


def nobody_reads() -> None:
    """As after `2>&1 | head -1`: the pipe has no reader."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)


def test_a_pipe_without_a_reader_does_not_end_the_run(tmp_path, click_log):
    run = tmp_path / "run"
    done = run_script("train.py", *flags(run, click_log), patch=nobody_reads)
    assert (done.status, done.output) == (0, "")
    assert summary(run)["steps"] == 14
    log = (run / "train.log").read_text()
    for line in ("arguments: {", "step 14/14 100.0% | loss", "results are in "):
        assert line in log
    resumed = run_script("train.py", *flags(run, click_log, "--max_steps=20", "--resume_from_checkpoint=auto"))
    assert resumed.status == 0, resumed.output
    grown = (run / "train.log").read_text()
    assert grown.startswith(log)
    assert "step 20/20" in grown


class FullDisk:
    """From this call of that function on, no file can grow beyond this many bytes."""

    def __init__(self, module: str, name: str, call: int = 2) -> None:
        self.module, self.name, self.call = module, name, call

    def __call__(self) -> None:
        module = importlib.import_module(f"dhen.training.saved.{self.module}")
        right, calls = getattr(module, self.name), []

        def full(*arguments, **options):
            calls.append(arguments)
            if len(calls) == self.call:
                resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # more than the terminal's lines
            return right(*arguments, **options)

        setattr(module, self.name, full)


DENSE_PART, TABLES = FullDisk("checkpoint", "_add_states"), FullDisk("checkpoint_writing", "write_in_pieces")


@pytest.mark.parametrize("async_save", ["on", "off"])
@pytest.mark.parametrize("patch", [DENSE_PART, TABLES], ids=["dense part", "tables"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path, click_log, patch, async_save):
    run = tmp_path / "run"
    arguments = flags(run, click_log, "--save_steps=7", "--logging_steps=2", f"--async_save={async_save}")
    done = run_script("train.py", *arguments, patch=patch)
    assert done.status == 1, done.output
    last = done.output.splitlines()[-1]
    assert last.startswith(f"error: {run}/checkpoint-14: this checkpoint cannot be written: "), done.output
    assert "GiB are free on that disk" in last
    assert "Traceback" not in done.output
    assert [folder.name for folder in checkpoints(run)] == ["checkpoint-7"]
    assert run_script("train.py", *arguments, "--resume_from_checkpoint=auto").status == 0
    assert losses(run)[14]


def test_a_disk_that_is_full_at_the_export_is_one_line(tmp_path, click_log):
    run, patch = tmp_path / "run", FullDisk("trained_model", "save_file", call=1)
    arguments = flags(run, click_log, "--num_embeddings_out=32")
    done = run_script("train.py", *arguments, patch=patch)
    assert done.status == 1, done.output
    assert done.output.splitlines()[-1].startswith("error: Error while serializing: I/O error: "), done.output
    assert "Traceback" not in done.output
    assert not (run / "model").exists()
    assert run_script("train.py", *arguments, "--resume_from_checkpoint=auto").status == 0
    assert (run / "model").is_dir()


def test_a_folder_that_cannot_be_written_is_refused_before_the_data_is_read(tmp_path):
    missing = tmp_path / "missing.csv"
    arguments = flags(Path("/proc/run"), missing)
    done = run_script("train.py", *arguments)
    assert done.status == 1
    assert "error: output_dir /proc/run: nothing can be written to /proc (" in done.output


def slow_data() -> None:
    messages._SECONDS_OF_SILENCE = 0.5
    from dhen.training import dataset

    right = dataset.open_data

    def slow(*arguments):
        time.sleep(1.2)
        return right(*arguments)

    dataset.open_data = slow


def test_a_long_silence_says_what_goes_on(tmp_path, click_log):
    done = run_script("train.py", *flags(tmp_path / "run", click_log), patch=slow_data)
    assert done.status == 0, done.output
    assert " s without a line: the run is opening or preparing the data" in done.output
