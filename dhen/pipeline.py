"""DhenPipeline: scores rows in Python, from data frames or dictionaries, with an exported model.

It needs torch and transformers, but neither DeepSpeed nor FBGEMM, and runs in one process.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dhen.data.formats.columns import plain
from dhen.data.formats.criteo import CriteoReader
from dhen.data.formats.delimited import DelimitedReader
from dhen.data.formats.parquet import check_types
from dhen.data.formats.raw_rows import RowChecks
from dhen.data.formats.roles import COLUMNS_FILE, ColumnRoles, load_roles
from dhen.data.loading.batches import as_sparse_ids
from dhen.data.preparation.encoding.encoder import Encoder
from dhen.data.preparation.encoding.vocabulary import load_vocabulary
from dhen.data.schema import LABEL, Schema
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.model.names import listed, quoted


class DhenPipeline:
    """An exported model, with what turns raw rows into its inputs.

    Rows are a pandas or polars data frame, an Arrow table, a dictionary of columns, or dictionaries, one per row. They
    have the columns of the data that the model was trained on; other columns are ignored.
    """

    def __init__(self, model: DhenForClickPrediction, schema: Schema, roles: ColumnRoles, encoder: Encoder) -> None:
        self.model, self.schema, self.roles, self._encoder = model.eval(), schema, roles, encoder
        is_criteo = schema.source.get("format") == "criteo"
        self._reader = (CriteoReader if is_criteo else DelimitedReader)(roles, is_label_required=False)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "DhenPipeline":
        """Load the model at `path`, an exported model or a run folder. Raises FileNotFoundError."""
        folder = next((place for place in (Path(path), Path(path) / "model") if (place / COLUMNS_FILE).is_file()), None)
        if folder is None:
            raise FileNotFoundError(
                f"{path}: no exported model with {COLUMNS_FILE}, which says what the columns of raw rows are. Name a "
                "run folder or its model/. If the model is older than this file, resume its run to export it again."
            )
        schema = Schema.load(folder)
        encoder = Encoder(
            schema.dense, schema.sparse, {name: load_vocabulary(folder, name) for name in schema.looked_up}
        )
        return cls(DhenForClickPrediction.from_pretrained(folder), schema, load_roles(folder / COLUMNS_FILE), encoder)

    def predict(self, rows: Any, batch_size: int = 4096) -> np.ndarray:
        """The click probability of each row, float32, in their order.

        Raises ValueError that names the column, or the row (from 0), the value and what is allowed.
        """
        return self.predict_tasks(rows, batch_size)[LABEL]

    def predict_tasks(self, rows: Any, batch_size: int = 4096) -> dict[str, np.ndarray]:
        """As `predict`, by task: those of the label, and of each further task of the model."""
        table, names = self._encoded(rows), [LABEL, *self.model.config.tasks]
        scores = np.empty((len(names), table.num_rows), np.float32)
        for first in range(0, table.num_rows, batch_size):
            batch = table.slice(first, batch_size)
            dense_BN = np.empty((batch.num_rows, len(self.schema.dense)), np.float32)
            for at, column in enumerate(self.schema.dense):
                dense_BN[:, at] = batch[column.name]
            with torch.no_grad():
                sparse = as_sparse_ids(batch, self.schema) if self.schema.sparse else None
                output = self.model(sparse, torch.from_numpy(dense_BN))
            logits = [output.logits, *(() if output.task_logits is None else output.task_logits.unbind(1))]
            scores[:, first : first + batch.num_rows] = torch.stack(logits).sigmoid()
        return dict(zip(names, scores, strict=True))

    def _encoded(self, rows: Any) -> pa.Table:
        columns = _as_columns(rows)
        features = (*self.roles.dense, *self.roles.sparse)
        needed = dict.fromkeys(column for feature in features for column in feature.columns)
        for name in needed:
            if name not in columns:
                near = get_close_matches(name, columns, n=1)
                hint = f" Did you mean {quoted(near[0])}?" if near else ""
                raise ValueError(f"the rows have no column {quoted(name)}. They have {listed(list(columns))}.{hint}")
        raw = {name: self._without_blanks(plain(columns[name])) for name in needed}
        check_types(pa.schema([(name, values.type) for name, values in raw.items()]), self.roles, "rows")
        num_rows = len(next(iter(raw.values())))
        checks = RowChecks("rows", np.arange(num_rows), lambda i: str({name: raw[name][i].as_py() for name in raw}))
        chunk = checks.finish(self._reader.typed(raw, checks), end_row=num_rows)
        if chunk.bad:
            raise ValueError(str(chunk.bad[0]))
        return self._encoder.encode(chunk.table)

    def _without_blanks(self, values: pa.Array) -> pa.Array:
        """Texts that count as blank become null, as in text files."""
        if not pa.types.is_string(values.type):
            return values
        return pc.if_else(pc.is_in(values, pa.array(self.roles.null_values)), pa.scalar(None, pa.string()), values)


def _as_columns(rows: Any) -> dict[str, pa.Array]:
    """The columns of a data frame, an Arrow table, a dictionary of columns, or dictionaries."""
    if hasattr(rows, "to_arrow"):  # polars
        rows = rows.to_arrow()
    if isinstance(rows, pa.Table):
        return {name: rows[name].combine_chunks() for name in rows.column_names}
    if hasattr(rows, "columns") and hasattr(rows, "index"):  # pandas
        return {str(name): _as_array(rows[name]) for name in rows.columns}
    if isinstance(rows, Mapping):
        return {name: _as_array(values) for name, values in rows.items()}
    rows = list(rows) if isinstance(rows, Iterable) else [rows]
    if not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(
            f"the rows have the type {type(rows[0]).__name__}. Use a pandas or polars data frame, an Arrow table, or "
            "dictionaries."
        )
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _as_array([row.get(name) for row in rows]) for name in names}


def _as_array(values: Any) -> pa.Array:
    """An Arrow array; values of several types become texts."""
    try:
        array = pa.array(values, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        array = pa.array([None if value is None or value != value else str(value) for value in values], pa.string())
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
