"""A cluster on one machine: network namespaces as nodes, links with limited rates, the real launcher in each node.

    python tools/cluster.py --nodes 2 --ranks_per_node 2 recipes/train.py --ds_config ds_configs/hsdp.json

Each node is a network namespace with its own address. Veth pairs and a bridge connect the nodes. `tc tbf` limits each
node's link in both directions, and its loopback, which the ranks of one node use. By default the loopback is 24 times
faster, as NVLink is beside RoCE in the paper. All ranks of a node share its link, as on a real host. Each node runs
DeepSpeed's launcher (`deepspeed --no_ssh --hostfile …`), as a real node does.

The tool needs root, iproute2 (ip, tc), and the kernel's veth, bridge and tbf. It removes the namespaces when the script
ends and after a signal. If it is killed, its next run removes what is left.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

PREFIX = "dhen"
INTERFACE = "eth0"
_GRACE_SECONDS = 20.0
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# A link's burst after a pause: seconds of its rate, and at least so many bytes; then its queue. Shorter bursts do not
# reach the rate. Packets larger than the burst are lost: loopback packets have up to 64 KiB.
_LINK, _LOCAL = (0.010, 2**12, "4mb"), (0.0035, 2**17, "16mb")


class ClusterError(RuntimeError):
    """The cluster cannot be built on this machine; the message says what is missing."""


class Cluster:
    """Nodes 0 to n-1, which exist inside a `with` block. Rates are in Mbit/s; 0 leaves a link unlimited.

    Inside the block SIGTERM and SIGHUP raise SystemExit, so that the nodes are removed.
    """

    def __init__(
        self, nodes: int, *, ranks_per_node: int = 2, link_mbit: float = 100, local_mbit: float = 2400
    ) -> None:
        self.num_nodes, self.ranks_per_node = nodes, ranks_per_node
        self.link_mbit, self.local_mbit = link_mbit, local_mbit
        name = f"{PREFIX}{os.getpid()}"
        self.names, self._hub = [f"{name}-node{node}" for node in range(nodes)], f"{name}-hub"  # namespaces
        self._hosts = Path(tempfile.gettempdir()) / f"{name}-hostfile"
        self._handlers: dict[int, Any] = {}  # those of before the block

    @classmethod
    def of(cls, arguments: argparse.Namespace, *, is_limited: bool = True) -> "Cluster":
        """The cluster of `add_arguments`; without limits, on links as fast as they can be."""
        rates = (arguments.link_mbit, arguments.local_mbit) if is_limited else (0, 0)
        return cls(arguments.nodes, ranks_per_node=arguments.ranks_per_node, link_mbit=rates[0], local_mbit=rates[1])

    def address(self, node: int) -> str:
        """The node's address."""
        return f"10.77.0.{node + 1}"

    def __enter__(self) -> "Cluster":
        """Build it. Raises ClusterError where root, a tool or a kernel module is missing."""
        check_machine()
        self._handlers = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            remove_stale()
            self._build()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, subprocess.CalledProcessError):
                raise ClusterError(f"`{' '.join(error.cmd)}` failed: {error.stderr.strip()}") from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes in the nodes and remove the nodes. Ignores signals meanwhile, so that it finishes."""
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING_SIGNALS} | self._handlers
        try:
            for name in [*self.names, self._hub]:
                remove_namespace(name)
            self._hosts.unlink(missing_ok=True)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _build(self) -> None:
        run("ip", "netns", "add", self._hub)
        run("ip", "-n", self._hub, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", self._hub, "link", "set", "bridge", "up")
        for node, name in enumerate(self.names):
            port = f"node{node}"
            run("ip", "netns", "add", name)
            run("ip", "link", "add", port, "netns", self._hub, "type", "veth", "peer", "name", INTERFACE, "netns", name)
            run("ip", "-n", self._hub, "link", "set", port, "master", "bridge", "up")
            run("ip", "-n", name, "addr", "add", f"{self.address(node)}/24", "dev", INTERFACE)
            for interface in (INTERFACE, "lo"):
                run("ip", "-n", name, "link", "set", interface, "up")
            limit(self._hub, port, self.link_mbit, _LINK)
            limit(name, INTERFACE, self.link_mbit, _LINK)
            limit(name, "lo", self.local_mbit, _LOCAL)

    def start(self, script: Sequence[str]) -> list[subprocess.Popen]:
        """Start DeepSpeed's launcher on every node; each is the leader of its own process group."""
        nodes = range(self.num_nodes)
        slots = "".join(f"{self.address(node)} slots={self.ranks_per_node}\n" for node in nodes)
        self._hosts.write_text(slots, encoding="utf-8")
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--hostfile", str(self._hosts), "--no_ssh"]
        launcher += ["--master_addr", self.address(0), "--master_port", "29500"]
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # else torch says at each start that the nodes have no host names
        }
        return [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *launcher, "--node_rank", str(node), *script],
                env=environment,
                start_new_session=True,
            )
            for node, name in enumerate(self.names)
        ]


