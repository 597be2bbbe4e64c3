"""Set-up before DeepSpeed and FBGEMM are imported: accelerator, matching versions, silenced warnings.

Importing `dhen.runtime` runs `prepare_environment`. Packages that use DeepSpeed or FBGEMM import it first. Only
`dhen.tables` uses FBGEMM and calls `check_fbgemm`, so the dense part runs where FBGEMM is not installed.
"""

import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from dhen.runtime.extensions_cache import announce_builds, keep_extensions_apart

FBGEMM_PACKAGES = ("fbgemm-gpu", "fbgemm-gpu-cpu")
FIRST_MINOR_OFFSET = 5  # FBGEMM 1.m is built against torch 2.(m + 5): 1.6 with 2.11, 1.8 with 2.13


class EnvironmentMismatchError(RuntimeError):
    """The installed packages do not work together."""


def prepare_environment() -> None:
    """Set the variables DeepSpeed reads at import, and silence useless warnings. Idempotent."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # NCCL's flight recorder keeps the last collectives of each rank, and writes them to a file if one times out.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    _put_scripts_on_path()
    keep_extensions_apart()
    _silence()
    announce_builds()


def check_fbgemm() -> None:
    """Raise EnvironmentMismatchError unless exactly one FBGEMM is installed, built for this torch and this device."""
    _check_fbgemm(installed_versions(FBGEMM_PACKAGES), torch.__version__, os.environ["DS_ACCELERATOR"])


def _put_scripts_on_path() -> None:
    """Let DeepSpeed find `ninja` if the virtual environment's Python was called by its path, without activation."""
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {package: list(importlib.metadata.distributions(name=package)) for package in packages}
    return {package: installed[0].version for package, installed in found.items() if installed}


def _check_fbgemm(installed: dict[str, str], torch_version: str, accelerator: str) -> None:
    torch_minor = int(torch_version.split(".")[1])
    wanted = f"1.{torch_minor - FIRST_MINOR_OFFSET}"
    advice = f"Install either fbgemm-gpu-cpu=={wanted}.0 (CPU) or fbgemm-gpu=={wanted}.0 (GPU) for this torch."
    if not installed:
        raise EnvironmentMismatchError(f"FBGEMM is not installed; torch is {torch_version}. {advice}")
    if len(installed) > 1:
        raise EnvironmentMismatchError(
            f"{' and '.join(installed)} are both installed and overwrite each other's files. Uninstall both. {advice}"
        )
    ((package, version),) = installed.items()
    if not version.startswith(wanted + "."):
        raise EnvironmentMismatchError(f"{package} {version} was not built for torch {torch_version}. {advice}")
    if accelerator == "cuda" and package == "fbgemm-gpu-cpu":
        raise EnvironmentMismatchError(
            f"This machine has a GPU, but {package} runs on CPU only. Install requirements-cuda.txt in a new "
            "environment, or set DS_ACCELERATOR=cpu to run without the GPU."
        )


def _silence() -> None:
    """Silence what DeepSpeed and torch print on every run and a user cannot act on."""
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*deprecated.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    import deepspeed

    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    # DeepSpeed compiles its shared-memory all-reduce (26 s) whenever a process group starts. Training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
