"""The folder of compiled extensions: one an environment, where a killed build's lock stops nobody."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
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
