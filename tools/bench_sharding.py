"""Sharding schemes of the dense part over depth: samples/s, bytes between nodes, memory (the paper's Figure 6).

    python tools/bench_sharding.py --nodes 2 --ranks_per_node 2 --depths 2 4 8
    deepspeed --hostfile hosts tools/bench_sharding.py --depths 2 4 8 16 --compute_ms 0

By itself it builds a cluster on this machine (tools/cluster.py); started by a launcher it takes the ranks that it gets.
All schemes of a depth run in one process, interleaved in rounds, and ratios are of medians. On CPU a fixed sleep stands
for the accelerator's compute, in every scheme alike: with real compute gloo's threads would have no idle core to
overlap on. Ratios are a property of the rates and the compute chosen; bytes are exact. gloo's reduce-scatter moves
twice a ring's bytes, which would flatter HSDP, so a ring takes its place, in every scheme alike.

Schemes: DP (ZeRO-0), ZeRO-2, FSDP (ZeRO-3), HSDP with the all-reduce waited for at once and under the backward, and
torch FSDP2 on a flat mesh and on a nodes x ranks mesh. hpZ is left out: DeepSpeed keeps its groups in the process for
good, where they would change the other schemes.
"""

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import math
import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from cluster import INTERFACE, Cluster, ClusterError, signals_end_it, wait
from rich.console import Console
from rich.table import Table

NUM_DENSE, BATCH = 8, 16
BYTES = 4  # of an fp32 weight
OUT_OF_MEMORY = 12


@dataclass(frozen=True)
class Scheme:
    """A way to share the dense part. stage None is torch's FSDP2, on a flat or a two-level mesh.

    passes: how often the whole model crosses the ring of all ranks in a step; hybrid schemes cross nodes in an
    all-reduce of the shards alone. keeps_last: the matrix at which the forward turns round isn't gathered again.
    """

    name: str
    stage: int | None
    passes: int = 0
    is_hybrid: bool = False
    is_async: bool = True
    keeps_last: bool = False

    def bytes_sent(self, model_bytes: int, matrix_bytes: int, nodes: int, ranks: int) -> float:
        """What leaves a node in a step, in theory."""
        if self.is_hybrid:
            return 2 * model_bytes * (nodes - 1) / nodes
        return (self.passes * model_bytes - self.keeps_last * matrix_bytes) * (ranks - 1) / ranks


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("dp", 0, passes=2),
        Scheme("zero2", 2, passes=3),
        Scheme("fsdp", 3, passes=3, keeps_last=True),
        Scheme("hsdp_sync", 3, is_hybrid=True, is_async=False),
        Scheme("hsdp", 3, is_hybrid=True),
        Scheme("torch_fsdp", None, passes=3),
        Scheme("torch_hsdp", None, is_hybrid=True),
    )
}


@dataclass(frozen=True)
class Measured:
    """One scheme at one depth. seconds: of a step, one a round. bytes_sent: that left node 0 in a step.

    matrix_bytes: of one layer's largest matrix. peak_mib: of rank 0 over what it had before the model, None if it
    wasn't asked for; infinite where the memory cap was hit.
    """

    scheme: str
    depth: int
    nodes: int
    ranks: int
    model_bytes: int
    matrix_bytes: int
    seconds: list[float]
    bytes_sent: float
    peak_mib: float | None = None

    @property
    def samples_per_second(self) -> float:
        """Of all ranks together, at the median step."""
        return BATCH * self.ranks / statistics.median(self.seconds)

    @property
    def bytes_in_theory(self) -> float:
        """What a ring moves."""
        return SCHEMES[self.scheme].bytes_sent(self.model_bytes, self.matrix_bytes, self.nodes, self.ranks)


# One rank's part. Everything that is imported here needs torch, which the process that only builds the cluster doesn't.


