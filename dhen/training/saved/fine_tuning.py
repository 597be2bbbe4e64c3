"""Fine-tuning: starts from a trained model on new data. Matching weights are kept; all others start anew.

Tables are matched by feature name. With a vocabulary on both sides, rows are matched by key. Hashed tables match if
their sizes are equal, because the hash is the same. Dense weights are matched by name and shape. A feature keeps its
position among the embeddings if possible, because the first layer's weights depend on the position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dhen.data.preparation.vocabulary import load_vocabulary
from dhen.data.schema import MISSING_ID, Schema, SparseColumn
from dhen.model.configuration_dhen import DhenArchitecture, DhenConfig
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.tables.sharded_tables import ShardedTables
from dhen.training.saved.trained_model import TrainedModel


@dataclass(frozen=True)
class TableMatch:
    """How one feature's table matches the trained model.

    rows: rows in the new table. rows_kept: rows copied from the trained model. rows_dropped: the trained model's other
    rows. how: the reason, in words.
    """

    feature: str
    rows: int
    rows_kept: int
    rows_dropped: int
    how: str


@dataclass(frozen=True)
class StartingPoint:
    """Everything that a run takes from a trained model."""

    trained: TrainedModel
    schema: Schema
    config: DhenConfig
    dense_weights: dict[str, Tensor]
    tables: tuple[TableMatch, ...]
    dropped_tables: tuple[str, ...]
    new_dense_weights: tuple[str, ...]
    dropped_dense_weights: tuple[str, ...]
    _rows: dict[str, Tensor] = field(repr=False, default_factory=dict)

    def load_tables(self, tables: ShardedTables) -> None:
        """Copy the matching rows into this rank's shards. Does not communicate."""
        for shard, tensors in tables.shard_tensors():
            self.fill_table(shard.name, tensors["weight"], shard.first_column, shard.last_column)
            self.fill_uses(shard.name, tensors["uses"])

    def fill_uses(self, name: str, uses: Tensor) -> None:
        """Count one use of each row that is kept and that the trained model's training used."""
        old_rows = self._rows.get(name)
        if old_rows is not None:
            is_kept = old_rows >= 0
            is_used = self.trained.is_used(name, self.trained.num_embeddings[name])
            uses[is_kept.to(uses.device)] = is_used[old_rows[is_kept]].to(uses)

    def fill_table(
        self, name: str, weight: Tensor, first_column: int | None = None, last_column: int | None = None
    ) -> None:
        """Copy the matching rows into these columns of a table, by default all columns."""
        old_rows = self._rows.get(name)
        if old_rows is not None:
            source = self.trained.table(name, first_column, last_column)
            is_kept = old_rows >= 0
            weight[is_kept.to(weight.device)] = source[old_rows[is_kept]].to(weight)

    def report(self) -> str:
        """The counts of kept, new and dropped rows and weights, for the log."""
        kept, rows = sum(match.rows_kept for match in self.tables), sum(match.rows for match in self.tables)
        lines = [f"fine-tuning from {self.trained.folder}"]
        lines.append(f"  tables: {kept:,} of {rows:,} rows kept, {rows - kept:,} new")
        for match in self.tables:
            lines.append(
                f"    {match.feature}: {match.rows_kept:,} of {match.rows:,} rows kept, {match.rows_dropped:,} dropped "
                f"({match.how})"
            )
        lines.append(f"  tables dropped: {len(self.dropped_tables)} {', '.join(self.dropped_tables)}".rstrip())
        lines += [f"    {sentence}" for sentence in (*self.replaced_features(), *self.changed_transforms())]
        total = len(self.dense_weights) + len(self.new_dense_weights)
        lines.append(f"  dense weights: {len(self.dense_weights)} of {total} kept")
        for words, names in (("new", self.new_dense_weights), ("dropped", self.dropped_dense_weights)):
            if names:
                lines.append(f"    {words}: {', '.join(names)}")
        return "\n".join(lines)

    def replaced_features(self) -> list[str]:
        """A sentence for each feature that takes the position of another one, and with it that one's weights."""
        return [
            f"{new.name} replaces {old.name} and uses its weights in the layers"
            for kind in ("sparse", "dense")
            for old, new in zip(getattr(self.trained.schema, kind), getattr(self.schema, kind), strict=False)
            if old.name != new.name
        ]

    def changed_transforms(self) -> list[str]:
        """A sentence for each dense feature that reaches the trained weights on a different scale."""
        before = {column.name: column.transform for column in self.trained.schema.dense}
        return [
            f"{column.name}: transform was {before[column.name]}, is now {column.transform}"
            for column in self.schema.dense
            if before.get(column.name, column.transform) != column.transform
        ]


