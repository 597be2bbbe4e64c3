"""How fast exported forms of a trained model score: as written (eager), AOTInductor, ONNX Runtime, and a plain DLRM.

    python tools/bench/scoring.py runs/frappe
    python tools/bench/scoring.py runs/quickstart --batches 1 32 --tables fp32 --rounds 100

It exports the model (tools/export_model.py), and scores random rows in this process, where the forms take turns in each
round. The DLRM is written here in plain PyTorch: nn.EmbeddingBag for each feature, in fp32, MLPs of 64, dot products,
and no layers; its weights are random. A call begins with the ids of a batch as the loader gives them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dhen.exported_graph import GRAPH_FILES, ExportedGraph
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import SparseIds
from dhen.model.mlp import MLP
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.runtime import topology as job
from dhen.training.saved.table_precision import PRECISIONS
from dhen.training.saved.trained_model import TrainedModel
from tools.bench.clock import in_turns
from tools.bench.launch import argument_parser
from tools.bench.report import print_table
from tools.export_model import export, random_rows
from tools.markdown import head, row

EAGER, WARM_UP = "eager", 5


class Dlrm(nn.Module):
    """A DLRM (Naumov et al. 2019) with the tables of the config."""

    def __init__(self, config: DhenConfig) -> None:
        super().__init__()
        dim, lookups = config.embedding_dim, config.lookups
        tables = {table.name: nn.EmbeddingBag(table.num_embeddings, dim, mode="sum") for table in config.tables}
        self.bags = nn.ModuleList(tables[feature.table] for feature in lookups)
        self.bottom = MLP(config.num_dense_features, [64], dim) if config.num_dense_features else None
        count = len(lookups) + (self.bottom is not None)
        self.register_buffer("pairs", torch.triu_indices(count, count, offset=1))
        self.top = MLP(self.pairs.shape[1] + dim * (self.bottom is not None), [64], 1)

    def forward(self, sparse: SparseIds, dense_BN: Tensor) -> Tensor:
        """Probabilities (B,)."""
        batch, lengths_FB = sparse.batch_size, sparse.lengths_FB
        if lengths_FB is None:
            lengths_FB = torch.ones(sparse.num_features, batch, dtype=torch.int64)
        ids, starts_FB = sparse.ids.split(list(sparse.counts_F)), lengths_FB.cumsum(1) - lengths_FB
        rows = [bag(of, starts) for bag, of, starts in zip(self.bags, ids, starts_FB, strict=True)]
        dense = [] if self.bottom is None else [self.bottom(dense_BN)]
        x_BMD = torch.stack([*rows, *dense], dim=1)
        dots = torch.bmm(x_BMD, x_BMD.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([*dense, dots], dim=1)).squeeze(1).sigmoid()


@dataclass(frozen=True)
class Measured:
    """seconds: of each call, by form."""

    tables: str
    batch: int
    seconds: Mapping[str, Sequence[float]]

    def quantile(self, form: str, percent: int) -> float:
        """Seconds that so many percent of the calls do not exceed."""
        return statistics.quantiles(self.seconds[form], n=100, method="inclusive")[percent - 1]

    def times_eager(self, form: str, percent: int = 50) -> float:
        """How many times as fast as eager the form is."""
        return self.quantile(EAGER, percent) / self.quantile(form, percent)


def forms(model: str, precision: str, folder: Path) -> dict[str, Callable[[SparseIds, Tensor], Tensor]]:
    """The model's forms, which are exported into the folder."""
    for kind in ("safetensors", *GRAPH_FILES):
        with redirect_stdout(sys.stderr):
            export(model, kind, precision, folder / f"{precision} {kind}")
    eager = DhenForClickPrediction.from_pretrained(folder / f"{precision} safetensors").eval()
    graphs = {kind: ExportedGraph(folder / f"{precision} {kind}" / file) for kind, file in GRAPH_FILES.items()}
    dlrm = Dlrm(eager.config).eval()
    return {EAGER: lambda *rows: eager(*rows).probabilities, "AOT": graphs["aot"], "ONNX": graphs["onnx"], "DLRM": dlrm}


@torch.inference_mode()
def measure(arguments: Namespace) -> list[Measured]:
    """All precisions and batches."""
    topology, schema, measured = job.start(), TrainedModel.open(arguments.model).schema, []
    with tempfile.TemporaryDirectory() as folder:
        for precision in arguments.tables:
            with torch.inference_mode(False):
                of_model = forms(arguments.model, precision, Path(folder))
            for batch in arguments.batches:
                rows = random_rows(schema, batch)
                calls = {name: partial(form, *rows) for name, form in of_model.items()}
                seconds = in_turns(calls, topology, WARM_UP + arguments.rounds)
                measured.append(Measured(precision, batch, {name: of[WARM_UP:] for name, of in seconds.items()}))
    job.stop()
    return measured


def show(measured: Sequence[Measured]) -> None:
    """Print rows per second and latencies, and as Markdown how many times as fast as eager each form is."""
    lines = [
        [of.tables, str(of.batch), form, f"{of.batch / of.quantile(form, 50):,.0f}"]
        + [f"{1e3 * of.quantile(form, percent):.3f}" for percent in (50, 99)]
        for of in measured
        for form in of.seconds
    ]
    print_table(["tables", "batch", "form", "rows/s", "p50 ms", "p99 ms"], lines, left=["tables", "form"])
    print("\nHow many times as fast as eager, by p50 (by p99):\n")
    others = [form for form in measured[0].seconds if form != EAGER]
    print("\n".join(head(["tables", "batch", *others])))
    for of in measured:
        cells = [f"{of.times_eager(form):.1f} ({of.times_eager(form, 99):.1f})" for form in others]
        print(row([of.tables, f"{of.batch:,}", *cells]))


def parse_arguments(command_line: Sequence[str] | None = None) -> Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("model", help="trained model with sparse features: a run folder or an exported model")
    parser.add_argument("--tables", nargs="+", choices=PRECISIONS, default=["fp32", "int8"], help="precisions")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 512, 4096], help="rows per call")
    parser.add_argument("--rounds", type=int, default=200, help="calls of each form (default: %(default)s)")
    return parser.parse_args(command_line)


def main() -> None:
    """Measure and print."""
    show(measure(parse_arguments()))


if __name__ == "__main__":
    main()
