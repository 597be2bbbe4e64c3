"""The folder of compiled extensions: one an environment, where a killed build's lock stops nobody."""

import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.utils.file_baton import FileBaton

from dhen.runtime.extensions_cache import FOLDER, keep_extensions_apart


@pytest.fixture
def ours(tmp_path, monkeypatch) -> Path:
    """The environment's folder for extensions, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(FOLDER, raising=False)
    keep_extensions_apart()
    folder = Path(os.environ.pop(FOLDER))
    (folder / "cpu_adam").mkdir(parents=True)
    return folder


def make_old(lock: Path) -> None:
    os.utime(lock, (time.time() - 3600,) * 2)


def test_each_environment_has_its_own_folder_unless_the_user_names_one(ours, monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    keep_extensions_apart()
    assert os.environ[FOLDER] != str(ours)
    monkeypatch.setenv(FOLDER, "/the/users")
    keep_extensions_apart()
    assert os.environ[FOLDER] == "/the/users"


def test_the_lock_of_a_killed_build_is_removed_and_said(ours, caplog):
    lock = ours / "cpu_adam" / "lock"
    program = "import sys, time; from torch.utils.file_baton import FileBaton; FileBaton(sys.argv[1]).try_acquire(); "
    build = subprocess.Popen([sys.executable, "-c", program + "time.sleep(100)", str(lock)])
    while not lock.exists():
        time.sleep(0.05)
    make_old(lock)
    keep_extensions_apart()
    assert lock.exists(), "the build is alive"
    build.kill()
    build.wait()
    with caplog.at_level(logging.WARNING):
        keep_extensions_apart()
    assert not lock.exists()
    assert f"{lock}: removed" in caplog.text


def test_a_lock_that_is_held_or_young_stays(ours):
    held, young = FileBaton(str(ours / "cpu_adam" / "lock")), ours / "fused_adam" / "lock"
    assert held.try_acquire()
    make_old(Path(held.lock_file_path))
    young.parent.mkdir()
    young.touch()
    keep_extensions_apart()
    assert young.exists()
    held.release()  # raises where it is gone


def test_a_folder_that_the_user_named_is_only_reported(tmp_path, monkeypatch, caplog):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    make_old(lock)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with caplog.at_level(logging.WARNING):
        keep_extensions_apart()
    assert lock.exists()
    assert f"{lock}: no process on this machine holds this lock" in caplog.text


class Answer(OpBuilder):
    """An extension that compiles in a second, because it includes nothing of torch."""

    def __init__(self, source: Path) -> None:
        super().__init__("answer")
        self.source = source

    def absolute_name(self) -> str:
        return "answer"

    def sources(self) -> list[str]:
        return [str(self.source)]


def test_a_build_says_what_is_compiled_and_where_and_a_compiled_one_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    source = tmp_path / "answer.cpp"
    source.write_text(
        '#include <Python.h>\nstatic PyModuleDef module = {PyModuleDef_HEAD_INIT, "answer"};\n'
        "PyMODINIT_FUNC PyInit_answer() { return PyModule_Create(&module); }\n"
    )

    def messages() -> list[str]:
        caplog.clear()
        Answer(source).jit_load(verbose=False)
        return caplog.messages

    first, last = messages()
    assert first == f"compiling DeepSpeed's answer in {tmp_path / 'answer'}, once; this takes about a minute"
    assert re.fullmatch(r"compiled answer in \d+ s", last)
    assert messages() == []
    (tmp_path / "answer/answer.so").unlink()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert messages() == [], "the node's first rank says it"
