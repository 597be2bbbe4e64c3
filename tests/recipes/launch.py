"""Starts the recipes' scripts on several ranks, quickly: the processes fork from a server that has imported everything.

test_launchers.py starts them by the real launchers; all else that a script promises is tested through here.
"""

import contextlib
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dhen.data.preparation.caching import prepare_cached
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.synthetic import generate_click_log
from tests import ROOT
from tests.ranks import CONTEXT, free_port, rank_environment

TINY = (
    "--embedding_dim=4", "--num_layers=1", "--num_embeddings_out=4", "--logging_steps=1", "--warmup_steps=2",
    "--num_train_epochs=1", "--lr_scheduler_type=constant",
)  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """What a script left: its exit status and what rank 0 (and errors of others) printed."""

    status: int
    output: str
    statuses: frozenset[int] = frozenset()
    """Of all ranks."""


def run_script(
    script: str,
    *flags: str,
    ranks: int = 1,
    nodes: int = 1,
    port: int | None = None,
    kill_when: Callable[[], bool] | None = None,
    killed_rank: int | None = None,
    send: Callable[[list[int]], None] | None = None,
    patch: Callable | None = None,
) -> Finished:
    """Run recipes/<script> to its end, or until `kill_when` says to kill all ranks (SIGKILL), or `killed_rank` alone.

    nodes: that the ranks behave as if they were on. port: of the job, by default a free one. send: called with the
    processes' numbers in place of killing; then all ranks shall end by themselves. patch: called in each process before
    the script.
    """
    port = port or free_port()
    log = Path(os.environ["PYTEST_TMP"]) / f"{port}-{time.monotonic_ns()}.log"
    processes = [
        CONTEXT.Process(
            target=_run, args=(script, flags, rank_environment(rank, ranks, port, ranks // nodes), str(log), patch)
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 240
    while any(process.is_alive() for process in processes):
        if send is not None and kill_when():
            send([process.pid for process in processes])
            for process in processes:
                process.join(60)
        if killed_rank is not None and kill_when():
            processes[killed_rank].kill()
            processes[killed_rank].join()
            for process in processes:  # the others shall end by themselves
                process.join(60)
        failed = any(process.exitcode not in (None, 0) for process in processes)
        if failed or time.monotonic() > deadline or (kill_when is not None and killed_rank is None and kill_when()):
            time.sleep(0.5 if failed else 0)  # let the others print their errors
            for process in processes:
                process.kill()
        time.sleep(0.02)
    for process in processes:
        process.join()
    status = next((process.exitcode for process in processes if process.exitcode), 0)
    statuses = frozenset(process.exitcode for process in processes)
    return Finished(status, log.read_text() if log.is_file() else "", statuses)


def _run(script: str, flags: tuple[str, ...], environment: dict[str, str], log: str, patch: Callable | None) -> None:
    os.environ |= environment
    torch.set_num_threads(1)  # torch read OMP_NUM_THREADS in the server; idle OpenMP threads would spin
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.chdir(ROOT)
    sys.argv = [script, *flags]
    if patch is not None:
        patch()
    runpy.run_path(str(ROOT / "recipes" / script), run_name="__main__")


def prepared_click_log(folder: Path, rows: int = 640) -> Path:
    """A small prepared click log of Criteo's shape."""
    generate_click_log(folder / "raw", {"train": rows, "validation": 200, "test": 300})
    files = {f"{split}_file": str(folder / "raw" / f"{split}.tsv.gz") for split in ("train", "validation", "test")}
    settings = PreparationSettings(**files, dataset_format="criteo", id_encoding="vocabulary")
    return prepare_cached(settings, folder / "prepared")


def summary(run: Path) -> dict:
    """summary.json of a run folder."""
    return json.loads((run / "summary.json").read_text())


def assert_same_metrics(found: dict, expected: dict, tolerance: float) -> None:
    """Equal metrics within the relative tolerance, and equal shares of unseen values, unless `expected` lacks them."""
    shares = expected.get("unseen", found["unseen"])
    assert found["unseen"] == pytest.approx(shares, rel=tolerance)
    rest = {key: value for key, value in found.items() if key != "unseen"}
    assert rest == pytest.approx({key: value for key, value in expected.items() if key != "unseen"}, rel=tolerance)


def losses(run: Path, split: str = "train") -> dict[int, str]:
    """Step -> loss as it stands in metrics.csv, to the last digit."""
    lines = (run / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    return {int(row["step"]): row["loss"] for row in rows if row["split"] == split}


def last_step(run: Path) -> int:
    """The last step that metrics.csv has, 0 before the first."""
    with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
        return int((run / "metrics.csv").read_text().splitlines()[-1].split(",")[0])
    return 0
