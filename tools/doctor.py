"""Checks this machine, and whether it reaches other nodes: one line per fact, and what to do if something is wrong.

    python tools/doctor.py --output_dir runs
    python tools/doctor.py --nodes node1,node2 --output report.json

The exit status is 1 if there is a problem.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
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

    def unless(self, is_right: object, remedy: str, status: str = "warning") -> "Fact":
        """The fact, with this status and remedy if it is not right."""
        return self if is_right else Fact(self.name, self.found, status, remedy)


def main() -> int:
    """Exit status: 0, or 1 if there is a problem."""
    arguments = parse_arguments()
    facts = []
    for part in (_software(), _machine(arguments), _network(arguments)):
        for fact in part:
            facts.append(fact)
            print(f"{fact.status:>7} | {fact.name}: {fact.found}{fact.remedy and f'. {fact.remedy}.'}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(fact) for fact in facts], indent=2) + "\n", encoding="utf-8")
    return int(any(fact.status == "problem" for fact in facts))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs"), help="where runs will be written; default: %(default)s")
    add("--min_free_gib", type=float, default=5.0, metavar="GIB", help="free space needed there; default: %(default)s")
    add("--port", type=int, default=os.environ.get("MASTER_PORT", 29500), help="of the job; default: %(default)s")
    add("--nodes", type=lambda names: names.split(","), default=[], metavar="A,B", help="nodes to reach by ssh")
    add("--hostfile", type=argparse.FileType(), metavar="FILE", help="DeepSpeed's list of nodes to reach by ssh")
    add("--output", type=Path, metavar="FILE", help="also write the facts as JSON")
    return parser.parse_args()


def _software() -> Iterator[Fact]:
    version = platform.python_version()
    is_tested = version.rpartition(".")[0] in _TESTED_PYTHONS
    yield Fact("Python", f"{version}, {sys.executable}").unless(is_tested, f"Tested: {', '.join(_TESTED_PYTHONS)}")
    file = f"requirements{'-cuda' if torch.version.cuda else ''}.txt"
    text = ((repository() or Path()) / file).read_text(encoding="utf-8") if repository() else ""
    pins = dict(line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    found = {name: next((each.version for each in distributions(name=name)), "missing") for name in pins}
    others = [f"{n} {found[n]} (tested: {pin})" for n, pin in pins.items() if found[n].partition("+")[0] != pin]
    versions = ", ".join(others) or f"{len(pins)} as tested, such as deepspeed {found.get('deepspeed')}"
    status = "problem" if "missing" in found.values() else "warning"
    yield Fact("packages", versions).unless(not others, f"Run pip install -r {file}", status)
    try:
        from dhen.runtime import extensions_cache  # checks that FBGEMM, torch and the device belong together
    except (ImportError, RuntimeError) as error:
        wrong, _, remedy = str(error).rstrip(".").partition(". ")
        yield Fact("FBGEMM", wrong, "problem", remedy or f"Run pip install -r {file}")
    else:
        yield Fact("FBGEMM", f"belongs to torch {torch.__version__} and this device")
        folder = Path(os.environ[extensions_cache.FOLDER])
        built = [path.parent.name for path in folder.glob("*/*.so")]
        locks = ", ".join(map(str, extensions_cache.dead_locks(folder)))
        fact = Fact("extensions", f"{locks} is held by no process" if locks else f"{len(built)} built in {folder}")
        yield fact.unless(not locks, "Remove the file, unless another machine is building there", "problem")
    tools = (os.environ.get("CXX", "c++"), "ninja")
    missing = [tool for tool in tools if not shutil.which(tool)]
    fact = Fact("compiler", f"{' and '.join(missing or tools)} {'not ' * bool(missing)}found")
    yield fact.unless(not missing, "Install g++ and ninja: DeepSpeed compiles its optimizers at first use", "problem")
    yield _gpus()


def _gpus() -> Fact:
    driver = Path("/proc/driver/nvidia/version")
    version = driver.read_text(encoding="utf-8").split("  ")[1] if driver.is_file() else None
    if not torch.cuda.is_available():
        fact = Fact("GPUs", f"torch {torch.__version__} sees none; the NVIDIA driver is {version or 'not there'}")
        fact = fact.unless(not version, "Install requirements-cuda.txt in a new environment to use the GPU")
        return fact.unless(not torch.version.cuda, "Check nvidia-smi and the driver, or install requirements.txt")
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [f"{each.name}, {each.total_memory / 2**30:.0f} GiB, sm_{each.major}{each.minor}" for each in devices]
    built_for = " ".join(torch.cuda.get_arch_list())
    is_known = all(f"_{each.major}" in built_for for each in devices)
    fact = Fact("GPUs", f"{'; '.join(names)}; driver {version}")
    return fact.unless(is_known, f"This torch is built for {built_for}. Install another build", "problem")


def _machine(arguments: argparse.Namespace) -> Iterator[Fact]:
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    fact = Fact("CPU", f"{cores} cores; OMP_NUM_THREADS is {threads or 'not set'}")
    yield fact.unless(not threads.isdecimal() or int(threads) <= cores, f"Set it to {cores} / ranks on this node")
    has, limit = psutil.virtual_memory(), psutil.virtual_memory().total
    if "dhen.runtime" in sys.modules:
        from dhen.runtime.machine_at_hand import host_bytes

        limit = host_bytes()
    free, limit = min(has.available, limit) / 2**30, limit / 2**30
    fact = Fact("memory", f"{free:.1f} GiB free; the limit of this machine or container is {limit:.1f} GiB")
    yield fact.unless(free >= _LEAST_MEMORY_GIB, "End other processes, or raise the container's limit")
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total / 2**30
        remedy = "NCCL needs it. Start the container with --shm-size=8g or --ipc=host"
        yield Fact("/dev/shm", f"{size:.2f} GiB").unless(size >= _LEAST_SHM_GIB, remedy)
    folder = arguments.output_dir.absolute()
    place = next(each for each in (folder, *folder.parents) if each.is_dir())
    free, least = shutil.disk_usage(place).free / 2**30, arguments.min_free_gib
    fact = Fact("disk", f"{free:.1f} GiB free in {place}")
    fact = fact.unless(free >= least, f"A run may need {least:g} GiB: delete files, or use another disk", "problem")
    yield fact.unless(os.access(place, os.W_OK), "It cannot be written to: choose another --output_dir", "problem")
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    fact = Fact("open files", f"at most {most}")
    yield fact.unless(most >= _LEAST_FILES or most < 0, f"Run ulimit -n {4 * _LEAST_FILES}")


def _network(arguments: argparse.Namespace) -> Iterator[Fact]:
    name, address = socket.gethostname(), ""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
    fact = Fact("host name", f"{name} is {address or 'without an address'}")
    yield fact.unless(address, f"Add '127.0.0.1 {name}' to /etc/hosts, or set GLOO_SOCKET_IFNAME")
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("", arguments.port))
            yield Fact("port", f"{arguments.port} is free")
        except (OSError, OverflowError) as error:
            yield Fact("port", f"{arguments.port}: {str(error).rstrip('.')}", "problem", "Use another --master_port")
    lines = arguments.hostfile.read().splitlines() if arguments.hostfile else []
    nodes = arguments.nodes + [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
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
        done = subprocess.run(command, capture_output=True, text=True, timeout=4 * _SECONDS_TO_REACH, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        remedy = "Check the name and ssh without a password, or start every node by itself with --no_ssh or torchrun"
        return Fact(f"node {node}", why, "problem", remedy)
    off = max(before - float(done.stdout), float(done.stdout) - time.time(), 0.0)
    by_address = {each.address: name for name, some in psutil.net_if_addrs().items() for each in some}
    there = by_address.get(own, own)
    fact = Fact(f"node {node}", f"reached; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME: {there}; clock {off:.1f} s off")
    return fact.unless(off <= _MOST_CLOCK_SECONDS, "Synchronize the clocks, for example by chrony")


if __name__ == "__main__":
    sys.exit(main())
