"""Checks this project on one GPU in about ten minutes, and prints one table of what it measured.

    python tools/gpu_check.py
    python tools/gpu_check.py --only machine dense

Parts, in this order. Each is a process of its own, with a time limit, and its results are written as they come, to
`<part>.jsonl` in --output. A part that fails is reported, and the others still run.

machine      rates of matrix products and copies; the other parts are compared with them
dense        the dense step in bf16: 200 embeddings of dimension 128, 1 to 16 layers, as written and compiled
time         where the time of that step goes, by kind of kernel
activations  its time and memory if activations are kept, recomputed, or offloaded
tables       the tables' lookups and updates, as a share of the copy's bandwidth
dcn          training steps of a DCN-V2 on Criteo's 26 tables
memory       predicted and measured peak memory, by ds_config
quickstart   the quickstart, to its normalized entropy
tests        the tests marked `gpu`

The first four do not need FBGEMM. Nothing needs a network. On a machine without a GPU,
--size tiny runs the same code on the CPU; its figures mean nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that a call by path finds tools.bench

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tools.bench.gpu_dense import (
    FULL,
    TINY,
    measure_activations,
    measure_dense,
    measure_machine,
    measure_time,
)
from tools.markdown import head, row

ROOT = Path(__file__).resolve().parents[1]

SIZES = {"full": FULL, "tiny": TINY}
SECONDS = {
    "machine": 60, "dense": 200, "time": 60, "activations": 60, "tables": 90, "dcn": 120, "memory": 120,
    "quickstart": 120, "tests": 240,
}  # fmt: skip
"""The parts, and the seconds after which each is ended at the full size: a machine with a GPU is paid by the hour."""
WITHOUT_FBGEMM = {
    "machine": measure_machine, "dense": measure_dense, "time": measure_time, "activations": measure_activations,
}  # fmt: skip
_NOT_SHOWN = ("part", "case", "size", "slowest", "parts")
_PACKAGES = ("torch", "fbgemm-gpu", "fbgemm-gpu-cpu", "deepspeed", "triton")


@dataclass(frozen=True)
class Goal:
    """What a figure of a part should reach. case: the case that is meant; "" for the best of all."""

    what: str
    part: str
    case: str
    figure: str
    least: float

    def reached(self, results: Sequence[dict[str, Any]]) -> float | None:
        """The figure; None if it was not measured."""
        values = [
            result[self.figure]
            for result in results
            if result["part"] == self.part and result.get(self.figure) is not None and self.case in result["case"]
        ]
        return max(values, default=None)


GOALS = (
    Goal("dense step in bf16, share of the matrix products' rate", "dense", "", "share of peak", 0.4),
    Goal("tables, share of the copy's bandwidth", "tables", "FBGEMM", "share of copy", 0.6),
    Goal("DCN-V2 on Criteo's tables, samples/s", "dcn", "one id", "samples/s", 0.5e6),
)


def run_part(part: str, arguments: argparse.Namespace) -> None:
    """Measure one part in this process, and append each result to its file."""
    size, output = SIZES[arguments.size], arguments.output / f"{part}.jsonl"
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    def report(case: str, **figures: Any) -> None:
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": part, "case": case, "size": arguments.size, **figures}) + "\n")

    rates = next((each for each in read_results(arguments.output, arguments.size) if each["part"] == "machine"), {})
    if part in WITHOUT_FBGEMM:
        WITHOUT_FBGEMM[part](size, device, rates, report)
    elif part == "quickstart":
        run_quickstart(arguments.output, report, is_tiny=arguments.size == "tiny")
    elif part == "tests":
        run_tests(report)
    else:
        from dhen.runtime import topology as job
        from tools.bench import gpu_tables

        measure = getattr(gpu_tables, f"measure_{part}")
        measure(size, job.start(), rates, report)
        job.stop()


def run_quickstart(output: Path, report: Any, *, is_tiny: bool) -> None:
    """Train the quickstart on this device, with the global batch of its two ranks, and report its metrics."""
    folder = output / "quickstart"
    command = [sys.executable, str(ROOT / "recipes/train.py"), f"--ds_config={ROOT / 'ds_configs/zero2.json'}"]
    command += [f"--output_dir={folder}", "--overwrite_output_dir", "--per_device_train_batch_size=2048"]
    start = time.perf_counter()
    subprocess.run([*command, *(["--max_steps=3"] if is_tiny else [])], check=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    test = summary["test"]
    above = {"above the best possible": test["ne"] / test["best_possible_ne"] - 1}
    report("2,048 examples per step", ne=test["ne"], auc=test["auc"], **above, s=time.perf_counter() - start)


def run_tests(report: Any) -> None:
    """Run the tests marked `gpu`, file by file, and report how each ends. Raises RuntimeError if one fails."""
    failed = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "mark.gpu" not in path.read_text(encoding="utf-8"):
            continue
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "--tb=short", str(path)]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        name = str(path.relative_to(ROOT))
        print(done.stdout, file=sys.stderr)
        last = [line for line in done.stdout.splitlines() if line.strip()][-1:]
        report(name, ends=last[0] if last else done.stderr[-200:], s=time.perf_counter() - start)
        if done.returncode:
            failed.append(name)
    if failed:
        raise RuntimeError(f"tests failed in {', '.join(failed)}")


def run_parts(arguments: argparse.Namespace) -> list[str]:
    """Run the parts, each in a process of its own with its time limit. Returns the failures, in a line each."""
    failures = []
    for part in arguments.only:
        (arguments.output / f"{part}.jsonl").unlink(missing_ok=True)
        options = [f"--part={part}", f"--size={arguments.size}", f"--output={arguments.output}"]
        print(f"{part} …", file=sys.stderr, flush=True)
        log = arguments.output / f"{part}.log"
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, __file__, *options], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            status = process.wait(SECONDS[part] if arguments.size == "full" else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own processes too
            process.wait()
            failures.append(f"{part}: ended after {SECONDS[part]} s")
            continue
        if status:
            text = log.read_text(encoding="utf-8", errors="replace").strip() or "no message"
            failures.append(f"{part}: failed with status {status}: {text.splitlines()[-1][:300]} ({log})")
    return failures


def read_results(output: Path, size: str) -> list[dict[str, Any]]:
    """The results of this size in a folder, by part."""
    files = [output / f"{part}.jsonl" for part in SECONDS]
    lines = [line for file in files if file.is_file() for line in file.read_text(encoding="utf-8").splitlines()]
    return [result for result in map(json.loads, lines) if result["size"] == size]


def machine() -> str:
    """The device and the versions, in a line."""
    from importlib.metadata import distributions

    versions = {each.metadata["Name"].lower().replace("_", "-"): each.version for each in distributions()}
    found = ", ".join(f"{package} {versions[package]}" for package in _PACKAGES if package in versions)
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine()
    return f"{name}; Python {platform.python_version()}, {found}"


def shown(value: Any) -> str:
    """A figure for the table.

    >>> shown(0.123456), shown(12345.6), shown(None), shown("text")
    ('0.123', '12,346', '-', 'text')
    """
    if value is None:
        return "-"
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def lines_of(results: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """A row of the table for each result."""
    for result in results:
        figures = [f"{name} {shown(value)}" for name, value in result.items() if name not in _NOT_SHOWN]
        yield [result["part"], result["case"], "; ".join(figures)]


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", default=list(SECONDS), choices=SECONDS, metavar="PART", help="parts to run (default: all)")
    add("--size", default="full", choices=SIZES, help="tiny: to test the program on any machine (default: %(default)s)")
    add("--output", type=Path, default="runs/gpu_check", help="folder of the results (default: %(default)s)")
    add("--part", choices=SECONDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(command_line)
    arguments.output = arguments.output.resolve()
    return arguments


def main() -> int:
    """Run the parts and show all results. Exit status: 0, 1 if a part failed, or 2 without a GPU at the full size."""
    arguments = parse_arguments()
    if arguments.part:
        run_part(arguments.part, arguments)
        return 0
    if arguments.size == "full" and not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU here. --size tiny runs the same on the CPU.", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    failures = run_parts(arguments)
    results = read_results(arguments.output, arguments.size)
    failed = [result for result in results if "error" in result and result["part"] in arguments.only]
    failures += [f"{result['part']}, {result['case']}: {result['error']}" for result in failed]
    reached = {goal.what: goal.reached(results) for goal in GOALS}
    whole = {"machine": machine(), "results": results, "goals": reached, "failures": failures}
    (arguments.output / "results.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"{whole['machine']}\n")
    print("\n".join([*head(["part", "case", "figures"]), *map(row, lines_of(results))]))
    for goal in GOALS:
        print(f"{goal.what}: {shown(reached[goal.what])}; goal {shown(goal.least)}")
    for failure in failures:
        print(f"FAILED {failure}")
    if others := sorted({result["part"] for result in results} - set(arguments.only)):
        print(f"Of an earlier call: {', '.join(others)}")
    print(f"{arguments.output / 'results.json'} has all of it, measured in {time.perf_counter() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