def work(arguments: argparse.Namespace) -> None:
    """Measure all depths on this rank; rank 0 writes measured.json. Communicates; all ranks call it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's start and stop on every rank
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # that the logit is a view: nobody writes to it
    from dhen.parallel import topology as job

    topology = job.start(timeout_minutes=5)
    if topology.device.type == "cpu":
        replace_reduce_scatter()
    if arguments.memory:
        measure_memory(topology, arguments)
        return
    results: list[Measured] = []
    for depth in arguments.depths:
        results += measure(topology, depth, arguments)
    if topology.is_main:
        output = Path(arguments.output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "measured.json").write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    job.stop()


def measure(topology: Any, depth: int, arguments: argparse.Namespace) -> list[Measured]:
    """All schemes at one depth, interleaved. Communicates; all ranks call it."""
    import torch

    config = model_config(depth, arguments.embeddings)
    steps, model_bytes = {}, 0
    for name in arguments.schemes:
        torch.manual_seed(0)
        steps[name], model_bytes = build(SCHEMES[name], config, topology, arguments.compute_ms / 1e3)
    generator = torch.Generator().manual_seed(topology.rank)
    dense_BN = torch.randn(BATCH, NUM_DENSE, generator=generator).to(topology.device)
    labels_B = torch.randint(0, 2, (BATCH,), generator=generator).float().to(topology.device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    sent: dict[str, list[int]] = {name: [] for name in steps}
    for round_number in range(-1, arguments.rounds):  # the first is for warming up
        for name, step in steps.items():
            topology.barrier()
            before, start = bytes_sent(), time.perf_counter()
            step(dense_BN, labels_B)
            if topology.device.type == "cuda":
                torch.cuda.synchronize()
            topology.barrier()
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - start)
                sent[name].append(bytes_sent() - before)
    if arguments.trace and topology.is_main:
        Path(arguments.output).mkdir(parents=True, exist_ok=True)
    if arguments.trace and "hsdp" in steps:
        trace(steps["hsdp"], dense_BN, labels_B, Path(arguments.output) / f"trace-{depth}.json", topology)
    nodes, ranks = topology.world_size // topology.local_size, topology.world_size
    sizes = (model_bytes, matrix_size(config) * BYTES)
    return [Measured(name, depth, nodes, ranks, *sizes, seconds[name], statistics.median(sent[name])) for name in steps]


def measure_memory(topology: Any, arguments: argparse.Namespace) -> None:
    """One scheme at one depth alone in the process, under the cap: rank 0 writes its peak. Communicates.

    A rank that can't allocate writes that it couldn't, and ends the job.
    """
    import torch

    (depth,), (name,) = arguments.depths, arguments.schemes
    peak_file = Path(arguments.output) / f"peak-{name}-{depth}.json"
    config = model_config(depth, arguments.embeddings)
    dense_BN, labels_B = (torch.rand(*shape, device=topology.device) for shape in ((BATCH, NUM_DENSE), (BATCH,)))
    # Warm: what libraries allocate once isn't the scheme's, and some hang rather than fail where they can't.
    build(SCHEMES[name], model_config(1, 4), topology, 0.0)[0](dense_BN, labels_B)
    before = start_memory(arguments.memory_cap_mib)
    try:
        step, _ = build(SCHEMES[name], config, topology, 0.0)
        for _ in range(3):
            step(dense_BN, labels_B)
        peak = peak_memory() - before
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        peak_file.write_text("null")
        os._exit(OUT_OF_MEMORY)
    if topology.is_main:
        peak_file.write_text(json.dumps(peak))
    topology.barrier()
    os._exit(0)


def start_memory(cap_mib: float) -> float:
    """MiB in use now, from which on `cap_mib` more are allowed; 0 is no cap."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        if cap_mib:
            torch.cuda.set_per_process_memory_fraction(
                cap_mib * 2**20 / torch.cuda.get_device_properties(0).total_memory
            )
        return torch.cuda.memory_allocated() / 2**20
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    if cap_mib:
        limit = int(status_kib("VmData") * 1024 + cap_mib * 2**20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    return status_kib("VmRSS") / 1024


def peak_memory() -> float:
    """MiB at the worst moment since `start_memory`."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return status_kib("VmHWM") / 1024


def status_kib(key: str) -> int:
    """A line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def trace(step: Callable, dense_BN: Any, labels_B: Any, path: Path, topology: Any) -> None:
    """One step as a Chrome trace of rank 0. Communicates; all ranks call it."""
    import torch

    with torch.profiler.profile() as profiler:
        step(dense_BN, labels_B)
    topology.barrier()
    if topology.is_main:
        profiler.export_chrome_trace(str(path))
        under, total = overlap(json.loads(path.read_text()))
        print(f"{path}: {under:.0f} of the all-reduces' {total:.0f} ms run while a layer's backward computes")


def overlap(trace: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds in which an all-reduce and a layer's backward (its pause) run at once, and of all all-reduces."""
    spans = {"gloo:all_reduce": [], "PauseBackward": []}
    for event in trace["traceEvents"]:
        if event.get("name") in spans and event.get("ph") == "X":
            spans[event["name"]].append((event["ts"], event["ts"] + event["dur"]))
    # Those of more than a number: the last one is the job's own barrier or norm.
    reduces = [(first, last) for first, last in spans["gloo:all_reduce"] if first < spans["PauseBackward"][-1][1] + 1e5]
    marks = sorted({mark for span in (*reduces, *spans["PauseBackward"]) for mark in span})
    total = under = 0.0
    for first, last in itertools.pairwise(marks):
        if any(start <= first and last <= end for start, end in reduces):
            total += last - first
            under += any(start <= first and last <= end for start, end in spans["PauseBackward"]) * (last - first)
    return under / 1e3, total / 1e3


def model_config(depth: int, embeddings: int) -> Any:
    """Layers of one size: (embeddings * 16)^2 weights of a flattened cross, and a linear interaction's."""
    from dhen.model.configuration_dhen import DhenConfig

    half = embeddings // 2
    interactions = [
        {"kind": "deep_cross_flattened", "num_embeddings": half},
        {"kind": "linear", "num_embeddings": embeddings - half},
    ]
    return DhenConfig(
        num_dense_features=NUM_DENSE, num_dense_embeddings=embeddings, dense_mlp=[], head_mlp=[16], num_layers=depth,
        embedding_dim=16, interactions=interactions,
    )  # fmt: skip


def matrix_size(config: Any) -> int:
    """Weights of a layer's largest matrix."""
    return (config.num_dense_embeddings * config.embedding_dim) ** 2


def build(scheme: Scheme, config: Any, topology: Any, compute_seconds: float) -> tuple[Callable, int]:
    """A function that takes one step, and the bytes of all weights. Communicates; all ranks call it."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    make = build_torch if scheme.stage is None else build_deepspeed
    model, score, update, size = make(scheme, config, topology)
    for layer in model.model.layers:
        add_pauses(layer, compute_seconds)

    def step(dense_BN: Any, labels_B: Any) -> None:
        update(binary_cross_entropy_with_logits(score(dense_BN), labels_B))

    return step, size


def build_deepspeed(scheme: Scheme, config: Any, topology: Any) -> tuple[Any, Callable, Callable, int]:
    """The project's own way: ZeRO over all ranks, or HSDP."""
    from dhen.parallel.ds_config import DhenSection, DsConfig
    from dhen.parallel.parallelize import parallelize
    from dhen.training.run_folder import num_dense_weights

    layer = matrix_size(config)
    zero: dict[str, Any] = {"stage": scheme.stage, "reduce_bucket_size": layer + layer // 4}
    if scheme.stage == 3:
        # A model of any depth in the memory of two layers: all is gathered again in the backward, as theory counts it.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
        zero |= {"stage3_prefetch_bucket_size": layer, "stage3_max_live_parameters": 2 * layer}
    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": zero,
    }
    is_one_node = topology.local_size == topology.world_size
    section = DhenSection(
        shard_group="node" if scheme.is_hybrid and not is_one_node else "world", async_all_reduce=scheme.is_async
    )
    model = parallelize(config, topology, DsConfig("tools/bench_sharding.py", settings, section))
    return (
        model.engine.module,
        lambda dense_BN: model.score(dense_BN.new_empty(len(dense_BN), 0, config.embedding_dim), dense_BN),
        model.step,
        num_dense_weights(model) * BYTES,
    )


def build_torch(scheme: Scheme, config: Any, topology: Any) -> tuple[Any, Callable, Callable, int]:
    """torch's own FSDP2, as its users apply it: each layer, then the whole."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from dhen.model.modeling_dhen import DhenForClickPrediction

    nodes = topology.world_size // topology.local_size
    kind = topology.device.type
    if scheme.is_hybrid:
        mesh = init_device_mesh(kind, (nodes, topology.local_size), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (topology.world_size,))
    model = DhenForClickPrediction(config, with_tables=False).to(topology.device)
    size = sum(parameter.numel() for parameter in model.parameters()) * BYTES
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def score(dense_BN: Any) -> Any:
        return model(inputs_embeds=dense_BN.new_empty(len(dense_BN), 0, config.embedding_dim), dense=dense_BN).logits

    def update(loss: Any) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, score, update, size


def add_pauses(layer: Any, seconds: float) -> None:
    """Let the layer's forward take `seconds` longer, and its backward twice that."""
    import torch

    class Pause(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            time.sleep(seconds)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            time.sleep(2 * seconds)
            return gradient

    if seconds:
        forward = layer.forward
        layer.forward = lambda *inputs: Pause.apply(forward(*inputs))


def bytes_sent() -> int:
    """Bytes that have left this node over its link; 0 where it has none of that name."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.strip().partition(":")
        if name == INTERFACE:
            return int(counters.split()[8])
    return 0


def replace_reduce_scatter() -> None:
    """Let a ring of sends stand for gloo's reduce_scatter_tensor, which moves as many bytes as an all-reduce."""
    import deepspeed
    import torch.distributed as dist

    def ring(output: Any, input: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        group = group or dist.group.WORLD
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        after = dist.get_global_rank(group, (rank + 1) % size)
        before = dist.get_global_rank(group, (rank - 1) % size)
        chunks = list(input.view(size, -1).unbind())
        passed = chunks[(rank - 1) % size].clone()
        for hop in range(2, size + 1):
            received = passed.clone()
            sending = dist.isend(passed, after, group)
            dist.recv(received, before, group)
            sending.wait()
            passed = received.add_(chunks[(rank - hop) % size])
        output.view(-1).copy_(passed)
        if op == dist.ReduceOp.AVG:
            output.div_(size)
        return Done() if async_op else None

    class Done:
        def wait(self) -> None:
            pass

    dist.reduce_scatter_tensor = dist.reduce_scatter_single = ring
    deepspeed.comm.reduce_scatter_fn = lambda output, inputs, group=None, **_: ring(output, inputs, group=group)


# The process that shows it.


def read(path: Path) -> list[Measured]:
    """What the ranks measured."""
    return [Measured(**values) for values in json.loads(path.read_text(encoding="utf-8"))]


def show(results: Sequence[Measured], console: Console) -> None:
    """One row a scheme and depth; samples/s as a ratio to FSDP's, with the range over the rounds."""
    table = Table(box=None, pad_edge=False)
    columns = ("depth", "scheme", "samples/s", "of fsdp", "from", "to", "MiB sent", "in theory", "off by", "peak MiB")
    for column in columns:
        table.add_column(column, justify="left" if column == "scheme" else "right")
    for result in results:
        base = next((r for r in results if (r.scheme, r.depth) == ("fsdp", result.depth)), None)
        ratios = sorted(b / own for b, own in zip(base.seconds, result.seconds, strict=True)) if base else [0.0]
        theory = result.bytes_in_theory
        table.add_row(
            str(result.depth),
            result.scheme,
            f"{result.samples_per_second:,.1f}",
            f"{statistics.median(base.seconds) / statistics.median(result.seconds):.2f}" if base else "-",
            f"{ratios[0]:.2f}",
            f"{ratios[-1]:.2f}",
            f"{result.bytes_sent / 2**20:.2f}",
            f"{theory / 2**20:.2f}",
            f"{result.bytes_sent / theory - 1:+.1%}" if result.bytes_sent else "-",
            "-" if result.peak_mib is None else f"{result.peak_mib:.0f}" if isfinite(result.peak_mib) else "too much",
        )
    console.print(table)


def plot(results: Sequence[Measured], path: Path) -> None:
    """Throughput over depth, a line a scheme: the paper's Figure 6."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(result.scheme for result in results):
        of_scheme = [result for result in results if result.scheme == name]
        fits = [result for result in of_scheme if result.peak_mib is None or isfinite(result.peak_mib)]
        (line,) = axes.plot([r.depth for r in fits], [r.samples_per_second for r in fits], marker="o", label=name)
        if fits and len(fits) < len(of_scheme):
            last = fits[-1]
            axes.plot(last.depth, last.samples_per_second, "x", markersize=14, color=line.get_color())
    first = results[0]
    axes.set(xlabel="DHEN layers", ylabel="samples/s", yscale="log")
    axes.set_title(f"{first.nodes} nodes x {first.ranks // first.nodes} ranks; x: the next depth is out of memory")
    axes.legend()
    figure.savefig(path, dpi=150)


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; the ranks get the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2, help="nodes of the cluster on this machine")
    parser.add_argument("--ranks_per_node", type=int, default=2, help="ranks on each")
    parser.add_argument("--link_mbit", type=float, default=100, help="a node's link, Mbit/s")
    parser.add_argument("--local_mbit", type=float, default=2400, help="inside a node, Mbit/s")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8], help="DHEN layers")
    parser.add_argument(
        "--embeddings", type=int, default=46, help="embeddings of a layer; its weights grow by the square"
    )
    parser.add_argument(
        "--compute_ms", type=float, default=40, help="sleep in a layer's forward; twice in its backward"
    )
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES, help="what is compared")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each scheme")
    parser.add_argument(
        "--memory_cap_mib", type=float, default=0, help="measure peaks too, with so much a rank at most"
    )
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--trace", action="store_true", help="write a Chrome trace of an hsdp step")
    parser.add_argument("--output", default="runs/bench_sharding", help="folder of measured.json, figure6.png, traces")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(command_line)


def main() -> int:
    """Measure and show."""
    arguments = parse_arguments()
    if "RANK" in os.environ:
        work(arguments)
        return 0
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with (
            signals_end_it(),
            Cluster(arguments.nodes, link_mbit=arguments.link_mbit, local_mbit=arguments.local_mbit) as cluster,
        ):
            status = wait(cluster.start(arguments.ranks_per_node, [__file__, *sys.argv[1:]]))
    except ClusterError as error:
        print(f"bench_sharding: {error}", file=sys.stderr)
        return 2
    if status:
        return status
    results = read(output / "measured.json")
    if arguments.memory_cap_mib:
        peaks = peaks_of_all(arguments)
        results = [replace(result, peak_mib=peaks[result.scheme, result.depth]) for result in results]
        (output / "measured.json").write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    show(results, Console(width=None if sys.stdout.isatty() else 100))
    plot(results, output / "figure6.png")
    print(f"measured.json and figure6.png are in {output}")
    return 0


def peaks_of_all(arguments: argparse.Namespace) -> dict[tuple[str, int], float]:
    """Peak MiB of rank 0 by scheme and depth, each in a job of its own, on unlimited links; infinite above the cap."""
    # One arena and small mmaps, so that what is freed is given back at once and counts no more.
    os.environ |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    peaks = {}
    with signals_end_it(), Cluster(arguments.nodes, link_mbit=0, local_mbit=0) as cluster:
        for name in arguments.schemes:
            for depth in arguments.depths:
                script = [__file__, *sys.argv[1:], "--memory", "--schemes", name, "--depths", str(depth)]
                peak_file = Path(arguments.output) / f"peak-{name}-{depth}.json"
                peak_file.unlink(missing_ok=True)
                with contextlib.redirect_stderr(None):
                    wait(cluster.start(arguments.ranks_per_node, script))
                peak = json.loads(peak_file.read_text())
                peaks[name, depth] = math.inf if peak is None else peak
                peak_file.unlink()
    return peaks


if __name__ == "__main__":
    sys.exit(main())
