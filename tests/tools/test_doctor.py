"""tools/doctor.py: this machine is fine; each thing that is broken is a problem with its remedy."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests import ROOT


def doctor(*flags: object, **environment: str) -> tuple[int, dict[str, str], str]:
    """(exit status, line by name of its fact, stderr), from a process of its own."""
    command = [sys.executable, "tools/doctor.py", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    lines = [line.split(" | ", 1) for line in done.stdout.splitlines()]
    return (
        done.returncode,
        {fact.partition(": ")[0]: f"{status.strip()}: {fact}" for status, fact in lines},
        done.stderr,
    )


@pytest.fixture
def taken():
    """A port that another process uses."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


def test_this_machine_is_fine(tmp_path):
    status, lines, errors = doctor(f"--output={tmp_path / 'report.json'}", f"--output_dir={tmp_path}", "--port=0")
    assert status == 0, (lines, errors)
    assert not errors
    report = json.loads((tmp_path / "report.json").read_text())
    assert [fact["name"] for fact in report] == list(lines)
    assert {"Python", "packages", "FBGEMM", "extensions", "compiler", "GPUs", "CPU", "memory", "disk", "open files",
            "host name", "port", "nodes"} <= set(lines)  # fmt: skip
    assert {fact["name"] for fact in report if fact["status"] == "skipped"} == {"nodes"}
    assert all(fact["status"] != "problem" for fact in report)
    assert all(bool(fact["remedy"]) == (fact["status"] == "warning") for fact in report)


def test_what_is_broken_is_a_problem_with_its_remedy(tmp_path, taken):
    other_build = tmp_path / "fbgemm_gpu-1.8.0.dist-info"
    other_build.mkdir()
    (other_build / "METADATA").write_text("Metadata-Version: 2.1\nName: fbgemm-gpu\nVersion: 1.8.0\n")
    status, lines, errors = doctor(
        "--min_free_gib=1e9", f"--output_dir={tmp_path / 'runs'}", "--nodes=nowhere.invalid",
        PATH="", PYTHONPATH=f"{ROOT}:{tmp_path}", MASTER_PORT=str(taken), OMP_NUM_THREADS="4096",
    )  # fmt: skip
    assert status == 1, errors
    wanted = {
        "FBGEMM": ("problem", "both installed", "Uninstall both"),
        "compiler": ("problem", "no c++", "Install g++ and ninja"),
        "disk": ("problem", "GiB free", str(tmp_path), "delete files"),
        "port": ("problem", str(taken), "Use another --master_port"),
        "node nowhere.invalid": ("problem", "Check the name", "--no_ssh"),
        "CPU": ("warning", "OMP_NUM_THREADS is 4096", "ranks on this node"),
    }
    for name, words in wanted.items():
        assert all(word in lines[name] for word in words), lines[name]
    assert lines["packages"].startswith("ok: "), "the others are as they were"


def test_a_lock_that_nothing_holds_and_a_missing_hostfile_are_found(tmp_path):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    status, lines, _ = doctor("--port=0", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert status == 1
    assert lines["extensions"].startswith(f"problem: extensions: no process holds {lock}. Remove the lock")
    status, _, errors = doctor(f"--hostfile={tmp_path / 'none'}")
    assert status == 2
    assert "none" in errors


def test_a_report_that_cannot_be_written_is_said_before_any_check(tmp_path):
    status, lines, errors = doctor(f"--output={tmp_path}")
    assert (status, lines) == (1, {})
    assert errors == f"doctor: --output {tmp_path} cannot be written: Is a directory. Name another file.\n"
