"""Measures this machine's rates for the planner, in under a minute, and writes a machine file.

    python tools/calibrate_machine.py --like cpu --output runs/machine.yaml
    python tools/plan.py --config recipes/configs/criteo.yaml --machine runs/machine.yaml

It times matrix products by dtype (on a GPU fp32 with and without TF32), copies in memory, the start of a kernel, and a
real DHEN step. The compute efficiency is the seconds that the step should take at these rates, over the seconds that it
takes. On a CPU one rank measures with its share of the cores. Links and the host's memory are not measured: they are as
in --like, and `source` says so. tools/calibrate_costs.py measures links for the tables.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.utils.benchmark import Timer

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.planner.machine import Machine, read_machine
from dhen.planner.step_time import compute_seconds
from dhen.planner.step_trace import Precision, trace_step
from dhen.runtime.host_allocator import keep_freed_memory

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
_SECONDS, _RISE = 0.2, 1.05
"""How long a call is repeated, and the rise of the rate below which larger matrices are not tried. Nor are they if a
product takes as long as that."""


def seconds_of(function: Callable[[], object]) -> float:
    """Median seconds of a call, of so many calls in a row that starting and waiting for them hardly count."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=_SECONDS).median


def measured(like: Machine, device: torch.device, size: int, batch_size: int) -> Machine:
    """`like` with this machine's compute and memory rates."""
    names = [name for name in _DTYPES if name != "tf32" or device.type == "cuda"]
    flops = {name: _rounded(product_rate(name, device, size)) for name in names}
    machine = dataclasses.replace(
        like,
        name=f"measured here, otherwise like: {like.name}",
        source="compute and memory by tools/calibrate_machine.py; links and host as in the file it started from",
        is_gpu=device.type == "cuda",
        flops=flops,
        memory_bytes_per_second=_rounded(copy_rate(device)),
        seconds_per_operation=_rounded(seconds_per_start(device)),
        compute_efficiency=1.0,
    )
    return dataclasses.replace(machine, compute_efficiency=_rounded(efficiency(machine, device, batch_size)))


def copy_rate(device: torch.device) -> float:
    """Bytes per second of a copy in memory, read and written."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)  # larger than any cache
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / seconds_of(partial(target.copy_, source))


def seconds_per_start(device: torch.device) -> float:
    """Seconds to start an operation that does next to nothing."""
    one = torch.ones(1, device=device)
    return seconds_of(partial(one.add, 1))


def product_rate(name: str, device: torch.device, size: int) -> float:
    """Operations per second of products of square matrices, large enough to fill the device.

    Their size is doubled while the rate rises and a product is short.
    """
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    rates, seconds = [0.0], 0.0
    while len(rates) < 2 or (rates[-1] > _RISE * rates[-2] and seconds < _SECONDS):
        a, b, out = (torch.randn(size, size, device=device).to(_DTYPES[name]) for _ in range(3))
        seconds = seconds_of(partial(torch.mm, a, b, out=out))
        rates.append(2 * size**3 / seconds)
        size *= 2
    torch.set_float32_matmul_precision("highest")
    return max(rates)


def efficiency(machine: Machine, device: torch.device, batch_size: int) -> float:
    """Seconds that a step should take at the machine's rates, over the seconds that it takes."""
    config = DhenConfig(
        num_dense_features=13,
        sparse_features=[{"name": f"C{index}", "num_embeddings": 10} for index in range(26)],
        embedding_dim=64,
        num_embeddings_out=16,
        num_layers=2,
        interactions=["advanced_dlrm", "self_attention", "linear", "deep_cross_flattened"],
    )
    model = DhenForClickPrediction(config, with_tables=False).to(device)
    embeddings_BFD = torch.randn(batch_size, 26, 64, device=device, requires_grad=True)
    dense_BN, labels_B = torch.randn(batch_size, 13, device=device), torch.ones(batch_size, device=device)

    def step() -> Tensor:
        loss = model(inputs_embeds=embeddings_BFD, dense=dense_BN, labels=labels_B).loss
        loss.backward()
        return loss

    work = [each for event in trace_step(config, batch_size, Precision()).events for each in event.work]
    return compute_seconds(work, machine) / seconds_of(step)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--like", default="cpu", help="machine for everything else: a name or a file (default: %(default)s)"
    )
    parser.add_argument("--output", default="runs/machine.yaml", help="YAML file to write (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=1024, help="rows of the first square matrices (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=512, help="examples per step (default: %(default)s)")
    return parser.parse_args(command_line)


def main() -> int:
    """Measure, write, show. Exit status: 0, or 2 if --like does not fit this machine."""
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    try:
        like = read_machine(arguments.like)
        if like.is_gpu != (device.type == "cuda"):
            wanted = "a GPU machine" if device.type == "cuda" else "a CPU machine"
            raise ValueError(f"--like {arguments.like} is {like.name}, but this is {wanted}. Name {wanted}.")
    except ValueError as error:
        print(f"calibrate_machine: {error}", file=sys.stderr)
        return 2
    if device.type == "cpu":  # as one of the node's ranks
        keep_freed_memory()
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // like.ranks_per_node))
    machine = measured(like, device, arguments.size, arguments.batch_size)
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(yaml.safe_dump(dataclasses.asdict(machine), sort_keys=False), encoding="utf-8")
    print(output.read_text(), end="")
    print(f"{output} has the machine, measured in {time.perf_counter() - start:.0f} seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
