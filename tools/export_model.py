"""Exports a trained model for serving, with its tables in the precision that you choose.

    python tools/export_model.py runs/frappe --format safetensors --tables int8 --output exports/frappe
    python tools/export_model.py runs/frappe/model --format onnx --output exports/frappe_onnx
    python tools/export_model.py runs/frappe --format aot --tables int8 --output exports/frappe_aot

safetensors: the model folder again. onnx: a graph for ONNX Runtime. aot: a compiled graph for this kind of CPU, by
AOTInductor, which needs a C++ compiler. Graphs take batches of any size; inputs.json lists their inputs and outputs.
Each folder has what turns raw rows into inputs, so DhenPipeline can score with it. A graph is compared with the model
on random rows before the folder appears.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a call by path finds the package

import argparse
import importlib.util
import json
import logging
import shutil
import warnings

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from dhen.config.arguments import import_interaction_files
from dhen.data.formats.roles import COLUMNS_FILE
from dhen.data.schema import LABEL, Schema
from dhen.exported_graph import GRAPH_FILES, PIP_ONNX, ExportedGraph
from dhen.model.features import SparseIds
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.model.scoring_graph import ScoringGraph, graph_inputs
from dhen.paths import drafted
from dhen.runtime.extensions_cache import missing_compiler
from dhen.runtime.messages import user_errors
from dhen.training.saved.table_precision import PRECISIONS, save_with_precision
from dhen.training.saved.trained_model import VOCABULARY_FOLDER, TrainedModel

INPUTS_FILE = "inputs.json"
_ROWS = 64
"""Of the batch that traces a graph, and of the one that checks it, less some."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="trained model: a run folder or an exported model")
    parser.add_argument("--format", required=True, choices=["safetensors", *GRAPH_FILES])
    parser.add_argument("--tables", choices=PRECISIONS, default="fp32", help="precision; default: %(default)s")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder to write, new or empty")
    parser.add_argument("--interaction_files", nargs="*", default=[], help="files with your own interactions")
    return parser.parse_args()


def main() -> None:
    """Read the arguments and export. Exit status 1 with a line on stderr for a mistake."""
    with user_errors():
        arguments = parse_arguments()
        import_interaction_files(arguments.interaction_files)
        export(arguments.model, arguments.format, arguments.tables, arguments.output)


def export(model: str, kind: str, precision: str, output: Path) -> None:
    """Write `output`, which appears only when it is complete. Raises ValueError, or FileNotFoundError for no model."""
    trained = TrainedModel.open(model)
    schema = trained.schema
    if output.resolve().is_relative_to(trained.folder.resolve()):
        raise ValueError(f"--output {output} is in the folder of the model. Choose another place.")
    _check_can_export(kind)
    with drafted(output) as draft:
        weights = draft if kind == "safetensors" else draft / "weights"
        nbytes = save_with_precision(trained, precision, weights)
        if kind != "safetensors":
            described = write_graph(schema, kind, weights, draft)
            (draft / INPUTS_FILE).write_text(json.dumps({"tables": precision} | described, indent=2) + "\n")
            for name in ("schema.json", COLUMNS_FILE, VOCABULARY_FOLDER, "README.md"):
                if (weights / name).exists():
                    (weights / name).rename(draft / name)
            shutil.rmtree(weights)
    config = trained.exported_config
    values = sum(table.num_embeddings for table in config.tables) * config.embedding_dim
    share = f", {nbytes / (4 * values):.1%} of fp32" if values else ""
    print(f"{output}: {kind}; tables in {precision}, {nbytes:,} bytes{share}")


