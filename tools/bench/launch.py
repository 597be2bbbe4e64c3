"""Starts the ranks of a benchmark on this machine and reads what rank 0 writes.

Each rank runs the benchmark's own file again, with the same arguments; `is_rank()` tells it so.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.cluster import Cluster, wait

RETURN_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment of ranks whose memory is measured: one arena and small mmaps return freed memory at once."""


class JobError(RuntimeError):
    """A job on the cluster failed; the message says which."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines, and shows each default that is a value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows `description` as it is written. It accepts the --local_rank that launchers add."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def is_rank() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ


def measure_as_a_rank(measure: Callable[..., Sequence[Any]], arguments: argparse.Namespace, file: Path) -> None:
    """Join the job and call `measure(topology, arguments)`; rank 0 writes the dataclasses that it returns to `file`.

    Communicates; all ranks call it.
    """
    from dhen.runtime import topology as job  # imports torch, which the process that only launches does not need

    topology = job.start()
    results = measure(topology, arguments)
    if topology.is_main:
        write_json(file, [asdict(result) for result in results])
    job.stop()


def write_json(file: Path, values: Any) -> None:
    """Write the values as JSON, in a folder that may be new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def run_ranks(num_ranks: int, script: str, *more: str, **environment: str) -> None:
    """Run `script` on `num_ranks` ranks, with this process's arguments and `more`, and `environment` on top of its own.

    Ends this process with the launcher's exit status if that is not 0.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    whole_environment = {"OMP_NUM_THREADS": "1"} | os.environ | environment
    status = subprocess.run([*launcher, script, *sys.argv[1:], *more], env=whole_environment).returncode
    if status:
        sys.exit(status)


def results_of_ranks(num_ranks: int, script: str, **environment: str) -> Any:
    """Run `script` as `run_ranks` does, and return the JSON that rank 0 writes to its --output."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        run_ranks(num_ranks, script, f"--output={output}", **environment)
        return json.loads(output.read_text(encoding="utf-8"))


def results_of_cluster(
    cluster: Cluster, command: Sequence[str], *, file: Path, job: str, may_fail: bool = False
) -> Any:
    """Run a script with its arguments on the cluster, and return the JSON that rank 0 writes to `file`.

    job: the job's name for the message. may_fail: running out of memory is a result. Raises JobError if there is no
    such file in the end, or if the job failed and may not.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    status = wait(cluster.start(command))
    if not file.is_file() or (status and not may_fail):
        raise JobError(f"{job} failed with status {status}; the ranks' messages are above.")
    results = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return results
