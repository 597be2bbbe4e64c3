"""Starts the ranks of a benchmark on this machine and reads what rank 0 writes.

Each rank runs the benchmark again, with the same arguments; `is_rank()` tells it so.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dhen.config.command_line import HelpFormatter
from dhen.runtime import topology as job
from dhen.runtime.topology import Topology
from tools.cluster import Cluster, ClusterError, wait

RETURN_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment of ranks whose memory is measured: one arena and small mmaps return freed memory at once."""
JOB_FILE, RESULTS_FILE = "job.json", "measured.json"
_TIMEOUT_MINUTES = 5


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows `description` as it is written. It accepts the --local_rank that launchers add."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def is_rank() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ


def run(
    arguments: argparse.Namespace,
    kind: type,
    measure: Callable[[Topology, argparse.Namespace], Any],
    present: Callable[[list[Any], argparse.Namespace], None],
    over: str = "depths",
) -> int:
    """Run a benchmark on a cluster, in a job for each value of an argument. Returns the exit status.

    On a rank, which has one value: join the job and call `measure`. Rank 0 writes what it returns to JOB_FILE in
    --output. Communicates; all ranks call it. In the process that the user started: write the dataclasses of type
    `kind` that the jobs return to RESULTS_FILE after each job, and call `present` in the end. The status is 2, with a
    message, if the cluster or a job on it fails.
    """
    if is_rank():
        topology = job.start(_TIMEOUT_MINUTES)
        results = measure(topology, arguments)
        if topology.is_main:
            write_json(arguments.output / JOB_FILE, results)
        job.stop()
        return 0
    results = []
    try:
        with Cluster.of(arguments) as cluster:
            for value in getattr(arguments, over):
                command = [*sys.argv, f"--{over}", str(value)]
                results += results_of_cluster(cluster, command, list[kind], arguments.output)
                write_json(arguments.output / RESULTS_FILE, results)
        present(results, arguments)
    except ClusterError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return 2
    return 0


def write_json(file: Path, values: Any) -> None:
    """Write values and dataclasses as JSON, in a folder that may be new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2, default=asdict) + "\n", encoding="utf-8")


def run_ranks(num_ranks: int) -> None:
    """Run this program on `num_ranks` ranks, with its arguments.

    Ends this process with the launcher's exit status if that is not 0.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    status = subprocess.run([*launcher, *sys.argv], env=environment).returncode
    if status:
        sys.exit(status)


def results_of_cluster(
    cluster: Cluster, command: Sequence[str], kind: Any, output: Path, *, may_fail: bool = False
) -> Any:
    """Run a benchmark on the cluster, and return what rank 0 writes to JOB_FILE in `output`, as the type `kind`.

    may_fail: running out of memory is a result. Raises ClusterError if there is no such file in the end, or if the job
    failed and may not.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / JOB_FILE
    file.unlink(missing_ok=True)
    status = wait(cluster.start(command))
    if not file.is_file() or (status and not may_fail):
        raise ClusterError(f"`{' '.join(command)}` failed with status {status}; the ranks' messages are above.")
    results = TypeAdapter(kind).validate_json(file.read_bytes())
    file.unlink()
    return results
