"""Where a run took place: versions, machine, command and commit, for environment.json in the run folder."""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dhen
from dhen.paths import repository
from dhen.runtime.environment import FBGEMM_PACKAGES, installed_versions
from dhen.runtime.topology import Topology

PACKAGES = (
    "torch", "deepspeed", *FBGEMM_PACKAGES, "transformers", "huggingface-hub", "accelerate", "datasets", "numpy",
    "pyarrow", "polars", "safetensors", "pydantic",
)  # fmt: skip
_CPU_INFO = Path("/proc/cpuinfo")
_GIT_SECONDS = 10


def describe_environment(topology: Topology) -> dict[str, Any]:
    """The environment of this process, in JSON types. Rank 0 calls it; host, CPU and GPUs are those of its node.

    A fact that cannot be found is None, so this never fails a run.
    """
    facts: dict[str, Callable[[], Any]] = {
        "command": lambda: shlex.join(sys.argv),
        "git": _git,
        "python": platform.python_version,
        # torch's own text says its build: 2.13.0+cpu
        "versions": lambda: {"dhen": dhen.__version__} | installed_versions(PACKAGES) | {"torch": torch.__version__},
        "cuda": lambda: torch.version.cuda,
        "platform": platform.platform,
        "host": platform.node,
        "cpu": _cpu_name,
        "cpu_count": os.cpu_count,
        "gpus": lambda: [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "device": lambda: topology.device.type,
        "world_size": lambda: topology.world_size,
        "ranks_per_node": lambda: topology.local_size,
    }
    found = dict.fromkeys(facts)
    for name, find in facts.items():
        with contextlib.suppress(Exception):  # no fact communicates, so a failure leaves no other rank waiting
            found[name] = find()
    return found


def _cpu_name() -> str:
    """The model as Linux knows it, such as "AMD EPYC 7763"; elsewhere the architecture."""
    lines = _CPU_INFO.read_text(encoding="utf-8").splitlines() if _CPU_INFO.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _git(folder: Path | None = None) -> dict[str, Any] | None:
    """Commit of the checkout and whether its tracked files differ from it; None outside a git repository.

    folder: by default the checkout that this code, or the script, runs from.
    """
    folder = folder or repository()
    if folder is None:
        return None

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
        return done.stdout.strip()

    # The second name fails if the folder is untracked inside another repository, which does not track it.
    commit, _ = git("rev-parse", "HEAD", "HEAD:./").splitlines()
    return {"commit": commit, "is_dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", "."))}