def start_from(trained: TrainedModel, prepared: Path, schema: Schema) -> StartingPoint:
    """Match the trained model with the data in `prepared`. Does not communicate."""
    sparse = _keep_positions([column.name for column in trained.schema.sparse], schema.sparse)
    dense = _keep_positions([column.name for column in trained.schema.dense], schema.dense)
    schema = replace(schema, sparse=sparse, dense=dense)
    config = config_for(_architecture_of(trained.config), schema)
    new_shapes = _dense_shapes(config)
    old = trained.dense_weights()
    kept = {name: tensor for name, tensor in old.items() if new_shapes.get(name) == tensor.shape}
    old_columns = {column.name: column for column in trained.schema.sparse}
    matches, rows = [], {}
    for column in sparse:
        match, old_rows = _match_table(trained.folder, old_columns.get(column.name), prepared, column)
        matches.append(match)
        if old_rows is not None:
            rows[column.name] = old_rows
    new_names = {column.name for column in sparse}
    return StartingPoint(
        trained=trained,
        schema=schema,
        config=config,
        dense_weights=kept,
        tables=tuple(matches),
        dropped_tables=tuple(name for name in old_columns if name not in new_names),
        new_dense_weights=tuple(name for name in new_shapes if name not in kept),
        dropped_dense_weights=tuple(name for name in old if name not in kept),
        _rows=rows,
    )


def config_for(architecture: DhenArchitecture, schema: Schema) -> DhenConfig:
    """The config of a model with this architecture, for data with this schema."""
    tables = [
        {"name": column.name, "num_embeddings": column.num_embeddings, "pooling": column.pooling}
        for column in schema.sparse
    ]
    values = {item.name: getattr(architecture, item.name) for item in fields(DhenArchitecture)}
    return DhenConfig(**values, num_dense_features=len(schema.dense), sparse_features=tables)


def ignored_architecture(asked: DhenArchitecture, start: StartingPoint) -> list[str]:
    """A sentence for each architecture option that the user changed but that fine-tuning ignores."""
    wanted, default = (config_for(architecture, start.schema) for architecture in (asked, DhenArchitecture()))
    return [
        f"{item.name} {getattr(wanted, item.name)!r} has no effect: fine-tuning keeps "
        f"{getattr(start.config, item.name)!r} from the trained model"
        for item in fields(DhenArchitecture)
        if getattr(wanted, item.name) not in (getattr(default, item.name), getattr(start.config, item.name))
    ]


def frozen_and_new(freeze: str, start: StartingPoint) -> list[str]:
    """A sentence if `freeze` covers weights that the trained model does not have: they would stay random."""
    new_rows = {match.feature: match.rows - match.rows_kept for match in start.tables if match.rows > match.rows_kept}
    if freeze == "tables" and new_rows:
        counts = ", ".join(f"{count:,} of {name}" for name, count in new_rows.items())
        return [f"freeze tables leaves new rows at their random initial values: {counts}"]
    if freeze == "dense" and start.new_dense_weights:
        names = ", ".join(start.new_dense_weights)
        return [f"freeze dense leaves new weights at their random initial values: {names}"]
    return []


def _architecture_of(config: DhenConfig) -> DhenArchitecture:
    return DhenArchitecture(**{item.name: getattr(config, item.name) for item in fields(DhenArchitecture)})


def _keep_positions(old_names: Sequence[str], columns: Sequence[SparseColumn]) -> tuple[SparseColumn, ...]:
    """Reorder the columns: known ones keep their old positions if possible, and new ones fill the gaps."""
    by_name = {column.name: column for column in columns}
    positions = [by_name.get(name) for name in old_names[: len(columns)]]
    positions += [None] * (len(columns) - len(positions))
    placed = {column.name for column in positions if column is not None}
    rest = iter([column for column in columns if column.name not in placed])
    return tuple(column if column is not None else next(rest) for column in positions)


def _dense_shapes(config: DhenConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        module = DhenForClickPrediction(config, with_tables=False)
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _match_table(
    old_folder: Path, old: SparseColumn | None, new_folder: Path, new: SparseColumn
) -> tuple[TableMatch, Tensor | None]:
    """Match one table. Also returns, for each new row, the old row to copy or -1; None if no row matches."""
    rows = new.num_embeddings
    if old is None:
        return TableMatch(new.name, rows, 0, 0, "new feature"), None
    if old.encoding != new.encoding:
        how = f"encoding was {old.encoding}, is now {new.encoding}"
        return TableMatch(new.name, rows, 0, old.num_embeddings, how), None
    pooling = "" if old.pooling == new.pooling else f"; pooling was {old.pooling}, is now {new.pooling}"
    if old.encoding == "hash":
        if old.num_embeddings != rows:
            how = f"hash size was {old.num_embeddings:,}, is now {rows:,}"
            return TableMatch(new.name, rows, 0, old.num_embeddings, how), None
        return TableMatch(new.name, rows, rows, 0, f"same hash{pooling}"), torch.arange(rows)
    old_rows = _rows_by_key(old_folder, new_folder, new.name, rows)
    kept = int((old_rows >= 0).sum())
    return TableMatch(new.name, rows, kept, old.num_embeddings - kept, f"by key{pooling}"), old_rows


def _rows_by_key(old_folder: Path, new_folder: Path, feature: str, rows: int) -> Tensor:
    keys: pa.Array = load_vocabulary(new_folder, feature).keys
    old_ids = load_vocabulary(old_folder, feature).ids(keys)
    old_rows = np.full(rows, -1, dtype=np.int64)
    old_rows[MISSING_ID] = MISSING_ID
    old_rows[1 : len(keys) + 1] = np.where(old_ids == MISSING_ID, -1, old_ids)
    return torch.from_numpy(old_rows)