def _check_can_export(kind: str) -> None:
    """Raise ValueError if a package or a compiler is missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if kind == "onnx" and missing:
        raise ValueError(f"--format onnx needs {', '.join(missing)}. Run `{PIP_ONNX}`.")
    if kind == "aot" and (names := missing_compiler()):
        raise ValueError(f"--format aot needs a C++ compiler ({names}) on PATH. Install one.")


def write_graph(schema: Schema, kind: str, weights: Path, folder: Path) -> dict:
    """Write the graph of the model in `weights`, compare the two, and return what describes the graph's inputs.

    Raises ValueError if the model has no graph, or if the graph computes something else.
    """
    disable_progress_bar()
    model = DhenForClickPrediction.from_pretrained(weights).eval()
    trunk = DhenForClickPrediction.from_pretrained(weights, with_tables=False).eval()
    graph = ScoringGraph(model, trunk).eval()
    file, inputs = folder / GRAPH_FILES[kind], graph_inputs(*random_rows(schema, _ROWS))
    axes = {"dense": {0: "batch"}, "weights": {0: "ids"}, "lengths": {1: "batch"}}
    axes["ids"] = {0: "ids" if "lengths" in inputs else "batch"}
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            _write(graph, kind, inputs, {name: axes[name] for name in inputs}, file)
        exported = ExportedGraph(file)
    except Exception as error:  # of any kind, by what traces, compiles and loads
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"this model has no {kind} graph ({reason:.300}). Use --format safetensors.") from error
    return {
        "inputs": {name: _described(tensor, axes[name]) for name, tensor in inputs.items()},
        "outputs": {"probabilities": {"dtype": "float32", "shape": ["batch", 1 + len(schema.task_names)]}},
        "tasks": [LABEL, *schema.task_names],
        "dense": [column.name for column in schema.dense],
        "lookups": [{"feature": column.name, "rows": column.num_embeddings} for column in schema.lookups],
        "largest_difference": compare(model, exported, schema),
    }


def _write(graph: ScoringGraph, kind: str, inputs: dict[str, Tensor], axes: dict, file: Path) -> None:
    dims = {"batch": torch.export.Dim("batch", min=1), "ids": torch.export.Dim("ids", min=0)}
    shapes = {name: {axis: dims[dim] for axis, dim in of.items()} for name, of in axes.items()}
    if kind == "aot":
        program = torch.export.export(graph, (), inputs, dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    else:
        for name in ("torch.onnx", "onnx_ir"):
            logging.getLogger(name).setLevel(logging.ERROR)
        names = {"input_names": list(inputs), "output_names": ["probabilities"]}
        torch.onnx.export(graph, (), file, kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False, **names)


def _described(tensor: Tensor, axes: dict[int, str]) -> dict:
    shape = [axes.get(axis, size) for axis, size in enumerate(tensor.shape)]
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}


def random_rows(schema: Schema, rows: int, most_ids: int = 3) -> tuple[SparseIds | None, Tensor]:
    """Random ids and dense features of rows of the schema. most_ids: in a bag, if the schema has bags."""
    dense_BN, lookups = torch.randn(rows, len(schema.dense)), schema.lookups
    if not lookups:
        return None, dense_BN
    has_bags = any(column.is_multi_valued for column in schema.sparse)
    lengths_FB = (
        torch.randint(0, most_ids + 1, (len(lookups), rows)) if has_bags else torch.ones(len(lookups), rows).long()
    )
    counts = lengths_FB.sum(1).tolist()
    ids = [torch.randint(column.num_embeddings, (count,)) for column, count in zip(lookups, counts, strict=True)]
    has_weights = any(column.is_weighted for column in schema.sparse)
    weights = torch.rand(sum(counts)) if has_weights else None
    return SparseIds(torch.cat(ids), len(lookups), lengths_FB if has_bags else None, weights), dense_BN


def compare(model: DhenForClickPrediction, graph: ExportedGraph, schema: Schema) -> float:
    """The largest difference of the probabilities, in batches of several sizes. Raises ValueError if it is large."""
    differences = []
    for rows, most_ids in ((1, 0), (1, 3), (_ROWS + 5, 3)):
        sparse, dense_BN = random_rows(schema, rows, most_ids)
        with torch.no_grad():
            expected = model(sparse, dense_BN).probabilities
        differences.append((graph(sparse, dense_BN) - expected).abs().max())
    largest = torch.stack(differences).max().item()  # NaN if one is
    print(f"largest difference of a probability from the model's: {largest:.1e}")
    if not largest < 1e-4:
        raise ValueError("the graph computes something else than the model. Use --format safetensors.")
    return largest


if __name__ == "__main__":
    main()
