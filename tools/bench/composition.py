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
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench import launch
from tools.bench.sharding_schemes import SCHEMES
from tools.cluster import Cluster, ClusterError, signals_end_it

PARTS = ("weights", "optimizer", "gradients", "gathered", "buckets", "activations")
_FIVE = ("dp", "fsdp", "hsdp", "torch_fsdp", "torch_hsdp")


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, which the ranks get too."""
    parser = launch.argument_parser(__doc__)
    add = parser.add_argument
    add("--nodes", type=int, default=2, help="nodes of the cluster on this machine")
    add("--ranks_per_node", type=int, default=2, help="ranks on each node")
    add("--layers", type=int, default=8, help="DHEN layers")
    add("--embeddings", type=int, default=46, help="embeddings in a layer; its weights grow with the square")
    add("--schemes", nargs="+", choices=SCHEMES, default=_FIVE, help="schemes to compare")
    add("--output", default="runs/bench_composition/composition.json", help="where the results go")
    return parser.parse_args(command_line)


def show(results: Sequence[dict[str, Any]], console: Console) -> None:
    """Print two rows per scheme. results: scheme, model_bytes, and bytes by part, measured and predicted."""
    table = Table(box=None, pad_edge=False)
    for column in ("scheme", "", *PARTS, "sum in P", "MiB"):
        table.add_column(column, justify="left" if column in ("scheme", "") else "right")
    for result in results:
        for name in ("measured", "predicted"):
            if parts := result[name]:
                total = sum(parts.values())
                shares = [f"{parts.get(part, 0) / result['model_bytes']:.2f}" for part in PARTS]
                in_p, mib = f"{total / result['model_bytes']:.2f}", f"{total / 2**20:.1f}"
                table.add_row(result["scheme"] if name == "measured" else "", name, *shares, in_p, mib)
    console.print(table)


def main() -> int:
    """Measure and show. Exit status: 0, or 2 if the cluster or the job on it fails."""
    arguments = parse_arguments()
    if launch.is_rank():
        from tools.bench.composition_ranks import measure  # imports torch, which only the ranks need

        measure(arguments)
        return 0
    file = Path(arguments.output)
    command = [__file__, *sys.argv[1:]]
    try:
        with signals_end_it(), Cluster(arguments.nodes, link_mbit=0, local_mbit=0) as cluster:
            results = launch.results_of_cluster(cluster, arguments.ranks_per_node, command, file=file, job="the job")
    except (ClusterError, launch.JobError) as error:
        print(f"composition: {error}", file=sys.stderr)
        return 2
    launch.write_json(file, results)
    show(results, Console(width=None if sys.stdout.isatty() else 110))
    return 0


if __name__ == "__main__":
    sys.exit(main())
