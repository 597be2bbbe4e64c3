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

from tools.bench import launch
from tools.bench.report import print_table
from tools.bench.sharding_schemes import SCHEMES
from tools.cluster import Cluster, ClusterError, add_arguments

PARTS = ("weights", "optimizer", "gradients", "gathered", "buckets", "activations")
_FIVE = ("dp", "fsdp", "hsdp", "torch_fsdp", "torch_hsdp")


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


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print two rows per scheme. results: scheme, model_bytes, and bytes by part, measured and predicted."""
    rows = []
    for result in results:
        for name in ("measured", "predicted"):
            if parts := result[name]:
                total = sum(parts.values())
                shares = [f"{parts.get(part, 0) / result['model_bytes']:.2f}" for part in PARTS]
                in_p, mib = f"{total / result['model_bytes']:.2f}", f"{total / 2**20:.1f}"
                rows.append([result["scheme"] if name == "measured" else "", name, *shares, in_p, mib])
    print_table(("scheme", "", *PARTS, "sum in P", "MiB"), rows, left=("scheme", ""))


def main() -> int:
    """Measure and show. Exit status: 0, or 2 if the cluster or the job on it fails."""
    arguments = parse_arguments()
    file = arguments.output
    if launch.is_rank():
        from tools.bench.composition_ranks import measure  # imports torch, which only the ranks need

        launch.measure_as_a_rank(measure, arguments, file)
        return 0
    try:
        with Cluster.of(arguments) as cluster:
            results = launch.results_of_cluster(cluster, [__file__, *sys.argv[1:]], file=file, job="the job")
    except (ClusterError, launch.JobError) as error:
        print(f"composition: {error}", file=sys.stderr)
        return 2
    launch.write_json(file, results)
    show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