def wait(launchers: Sequence[subprocess.Popen]) -> int:
    """Wait for all nodes; return the status of the first node that failed, or 0.

    After a failure the other nodes have some seconds to end by themselves. Then this function kills them.
    """
    status, deadline = 0, None
    try:
        while any(launcher.poll() is None for launcher in launchers):
            failed = [node for node, launcher in enumerate(launchers) if launcher.poll() not in (None, 0)]
            if failed and deadline is None:
                status, deadline = launchers[failed[0]].returncode, time.monotonic() + _GRACE_SECONDS
                print(f"cluster: node {failed[0]} failed with status {status}", file=sys.stderr)
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for launcher in launchers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    return status or next((launcher.returncode for launcher in launchers if launcher.returncode), 0)


def bytes_sent() -> int:
    """Bytes that this process's node has sent to the others."""
    return psutil.net_io_counters(pernic=True, nowrap=False)[INTERFACE].bytes_sent


def check_machine() -> None:
    """Raise ClusterError unless this machine can make network namespaces."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ClusterError(f"{' and '.join(missing)} not found. Install iproute2.")
    if os.geteuid() != 0:
        raise ClusterError("network namespaces need root. Run as root, or in a container with CAP_NET_ADMIN.")


def run(*command: str) -> str:
    """Run a command and return its output. Raises CalledProcessError."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def limit(namespace: str, interface: str, mbit: float, bucket: tuple[float, int, str]) -> None:
    """Limit what `interface` sends to `mbit` Mbit/s; 0 means no limit."""
    if mbit:
        seconds, least, queue = bucket
        burst = max(least, round(mbit * 125e3 * seconds))
        rate = ["rate", f"{mbit}mbit", "burst", f"{burst}b", "limit", queue]
        run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf", *rate)


def remove_namespace(name: str) -> None:
    """Kill the processes in a namespace and delete it. No error if it is gone already."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    for pid in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def remove_stale() -> None:
    """Remove the namespaces that killed clusters left."""
    for line in run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        owner = name.removeprefix(PREFIX).split("-")[0]
        if name.startswith(PREFIX) and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            remove_namespace(name)


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def add_arguments(parser: argparse.ArgumentParser, *, link_mbit: float = 100, local_mbit: float = 2400) -> None:
    """Add the size of a cluster, and the default rates of its links."""
    add = parser.add_argument
    add("--nodes", type=int, default=2, help="nodes of the cluster on this machine (default: %(default)s)")
    add("--ranks_per_node", type=int, default=2, help="ranks on each node (default: %(default)s)")
    what = "in Mbit/s; 0 means no limit (default: %(default)s)"
    add("--link_mbit", type=float, default=link_mbit, help=f"rate of a node's link {what}")
    add("--local_mbit", type=float, default=local_mbit, help=f"rate inside a node {what}")


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The cluster's arguments, then the script and its arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("script", nargs=argparse.REMAINDER, help="the script that every rank runs, and its arguments")
    arguments = parser.parse_args(command_line)
    if not arguments.script:
        parser.error("no script. Name the script to run, for example recipes/train.py.")
    for name in ("nodes", "ranks_per_node"):
        if not 1 <= getattr(arguments, name) <= 200:
            parser.error(f"--{name} is {getattr(arguments, name)}. Use 1 to 200.")
    return arguments


def main() -> int:
    """Build the cluster, run the script on it, remove the cluster. Returns the script's exit status."""
    arguments = parse_arguments()
    try:
        with Cluster.of(arguments) as cluster:
            return wait(cluster.start(arguments.script))
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
