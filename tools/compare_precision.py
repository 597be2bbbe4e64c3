"""What half precision and a quantized wire save and cost: bytes between nodes, memory, NE (paper 3.2.3).

    python tools/compare_precision.py --config recipes/configs/frappe.yaml --epochs 1

Trains the recipe once a variant, on two nodes of this machine (tools/cluster.py), from the same seed, and prints what a
node's interface sent, MiB of tables and of the dense part's states on rank 0, and the test split's NE beside that of
plain fp32. Arguments that it doesn't know go to recipes/train.py.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import Cluster, ClusterError, signals_end_it, wait
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
BF16_OPTIMIZER = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("zero2", {}),
    "all-to-all fp16": ("zero2", {"dhen": {"all_to_all_dtype": "fp16"}}),
    "all-to-all bf16": ("zero2", {"dhen": {"all_to_all_dtype": "bf16"}}),
    "all-to-all int8": ("zero2", {"dhen": {"all_to_all_dtype": "int8"}}),
    "all-reduce bf16": ("zero2", {"communication_data_type": "bf16"}),
    "tables fp16, to nearest": ("zero2", {"dhen": {"table_dtype": "fp16", "table_rounding": "nearest"}}),
    "tables fp16, stochastic": ("zero2", {"dhen": {"table_dtype": "fp16"}}),
    "autocast bf16": ("zero0_bf16", {}),
    "bf16, fp32 masters": ("zero2_bf16", {}),
    "bf16 optimizer": ("zero2_bf16", {"bf16": BF16_OPTIMIZER}),
    "paper": ("paper", {}),
}
"""ds_config and what is changed in it."""


@dataclass(frozen=True)
class Result:
    """One run. bytes_a_step: that left node 0. *_bytes: of rank 0; states are weights, masters and Adam's moments."""

    variant: str
    bytes_a_step: float
    table_bytes: int
    dense_state_bytes: int
    ne: float
    auc: float


def train(variant: str, arguments: argparse.Namespace, cluster: Cluster, folder: Path) -> Result:
    """Train one variant on the cluster. Raises RuntimeError if it fails."""
    name, changes = VARIANTS[variant]
    config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text(encoding="utf-8"))
    for key, value in changes.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    run = folder / variant.replace(" ", "_").replace(",", "")
    ds_config = folder / f"{run.name}.json"
    ds_config.write_text(json.dumps(config), encoding="utf-8")
    flags = [f"--config={arguments.config}", f"--ds_config={ds_config}", f"--output_dir={run}"]
    flags += ["--overwrite_output_dir", f"--num_train_epochs={arguments.epochs}", "--lr_scheduler_type=constant"]
    before = cluster.bytes_sent(0)
    if wait(cluster.start(arguments.ranks_per_node, [str(ROOT / "recipes" / "train.py"), *flags, *arguments.more])):
        raise RuntimeError(f"{variant} failed; what it printed stands above.")
    sent = cluster.bytes_sent(0) - before
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    placement = json.loads((run / "placement.json").read_text(encoding="utf-8"))
    tables = sum(shard["num_bytes"] for shard in placement["shards"] if shard["rank"] == 0)
    test = summary["test"]
    return Result(variant, sent / summary["steps"], tables, dense_state_bytes(run), test["ne"], test["auc"])


def dense_state_bytes(run: Path) -> int:
    """Weights, masters and optimizer states of rank 0, as its last checkpoint's tensors have them."""
    import torch

    folder = run / (run / "latest").read_text(encoding="utf-8").strip()
    files = [path for path in folder.glob("*_states.pt") if "rank_0_" in path.name or "rank_00_" in path.name]
    seen: dict[int, int] = {}
    for path in files:
        collect(torch.load(path, map_location="cpu", weights_only=False), seen)
    return sum(seen.values())


def collect(value: Any, seen: dict[int, int]) -> None:
    """Bytes of every tensor's storage in nested containers, each counted once."""
    import torch

    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, dict):
        for item in value.values():
            collect(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            collect(item, seen)


def show(results: Sequence[Result]) -> None:
    """One row a variant."""
    table = Table(box=None, pad_edge=False)
    for column in ("variant", "KiB a step", "tables MiB", "dense MiB", "NE", "of fp32", "AUC"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    base = next((result.ne for result in results if result.variant == "fp32"), math.nan)
    for result in results:
        table.add_row(
            result.variant,
            f"{result.bytes_a_step / 2**10:.1f}",
            f"{result.table_bytes / 2**20:.3f}",
            f"{result.dense_state_bytes / 2**20:.3f}",
            f"{result.ne:.5f}",
            f"{result.ne / base - 1:+.2%}",
            f"{result.auc:.5f}",
        )
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def parse_arguments() -> argparse.Namespace:
    """The arguments; what isn't known goes to train.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="recipes/configs/frappe.yaml", help="recipe to train")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of each variant")
    parser.add_argument("--ranks_per_node", type=int, default=1, help="ranks on each of the two nodes")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="what is compared")
    parser.add_argument("--output", default="runs/precision", help="folder of the runs and of results.json")
    arguments, arguments.more = parser.parse_known_args()
    return arguments


def main() -> int:
    """Train all variants and show them."""
    arguments = parse_arguments()
    folder = Path(arguments.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    try:
        with signals_end_it(), Cluster(2, link_mbit=0, local_mbit=0) as cluster:
            for variant in arguments.variants:
                results.append(train(variant, arguments, cluster, folder))
    except (ClusterError, RuntimeError) as error:
        print(f"compare_precision: {error}", file=sys.stderr)
        return 2
    (folder / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
