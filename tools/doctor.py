"""Checks this machine, and whether it reaches other nodes: one line per fact, and what to do if something is wrong.

    python tools/doctor.py --output_dir runs
    python tools/doctor.py --nodes node1,node2 --output report.json

The exit status is 1 if there is a problem.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import TextIO

try:
    import psutil
    import torch

    from dhen.paths import repository
except ImportError as error:
    sys.exit(f"problem | packages: {error}. Run pip install -r requirements.txt.")

_TESTED_PYTHONS = ("3.11", "3.12")
_LEAST_MEMORY_GIB, _LEAST_SHM_GIB, _LEAST_FILES = 4, 1, 1024
_SECONDS_TO_REACH, _MOST_CLOCK_SECONDS = 5, 2.0


@dataclass(frozen=True)
class Fact:
    """What was found. remedy: what to do about a warning or a problem."""

    name: str
    found: str
    status: str = "ok"
    remedy: str = ""


def _fact(name: str, found: str, is_right: object, remedy: str, status: str = "warning") -> Fact:
    return Fact(name, found) if is_right else Fact(name, found, status, remedy)


def main() -> int:
    """Exit status: 0, or 1 if there is a problem."""
    arguments = parse_arguments()
    try:
        output = arguments.output and _opened(arguments.output)
    except OSError as error:
        sys.exit(f"doctor: --output {arguments.output} cannot be written: {error.strerror}. Name another file.")
    facts, machine = [], _machine(arguments.output_dir, arguments.min_free_gib)
    for fact in itertools.chain(_software(), machine, _network(arguments.port, arguments.nodes)):
        facts.append(fact)
        print(f"{fact.status:>7} | {fact.name}: {fact.found}{fact.remedy and f'. {fact.remedy}.'}", flush=True)
    if output:
        with output:
            output.write(json.dumps([asdict(fact) for fact in facts], indent=2) + "\n")
    return int(any(fact.status == "problem" for fact in facts))


def _opened(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs"), help="where runs will be written; default: %(default)s")
    add("--min_free_gib", type=float, default=5.0, metavar="GIB", help="free space needed there; default: %(default)s")
    add("--port", type=int, default=os.environ.get("MASTER_PORT", 29500), help="of the job; default: %(default)s")
    add(
        "--nodes",
        type=lambda names: [name for name in names.split(",") if name],
        default=[],
        metavar="A,B",
        help="nodes to reach by ssh",
    )
    add("--hostfile", dest="nodes", type=_nodes_of, metavar="FILE", help="DeepSpeed's list of nodes to reach by ssh")
    add("--output", type=Path, metavar="FILE", help="also write the facts as JSON")
    return parser.parse_args()


def _nodes_of(hostfile: str) -> list[str]:
    lines = argparse.FileType()(hostfile).read().splitlines()
    return [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]


def _software() -> Iterator[Fact]:
    version, tested = platform.python_version(), " and ".join(_TESTED_PYTHONS)
    is_tested = version.rpartition(".")[0] in _TESTED_PYTHONS
    yield _fact("Python", f"{version}, {sys.executable}", is_tested, f"Tested are {tested}")
    file = (repository() or Path()) / f"requirements{'-cuda' if torch.version.cuda else ''}.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    pins = dict(line.split("==") for line in lines if re.fullmatch(r"[\w-]+==\S+", line))
    has = {name: next((each.version for each in distributions(name=name)), "missing") for name in pins}
    others = [f"{name} {has[name]} (tested: {pin})" for name, pin in pins.items() if has[name].split("+")[0] != pin]
    status, remedy = "problem" if "missing" in has.values() else "warning", f"Run pip install -r {file.name}"
    yield _fact("packages", ", ".join(others) or f"{len(pins)} have the tested versions", not others, remedy, status)
    try:
        from dhen.runtime import extensions_cache
        from dhen.runtime.environment import check_fbgemm

        check_fbgemm()
    except (ImportError, RuntimeError) as error:
        wrong, _, advice = str(error).rstrip(".").partition(". ")
        yield Fact("FBGEMM", wrong, "problem", advice or remedy)
    else:
        yield Fact("FBGEMM", f"belongs to torch {torch.__version__} and this device")
        folder = Path(os.environ[extensions_cache.FOLDER])
        locks = ", ".join(map(str, extensions_cache.dead_locks(folder)))
        found = f"no process holds {locks}" if locks else f"{len(list(folder.glob('*/*.so')))} built in {folder}"
        remedy = "Remove the lock, unless another machine is building there"
        yield _fact("extensions", found, not locks, remedy, "problem")
    tools = (shlex.split(os.environ.get("CXX", "c++"))[0], "ninja")
    missing = " and ".join(tool for tool in tools if not shutil.which(tool))
    remedy = "Install g++ and ninja: DeepSpeed compiles its optimizers at first use"
    yield _fact("compiler", f"no {missing}" if missing else " and ".join(tools), not missing, remedy, "problem")
    yield _gpus()


def _gpus() -> Fact:
    file = Path("/proc/driver/nvidia/version")
    driver = file.read_text(encoding="utf-8").split("  ")[1] if file.is_file() else "not there"
    found = f"torch {torch.__version__} sees none; the NVIDIA driver is {driver}"
    if torch.version.cuda and not torch.cuda.is_available():
        return Fact("GPUs", found, "warning", "Check nvidia-smi, or install requirements.txt to train on CPU")
    if not torch.version.cuda:
        return _fact("GPUs", found, not file.is_file(), "To use the GPU, install requirements-cuda.txt elsewhere")
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [f"{each.name}, {each.total_memory / 2**30:.0f} GiB, sm_{each.major}{each.minor}" for each in devices]
    built_for = " ".join(torch.cuda.get_arch_list())
    is_known = all(f"_{each.major}" in built_for for each in devices)
    remedy = f"This torch is built for {built_for}. Install another build"
    return _fact("GPUs", f"{'; '.join(names)}; driver {driver}", is_known, remedy, "problem")


def _machine(output_dir: Path, least_gib: float) -> Iterator[Fact]:
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "not set")
    is_right = not threads.isdecimal() or int(threads) <= cores
    remedy = f"Set it to {cores} / ranks on this node"
    yield _fact("CPU", f"{cores} cores; OMP_NUM_THREADS is {threads}", is_right, remedy)
    limits = [psutil.virtual_memory().total]
    with contextlib.suppress(ImportError, RuntimeError):  # the FBGEMM pair has its own line
        from dhen.runtime.machine_at_hand import host_bytes

        limits.append(host_bytes())
    free = min(psutil.virtual_memory().available, *limits) / 2**30
    found = f"{free:.1f} GiB free; this machine or container has {min(limits) / 2**30:.1f}"
    yield _fact("memory", found, free >= _LEAST_MEMORY_GIB, "End other processes, or raise the container's limit")
    size = shutil.disk_usage("/dev/shm").total / 2**30
    remedy = "NCCL needs it: start the container with --shm-size=8g or --ipc=host"
    yield _fact("/dev/shm", f"{size:.2f} GiB", size >= _LEAST_SHM_GIB, remedy)
    place = next(each for each in (output_dir.absolute(), *output_dir.absolute().parents) if each.exists())
    free, can_write = shutil.disk_usage(place).free / 2**30, place.is_dir() and os.access(place, os.W_OK)
    found = f"{free:.1f} GiB free in {place}{'' if can_write else ', which cannot be written to'}"
    remedy = f"Choose another --output_dir, or delete files until {least_gib:g} GiB are free"
    yield _fact("disk", found, free >= least_gib and can_write, remedy, "problem")
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield _fact("open files", f"at most {most}", most >= _LEAST_FILES or most < 0, f"Run ulimit -n {4 * _LEAST_FILES}")


def _network(port: int, nodes: list[str]) -> Iterator[Fact]:
    name, address = socket.gethostname(), ""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
    remedy = f"Add '127.0.0.1 {name}' to /etc/hosts, or set GLOO_SOCKET_IFNAME"
    yield _fact("host name", f"{name} is {address or 'without an address'}", address, remedy)
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("", port))
            yield Fact("port", f"{port} is free")
        except (OSError, OverflowError) as error:
            yield Fact("port", f"{port}: {str(error).rstrip('.')}", "problem", "Use another --master_port")
    if not nodes:
        yield Fact("nodes", "not checked. Name them with --nodes or --hostfile", "skipped")
    with ThreadPoolExecutor() as threads:
        yield from threads.map(_reach, nodes)


def _reach(node: str) -> Fact:
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SECONDS_TO_REACH}", node, "date +%s.%N"]
    before = time.time()
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:  # sends nothing
            one.connect((node, 9))
            own = one.getsockname()[0]
        there = float(subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        remedy = "Check the name and ssh without a password, or start every node by itself with --no_ssh or torchrun"
        return Fact(f"node {node}", why, "problem", remedy)
    off = max(before - there, there - time.time(), 0.0)
    interface = next(
        (name for name, some in psutil.net_if_addrs().items() if own in (each.address for each in some)), own
    )
    found = f"reached; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME: {interface}; its clock is {off:.1f} s off"
    return _fact(f"node {node}", found, off <= _MOST_CLOCK_SECONDS, "Synchronize the clocks, for example by chrony")


if __name__ == "__main__":
    sys.exit(main())
