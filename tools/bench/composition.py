"""Shows what a rank's memory holds at its peak, by sharding scheme: measured, and as the planner predicts it.

    python tools/bench/composition.py --layers 8

The model and the schemes are those of tools/bench/sharding.py. The command builds a cluster on this machine
(tools/cluster.py) with unlimited links. Rank 0 tags every tensor's memory by the code that allocates it, and notes what
is alive whenever a step reaches a new peak. A part is given in P, the bytes of the model's weights:

weights: a rank's own. optimizer: its states and master weights. gradients: of weights, and their shards. gathered:
weights of other ranks. buckets: copies of gradients that are being reduced. activations: all other tensors.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import argparse
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dhen.model.configuration_dhen import DhenConfig
from dhen.planner.memory import predict_memory
from dhen.planner.memory_setting import MemorySetting
from dhen.planner.step_trace import trace_step
from dhen.runtime.topology import Topology
from dhen.training.parallelize import weights_of
from tools.bench import launch
from tools.bench.report import print_table
from tools.bench.sharding_ranks import build, ds_config_of, free, model_bytes, model_config
from tools.bench.sharding_schemes import BATCH, SCHEMES, Scheme
from tools.bench.stand_ins import replace_reduce_scatter
from tools.cluster import Cluster, add_arguments

PARTS = ("weights", "optimizer", "gradients", "gathered", "buckets", "activations")
_FIVE = ("dp", "fsdp", "hsdp", "torch_fsdp", "torch_hsdp")
_STEPS = 4
"""By the last one, stage 3 knows the order of the modules."""
_ALLOCATED_BY = (
    ("torch/optim/", "", "optimizer"),
    ("zero/stage3.py", "_create_fp32_partitions", "optimizer"),
    ("zero/stage3.py", "_create_fp16", "weights"),
    ("dense/lean_stage3.py", "", "gradients"),
    ("dense/hsdp.py", "", "buckets"),
    ("bench/stand_ins.py", "", "buckets"),
    ("comm/coalesced_collectives.py", "", "buckets"),
    ("runtime/engine.py", "allreduce", "buckets"),
    ("_fsdp_collectives.py", "reduce", "buckets"),
    ("_fsdp_collectives.py", "gather", "gathered"),
    ("_fsdp_param.py", "init_sharded_param", "weights"),
    ("_fsdp_param.py", "", "gathered"),
    ("zero/partition_parameters.py", "_partition_param", "weights"),
    ("zero/partition_parameters.py", "", "gathered"),
)
"""File and function of a frame, and the part that its allocations belong to. The innermost frame that fits counts."""


class Composition(TorchDispatchMode):
    """Notes the bytes of each part at the peak since the last `reset_peak`: `parts`.

    Memory is looked at after every operation, because FSDP2 resizes the storage of gathered weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, int] = {}
        self.model: nn.Module | None = None
        self._alive: dict[int, tuple[weakref.ref, str]] = {}  # by address: storage and part
        self._peak = 0

    def reset_peak(self) -> None:
        """Restart the peak."""
        self._peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then look at what is alive."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = _storage(tensor)
                known = self._alive.get(storage._cdata)
                if known is None or known[0]() is not storage:
                    self._alive[storage._cdata] = weakref.ref(storage), part_of_allocation()
        sizes = {key: (storage.nbytes(), part) for key, (ref, part) in self._alive.items() if (storage := ref())}
        total = sum(size for size, _ in sizes.values())
        if total > self._peak:
            self._peak = total
            sizes |= {key: (sizes[key][0], part) for key, part in self._of_weights() if key in sizes}
            self.parts = {}
            for size, part in sizes.values():
                self.parts[part] = self.parts.get(part, 0) + size
        return result

    def _of_weights(self) -> Iterator[tuple[int, str]]:
        """The storages of weights and their gradients."""
        for weight in self.model.parameters() if self.model is not None else ():
            yield _storage(weight)._cdata, "gathered" if hasattr(weight, "ds_tensor") else "weights"
            if weight.grad is not None:
                yield _storage(weight.grad)._cdata, "gradients"


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """The tensor's memory; of torch's sharded tensors, the local shard's."""
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()


