"""DhenPipeline: scores rows in Python, from data frames or dictionaries, with an exported model.

It needs torch and transformers, but neither DeepSpeed nor FBGEMM, and runs in one process.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time
from difflib import get_close_matches
from numbers import Number, Real
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub import create_repo, snapshot_download, upload_folder
from transformers.utils import CONFIG_NAME

from dhen.data.formats.columns import plain
from dhen.data.formats.criteo import CriteoReader
from dhen.data.formats.delimited import DelimitedReader
from dhen.data.formats.parquet import check_types
from dhen.data.formats.raw_rows import RowChecks
from dhen.data.formats.roles import COLUMNS_FILE, load_roles
from dhen.data.loading.batches import as_sparse_ids
from dhen.data.preparation.encoding.encoder import Encoder
from dhen.data.preparation.encoding.vocabulary import load_vocabulary
from dhen.data.schema import LABEL, Schema
from dhen.exported_graph import GRAPH_FILES, ExportedGraph
from dhen.exported_index import COPY_AGAIN, INDEX_FILE, read_index
from dhen.model.features import SparseIds
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.model.names import listed, quoted
from dhen.model.scoring_graph import graph_inputs

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class DhenPipeline:
    """An exported model, or a graph by tools/export_model.py, with what turns raw rows into its inputs.

    Rows are a pandas or polars data frame, an Arrow table, a dictionary of columns, or dictionaries, one per row. They
    have the columns of the data that the model was trained on; other columns are ignored.
    """

    def __init__(self, folder: Path) -> None:
        """folder: of an exported model. Raises FileNotFoundError or ValueError if it is not complete and whole."""
        self.folder, self.schema, self.roles = folder, Schema.load(folder), load_roles(folder / COLUMNS_FILE)
        self.model = _load_model(folder)
        schema, roles = self.schema, self.roles
        vocabularies = {name: load_vocabulary(folder, name) for name in schema.looked_up}
        self._encoder = Encoder(schema.dense, schema.sparse, vocabularies)
        is_criteo = schema.source.get("format") == "criteo"
        self._reader = (CriteoReader if is_criteo else DelimitedReader)(roles, is_label_required=False)

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> "DhenPipeline":
        """Load the model at `path`: an exported model, a run folder, or a name on the Hugging Face hub (owner/name).

        revision: of a model on the hub. Raises FileNotFoundError, or ValueError if a file is damaged or of another
        format.
        """
        if not Path(path).exists() and _HUB_NAME.fullmatch(str(path)):
            try:
                path = snapshot_download(str(path), revision=revision)
            except OSError as error:  # of huggingface_hub
                reason = str(error).strip().partition("\n")[0]
                raise FileNotFoundError(
                    f"{path}: no such folder here, and nothing came from the Hugging Face hub ({reason:.300}). Check "
                    "the path or the name."
                ) from error
        folder = next((place for place in (Path(path), Path(path) / "model") if (place / COLUMNS_FILE).is_file()), None)
        if folder is None:
            raise FileNotFoundError(
                f"{path}: no exported model with {COLUMNS_FILE}, which says what the columns of raw rows are. Name a "
                "run folder or its model/. A model that is older than this file, or was trained on a folder that "
                "another program prepared, does not have it: use recipes/predict.py, or train it from raw files."
            )
        return cls(folder)

    def push_to_hub(self, name: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the exported model to the Hugging Face hub as owner/name, and return its address.

        token: by default the one that `hf auth login` stored. Raises what huggingface_hub raises.
        """
        repository = create_repo(name, private=private, exist_ok=True, token=token)
        upload_folder(repo_id=repository.repo_id, folder_path=self.folder, token=token)
        return str(repository)

    def predict(self, rows: Any, batch_size: int = 4096) -> np.ndarray:
        """The click probability of each row, float32, in their order.

        Raises ValueError that names the column, or the row (from 0), the value and what is allowed.
        """
        return self.predict_tasks(rows, batch_size)[LABEL]

    def predict_tasks(self, rows: Any, batch_size: int = 4096) -> dict[str, np.ndarray]:
        """As `predict`, by task: those of the label, and of each further task of the model."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {quoted(batch_size)}. Use a whole number, 1 or more.")
        table, names = self._encoded(rows), [LABEL, *self.schema.task_names]
        scores = np.empty((len(names), table.num_rows), np.float32)
        for first in range(0, table.num_rows, batch_size):
            batch = table.slice(first, batch_size)
            with torch.no_grad():
                output = self.model(*self._tensors(batch))
            if not isinstance(output, torch.Tensor):
                output = output.probabilities
            scores[:, first : first + batch.num_rows] = output.t()
        return dict(zip(names, scores, strict=True))

    def inputs(self, rows: Any) -> dict[str, np.ndarray]:
        """The inputs of an exported graph for these rows, by name (recipes/EXPORT.md). Raises as `predict`, and
        ValueError if there are none.
        """
        encoded = self._encoded(rows)
        if not encoded:
            raise ValueError("there are no rows. A graph takes one or more.")
        return {name: tensor.numpy() for name, tensor in graph_inputs(*self._tensors(encoded)).items()}

    def _tensors(self, batch: pa.Table) -> tuple[SparseIds | None, torch.Tensor]:
        """The ids and dense_BN of encoded rows."""
        dense_BN = np.empty((batch.num_rows, len(self.schema.dense)), np.float32)
        for at, column in enumerate(self.schema.dense):
            dense_BN[:, at] = batch[column.name]
        return as_sparse_ids(batch, self.schema) if self.schema.sparse else None, torch.from_numpy(dense_BN)

    def _encoded(self, rows: Any) -> pa.Table:
        features = (*self.roles.dense, *self.roles.sparse)
        needed = dict.fromkeys(column for feature in features for column in feature.columns)
        columns, names = _as_columns(rows, needed)
        for name in needed:
            if name not in columns:
                near = get_close_matches(name, names, n=1)
                hint = f" Did you mean {quoted(near[0])}?" if near else ""
                has = listed(names) or "no columns"
                raise ValueError(f"the rows have no column {quoted(name)}. They have {has}.{hint}")
        raw = {name: plain(columns[name]) for name in needed}
        check_types(pa.schema([(name, values.type) for name, values in raw.items()]), self.roles, "rows")
        num_rows = len(next(iter(raw.values())))
        checks = RowChecks("rows", np.arange(num_rows), lambda i: str({name: raw[name][i].as_py() for name in raw}))
        chunk = checks.finish(self._reader.typed(raw, checks), end_row=num_rows)
        if chunk.bad:
            raise ValueError(str(chunk.bad[0]))
        return self._encoder.encode(chunk.table)


def _load_model(folder: Path) -> ExportedGraph | DhenForClickPrediction:
    """A graph, or the model itself. Raises FileNotFoundError or ValueError if a file is missing or damaged."""
    for name in GRAPH_FILES.values():
        if (folder / name).is_file():
            return ExportedGraph(folder / name)
    if not (folder / CONFIG_NAME).is_file():
        names = ", ".join([CONFIG_NAME, *GRAPH_FILES.values()])
        raise FileNotFoundError(f"{folder}: none of the files {names} is here. {COPY_AGAIN}")
    if (folder / INDEX_FILE).is_file():
        read_index(folder)
    try:
        model, found = DhenForClickPrediction.from_pretrained(folder, output_loading_info=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{folder}: cannot be loaded ({reason:.300}). {COPY_AGAIN}") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{folder}: the weights {listed(missing)} are missing. {COPY_AGAIN}")
    return model.eval()


def _as_columns(rows: Any, needed: Iterable[str]) -> tuple[dict[str, pa.Array], list[str]]:
    """The needed columns of a data frame, an Arrow table, a dictionary of columns, or dictionaries, and all names.

    No rows without any columns have the needed ones, all empty.
    """
    if hasattr(rows, "to_arrow"):  # polars
        rows = rows.to_arrow()
    if isinstance(rows, pa.RecordBatch):
        rows = pa.Table.from_batches([rows])
    if isinstance(rows, pa.Table):
        pairs = list(zip(rows.column_names, rows.columns, strict=True))
    elif hasattr(rows, "columns") and hasattr(rows, "iloc"):  # pandas
        pairs = [(str(name), rows.iloc[:, place]) for place, name in enumerate(rows.columns)]
    elif isinstance(rows, Mapping):
        pairs = list(rows.items())
    else:
        rows = list(rows) if isinstance(rows, Iterable) else [rows]
        for row in rows:
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"the rows have the type {type(row).__name__}. Use a pandas or polars data frame, an Arrow table, "
                    "or dictionaries."
                )
        names = dict.fromkeys(name for row in rows for name in row)
        pairs = [(name, [row.get(name) for row in rows] if name in needed else []) for name in names]
    if not pairs and not len(rows):
        pairs = [(name, []) for name in needed]
    names, own = [str(name) for name, _ in pairs], [(name, values) for name, values in pairs if name in needed]
    columns = {name: _as_array(name, values) for name, values in own}
    if len(columns) < len(own):
        raise ValueError("two columns of the rows have the same name. Rename one of them.")
    sizes = {len(values): name for name, values in columns.items()}
    if len(sizes) > 1:
        has = ", ".join(f"{quoted(name)} has {size}" for size, name in sizes.items())
        raise ValueError(f"the columns have different numbers of values: {has}. Use equally many.")
    return columns, names


def _as_array(name: str, values: Any) -> pa.Array:
    """An Arrow array; values of several types become texts. Raises ValueError that names the column."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"column {name!r} has the type {type(values).__name__}. Use a list; for one row, use [row].")
    values = values if hasattr(values, "dtype") else list(values)
    kinds = {type(value) for value in values} if isinstance(values, list) else set()
    if {date, datetime} <= kinds:  # Arrow would drop the time
        values = [datetime.combine(value, time()) if type(value) is date else value for value in values]
    try:
        array = pa.array(values, from_pandas=True)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        has_lists = any(isinstance(value, _LISTS) for value in values)
        as_text, kind = (_text_list, pa.list_(pa.string())) if has_lists else (_text, pa.string())
        try:
            array = pa.array([as_text(value) for value in values], kind)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise ValueError(f"column {name!r}: {error}") from error
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


_LISTS = (list, tuple, np.ndarray)


def _text_list(values: Any) -> list[str | None] | None:
    if isinstance(values, _LISTS):
        return [_text(value) for value in values]
    if _text(values) is None:
        return None
    raise ValueError(f"{quoted(values)} stands beside lists. Use lists in all rows")


def _text(value: Any) -> str | None:
    """A value as text; None if it is blank."""
    if value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, Real) and value != value):
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str | Number | np.generic | date):
        return str(value)
    raise ValueError(f"{quoted(value)} has the type {type(value).__name__}. Use numbers, texts, or lists of them")
