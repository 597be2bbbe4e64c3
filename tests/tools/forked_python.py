"""Calls a tool as a user does, quickly: the process forks from a server that has imported torch and DeepSpeed."""

import os
import runpy
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT
from tests.ranks import CONTEXT


@dataclass(frozen=True)
class Finished:
    """What a tool left: its exit status and what it printed."""

    status: int
    stdout: str
    stderr: str


def call(tool: str, *arguments: object, as_module: bool = False, **environment: str) -> Finished:
    """`python tools/x.py …` in the repository's folder, or `python -m tools.x …`; tool: its path."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(each) for each in arguments]
        process = CONTEXT.Process(target=_run, args=(tool, arguments, as_module, environment, folder))
        process.start()
        process.join()
        stdout, stderr = (path.read_text() if path.is_file() else "" for path in map(Path(folder).joinpath, "oe"))
        return Finished(process.exitcode, stdout, stderr)


def _run(tool: str, arguments: list[str], as_module: bool, environment: dict[str, str], folder: str) -> None:
    os.environ |= environment
    for name, descriptor in (("o", 1), ("e", 2)):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(ROOT)
    # As Python does: a script's own folder comes first, or the folder that Python was called in for a module.
    elsewhere = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tools", ROOT / "tools/bench")]
    sys.path[:] = [str(ROOT if as_module else (ROOT / tool).parent), *elsewhere]
    for name in [name for name in sys.modules if name.split(".")[0] == "tools"]:
        del sys.modules[name]
    sys.argv = [tool, *arguments]
    if as_module:
        runpy.run_module(tool.removesuffix(".py").replace("/", "."), run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(tool, run_name="__main__")
