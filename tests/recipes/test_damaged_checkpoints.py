"""A checkpoint whose files are not as they were saved is named and passed over; none of its files can run code."""

import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import xxhash

from dhen.training import finish
from dhen.training.saved.checkpoint_folder import FILES, STATE_FILE, damage, sealed
from tests.ranks import run_ranks
from tests.recipes.launch import TINY, last_step, losses, run_script

SETTINGS = (*TINY, "--per_device_train_batch_size=24", "--max_steps=20", "--save_steps=10", "--ema_decay=0.9",
            "--load_best_model_at_end=false")  # fmt: skip


def flags(run: Path, click_log: Path, stage: int = 2) -> list[str]:
    return [f"--ds_config=ds_configs/zero{stage}.json", f"--dataset_name={click_log}", f"--output_dir={run}", *SETTINGS]


@pytest.fixture(scope="module")
def saved(click_log, tmp_path_factory) -> Path:
    """A run with checkpoints at steps 10 and 20."""
    run = tmp_path_factory.mktemp("saved") / "run"
    done = run_script("train.py", *flags(run, click_log), ranks=2)
    assert done.status == 0, done.output
    return run


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def zero_half(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


DAMAGES = {
    "flipped": flip,
    "half zeroed": zero_half,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "missing": Path.unlink,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


def faults_of(topology, folder: str) -> dict[str, str | None]:
    """The fault that is found after each kind of damage to each file, one at a time."""
    logging.disable()
    found = {"none": damage(Path(folder), topology)}
    for file in sorted(Path(folder).iterdir()):
        kept = file.read_bytes()
        for kind, do in DAMAGES.items():
            topology.barrier()
            if topology.is_main:
                do(file)
            topology.barrier()
            found[f"{file.name} {kind}"] = damage(Path(folder), topology)
            topology.barrier()
            if topology.is_main:
                shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
                file.write_bytes(kept)
    return found


def test_any_damage_to_any_file_is_found_by_all_ranks(tmp_path, saved):
    folder = Path(shutil.copytree(saved / "checkpoint-20", tmp_path / "checkpoint-20"))
    first, second = run_ranks(2, faults_of, str(folder))
    assert first == second
    assert first.pop("none") is None
    assert len(first) == len(DAMAGES) * len(list(folder.iterdir())) >= 50
    unnamed = [case for case, fault in first.items() if not (fault or "").startswith(case.split()[0])]
    assert not unnamed


def test_the_newest_sound_checkpoint_is_taken(tmp_path, click_log, saved):
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    shutil.copytree(run / "checkpoint-20", run / "damaged-checkpoint-20")  # of an earlier resume
    flip(run / "checkpoint-20/tables-00001.safetensors")
    (run / "latest").write_bytes(b"\xff\x00checkpoint-")
    resumed = run_script("train.py", *flags(run, click_log), "--resume_from_checkpoint=true", ranks=2)
    assert resumed.status == 0, resumed.output
    fault = f"{run}/checkpoint-20: tables-00001.safetensors has other bytes than"
    assert fault in resumed.output
    assert f"Resuming from {run}/checkpoint-10, the newest one" in resumed.output
    assert losses(run) == losses(saved)
    assert fault.partition(": ")[2].split()[0] in os.listdir(run / "damaged-checkpoint-20-2")


def test_without_a_sound_one_the_run_ends_in_a_line(tmp_path, click_log, saved):
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    for step in (10, 20):
        os.truncate(run / f"checkpoint-{step}/mp_rank_00_model_states.pt", 0)
    for wanted in ("auto", str(run / "checkpoint-20")):
        done = run_script("train.py", *flags(run, click_log), f"--resume_from_checkpoint={wanted}", ranks=2)
        assert done.status == 1
        assert f"error: {run}/checkpoint-20: mp_rank_00_model_states.pt has 0 bytes, and " in done.output
        assert "Traceback" not in done.output


class RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("ranks", [2, 1])  # 1: resharded by DeepSpeed's converter, in a process of its own
def test_no_code_from_a_checkpoint_runs(tmp_path, click_log, saved, ranks):
    kinds = ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"]
    if ranks == 2:
        kinds.append("rank-00000.pt")
    for name in kinds:
        run, mark = tmp_path / name / "run", tmp_path / name / "mark"
        folder = Path(shutil.copytree(saved / "checkpoint-20", run / "checkpoint-20"))
        content = torch.load(folder / name, weights_only=False)
        torch.save(content | {"planted": RunsCode(mark)}, folder / name)
        with_right_digests(folder, name)
        batch = "--per_device_train_batch_size=48" if ranks == 1 else "--per_device_train_batch_size=24"
        wanted = ("--max_steps=25", "--resume_from_checkpoint=true", batch)
        done = run_script("train.py", *flags(run, click_log), *wanted, ranks=ranks)
        assert done.status != 0, done.output
        assert not mark.exists()
        assert "a file asks for code, which no checkpoint has" in done.output, done.output
        assert "Traceback" not in done.output


def with_right_digests(folder: Path, name: str) -> None:
    """As somebody would leave the state who planted the object."""
    state = json.loads((folder / STATE_FILE).read_text())
    file = folder / name
    state[FILES][name] = [file.stat().st_size, xxhash.xxh3_128_hexdigest(file.read_bytes())]
    (folder / STATE_FILE).write_text(json.dumps(sealed(state)))


def test_others_may_read_what_a_run_writes(saved):
    umask = os.umask(0)
    os.umask(umask)
    for file in (saved / "checkpoint-20").iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file


def test_a_second_run_in_the_folder_is_refused(tmp_path, click_log):
    run, mark = tmp_path / "run", tmp_path / "mark"
    second = []

    def start_second() -> bool:
        if not second and last_step(run) == 20:
            second.append(run_script("train.py", *flags(run, click_log, 0), "--overwrite_output_dir"))
            mark.touch()
        return False

    first = run_script("train.py", *flags(run, click_log, 0), kill_when=start_second, patch=WaitsFor(mark))
    assert first.status == 0, first.output
    assert second[0].status == 1
    assert f"error: output_dir {run} is in use by another run (on " in second[0].output
    assert run_script("train.py", *flags(run, click_log, 0), "--overwrite_output_dir").status == 0


class WaitsFor:
    """Before it is tested, the run waits for the mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __call__(self) -> None:
        right = finish.finish

        def waits(*arguments) -> None:
            while not self.mark.is_file():
                time.sleep(0.1)
            right(*arguments)

        finish.finish = waits