def part_of_allocation() -> str:
    """The part that memory belongs to which is being allocated now."""
    frame = sys._getframe(1)
    while frame is not None:
        for file, function, part in _ALLOCATED_BY:
            if file in frame.f_code.co_filename and function in frame.f_code.co_name:
                return part
        frame = frame.f_back
    return "activations"


@dataclass(frozen=True)
class Composed:
    """Bytes by part of one scheme. model_bytes: of the model's weights. predicted: None for torch's schemes."""

    scheme: str
    model_bytes: int
    measured: dict[str, int]
    predicted: dict[str, int] | None


def measure(topology: Topology, arguments: argparse.Namespace) -> list[Composed]:
    """Measure all schemes. Communicates; all ranks call it."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # about writing to the logit, which nobody does
    replace_reduce_scatter()
    config = model_config(arguments.layers, arguments.embeddings)
    # Trace before DeepSpeed builds a model: stage 3 replaces torch's `linear`.
    predicted = {name: predicted_parts(SCHEMES[name], config, topology) for name in arguments.schemes}
    return [
        Composed(name, model_bytes(config), measured_parts(SCHEMES[name], config, topology), predicted[name])
        for name in arguments.schemes
    ]


def measured_parts(scheme: Scheme, config: DhenConfig, topology: Topology) -> dict[str, int]:
    """Bytes by part at the peak of the last step. Communicates; all ranks call it."""
    with Composition() as memory:
        built = build(scheme, config, topology)
        memory.model = built.model
        for _ in range(_STEPS):
            memory.reset_peak()
            built.step()
    free(built)
    return memory.parts


def predicted_parts(scheme: Scheme, config: DhenConfig, topology: Topology) -> dict[str, int] | None:
    """The planner's prediction; None for torch's schemes."""
    if scheme.stage is None:
        return None
    ds_config = ds_config_of(scheme, topology).sized(weights_of(config))
    shard_size = topology.shard_size(ds_config.dhen.shard_group)
    setting: Any = MemorySetting.of(ds_config, shard_size, topology.world_size, is_gpu=False)
    return predict_memory(trace_step(config, BATCH), setting).parts


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, which the ranks get too."""
    parser = launch.argument_parser(__doc__)
    add_arguments(parser, link_mbit=0, local_mbit=0)
    add = parser.add_argument
    add("--layers", type=int, default=8, help="DHEN layers")
    add("--embeddings", type=int, default=46, help="embeddings in a layer; its weights grow with the square")
    add("--schemes", nargs="+", choices=SCHEMES, default=_FIVE, help="schemes to compare")
    add("--output", type=Path, default="runs/bench_composition/composition.json", help="where the results go")
    return parser.parse_args(command_line)


def show(results: Sequence[Composed]) -> None:
    """Print two rows per scheme: bytes by part, measured and predicted."""
    rows = []
    for result in results:
        for name, parts in (("measured", result.measured), ("predicted", result.predicted)):
            if parts:
                total = sum(parts.values())
                shares = [f"{size / result.model_bytes:.2f}" for size in (*(parts.get(p, 0) for p in PARTS), total)]
                rows.append([result.scheme if name == "measured" else "", name, *shares, f"{total / 2**20:.1f}"])
    print_table(("scheme", "", *PARTS, "sum in P", "MiB"), rows, left=("scheme", ""))


def measure_on_a_cluster(arguments: argparse.Namespace) -> None:
    """Measure and show. Raises ClusterError, and JobError if the job fails."""
    file = arguments.output
    with Cluster.of(arguments) as cluster:
        results = launch.results_of_cluster(cluster, sys.argv, list[Composed], file)
    launch.write_json(file, results)
    show(results)


if __name__ == "__main__":
    sys.exit(launch.run(parse_arguments(), measure, measure_on_a_cluster))
