"""An exported model once more, with its tables in another precision: fp32, fp16, int8 or int4."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dhen.data.format_version import VERSION_KEY
from dhen.exported_index import INDEX_FILE, version_of
from dhen.model.quantization import SCALE_DTYPES, quantize
from dhen.model.sparse_feature import SparseFeature
from dhen.paths import copy_file
from dhen.tables.storage import InPieces, rows_at_once, write_in_pieces
from dhen.training.saved.trained_model import (
    METADATA,
    TABLES,
    TrainedModel,
    with_table_dtypes,
)

PRECISIONS = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int4": "int4"}
"""What a user types -> dtype of the table in a config."""


def save_with_precision(trained: TrainedModel, precision: str, folder: Path) -> int:
    """Write the model to a new folder, its tables in the precision, each into the file that it had.

    A table is read, converted and written some rows at a time. Returns the bytes of the tables. Raises ValueError if
    the tables are quantized already, if the dimension is odd and the precision int4, or if a value is too large for it.
    """
    dtype, config = PRECISIONS[precision], trained.exported_config
    if any(table.dtype in SCALE_DTYPES for table in config.tables):
        raise ValueError(f"{trained.folder}: its tables are quantized. Export the model that it was made of.")
    if precision == "int4" and config.embedding_dim % 2:
        raise ValueError(f"embedding_dim is {config.embedding_dim}, but int4 needs an even one. Use int8.")
    index = json.loads((trained.folder / INDEX_FILE).read_text(encoding="utf-8"))
    files = {table: index["weight_map"].pop(f"{TABLES}{table.name}.weight") for table in config.tables}
    for path in trained.folder.rglob("*"):
        if path.is_file() and path.name not in files.values():
            copy_file(path, folder / path.relative_to(trained.folder))
    of_file: dict[str, dict[str, InPieces]] = defaultdict(dict)
    for table, file in files.items():
        of_file[file] |= _converted(trained, table, dtype)
    nbytes, dense = sum(tensor.nbytes for of in of_file.values() for tensor in of.values()), trained.dense_weights()
    for name, weight in dense.items():  # `save_pretrained` may put them beside tables
        if index["weight_map"][name] in of_file:
            of_file[index["weight_map"][name]][name] = InPieces.of(weight)
    for file, tensors in of_file.items():
        write_in_pieces(folder / file, tensors, METADATA)
        index["weight_map"] |= dict.fromkeys(tensors, file)
    dense_bytes = sum(weight.nbytes for weight in dense.values())
    index["metadata"] = {"total_size": dense_bytes + nbytes, VERSION_KEY: version_of(index["weight_map"])}
    index["weight_map"] = dict(sorted(index["weight_map"].items()))
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    with_table_dtypes(config, dict.fromkeys([table.name for table in config.tables], dtype)).save_pretrained(folder)
    return nbytes


def _converted(trained: TrainedModel, table: SparseFeature, dtype: str) -> dict[str, InPieces]:
    """The tensors of a table's file, by name."""
    shape, name = (table.num_embeddings, trained.config.embedding_dim), f"{TABLES}{table.name}."

    def pieces(convert: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        step = rows_at_once(shape)
        for at in range(0, shape[0], step):
            piece = convert(trained.table(table.name, slice(at, at + step)))
            if piece.is_floating_point() and not piece.isfinite().all():
                raise ValueError(
                    f"table {table.name!r} has a value that is not finite in {dtype}. Use a wider precision. If it is "
                    "not finite in fp32 either, train the model again."
                )
            yield piece

    if dtype not in SCALE_DTYPES:
        to = getattr(torch, dtype)
        return {f"{name}weight": InPieces(to, shape, pieces(lambda rows: rows.to(to)))}
    quantized = partial(quantize, dtype=dtype)
    values_shape = (shape[0], shape[1] // 2 if dtype == "int4" else shape[1])
    values = InPieces(torch.uint8, values_shape, pieces(lambda rows: quantized(rows).values))
    scale_bias = pieces(lambda rows: quantized(rows).scale_bias)
    return {
        f"{name}weight": values,
        f"{name}scale_bias": InPieces(SCALE_DTYPES[dtype], (shape[0], 2), scale_bias),
    }
