"""Fine-tuning: starts from a trained model on new data. Matching weights are kept; all others start anew.

Tables are matched by name. With a vocabulary on both sides, rows are matched by key. Hashed tables match if
their sizes are equal, because the hash is the same; tables of bins match if the bins are the same. Dense weights are
matched by name, and those that belong to a feature by the name of the feature. A new feature's weights in the layers
start at 0. It still changes what attention, convolution, eq. 7's deep cross and norms over the features compute.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from dhen.config.command_line import ArgumentError
from dhen.data.preparation.encoding.vocabulary import shared_ids
from dhen.data.schema import MISSING_ID, DenseColumn, Schema, SparseColumn
from dhen.model.configuration_dhen import DhenArchitecture, DhenConfig
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.model.parts import frozen_parts, part_of
from dhen.model.tasks import LABEL_TASK
from dhen.runtime.collectives import shared_out
from dhen.runtime.topology import Topology
from dhen.training.saved.trained_model import TrainedModel

Column = TypeVar("Column", SparseColumn, DenseColumn)
FeatureNames = tuple[tuple[str, ...], tuple[str, ...]]
"""Names of the sparse and of the dense features, in order."""
_ROWS_AT_ONCE = 1 << 16
"""Rows of a trained table that are in host memory while they are copied."""


@dataclass(frozen=True)
class TableMatch:
    """How one table matches the trained model.

    rows: rows in the new table. rows_kept: rows copied from the trained model. rows_dropped: the trained model's other
    rows. how: the reason, in words.
    """

    table: str
    rows: int
    rows_kept: int
    rows_dropped: int
    how: str


@dataclass(frozen=True)
class StartingPoint:
    """Everything that a run takes from a trained model. prepared: the folder of the new data."""

    trained: TrainedModel
    prepared: Path
    schema: Schema
    config: DhenConfig
    dense_weights: dict[str, Tensor]
    tables: tuple[TableMatch, ...]
    new_features: tuple[str, ...]
    dropped_features: tuple[str, ...]
    new_dense_weights: tuple[str, ...]
    dropped_dense_weights: tuple[str, ...]

    def fill_table(
        self, name: str, weight: Tensor | None = None, uses: Tensor | None = None, columns: slice = slice(None)
    ) -> None:
        """Copy the matching rows into these columns of a table, and how often the trained model used them."""
        for old, new in self.kept_rows(name):
            rows = slice(int(old[0]), int(old[-1]) + 1)
            if weight is not None:
                weight[new.to(weight.device)] = self.trained.table(name, rows, columns)[old - rows.start].to(weight)
            if uses is not None:
                uses[new.to(uses.device)] = self.trained.uses(name, rows)[old - rows.start].to(uses)

    def kept_rows(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of the trained model's table that are kept, ascending, and where they go. In pieces, none empty."""
        match = next(match for match in self.tables if match.table == name)
        encodings = {column.table_name: column.encoding for column in self.schema.sparse}
        if match.rows_kept and encodings[name] == "vocabulary":
            yield torch.tensor([MISSING_ID]), torch.tensor([MISSING_ID])
            for old, new in shared_ids(self.trained.folder, self.prepared, name):
                pieces = (torch.from_numpy(rows).split(_ROWS_AT_ONCE) for rows in (old, new))
                yield from ((of_old, of_new) for of_old, of_new in zip(*pieces, strict=True) if len(of_old))
        else:
            for first in range(0, match.rows_kept, _ROWS_AT_ONCE):
                rows = torch.arange(first, min(first + _ROWS_AT_ONCE, match.rows_kept))
                yield rows, rows

    def matched(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Optimizer states of the trained model's dense weights, by name, as they belong to the weights that are kept.

        New parts of a weight have state 0.
        """
        names = _names(self.trained.schema), _names(self.schema)
        kept = match_dense_weights(states, self.trained.config, names[0], self.config, names[1], are_states=True)
        return {name: state for name, state in kept.items() if name in self.dense_weights}

    def report(self) -> str:
        """The counts of kept, new and dropped rows and weights, for the log."""
        kept, rows = sum(match.rows_kept for match in self.tables), sum(match.rows for match in self.tables)
        lines = [f"fine-tuning from {self.trained.folder}"]
        lines.append(f"  tables: {kept:,} of {rows:,} rows kept, {rows - kept:,} new")
        for match in self.tables:
            lines.append(
                f"    {match.table}: {match.rows_kept:,} of {match.rows:,} rows kept, {match.rows_dropped:,} dropped "
                f"({match.how})"
            )
        for words, names in (("new features", self.new_features), ("dropped features", self.dropped_features)):
            if names:
                lines.append(f"  {words}: {', '.join(names)}")
        lines += [f"    {sentence}" for sentence in (*self.changed_shortcut(), *self.changed_transforms())]
        for name in ("head_mlp", "head_inputs", "task_layers"):
            old, new = getattr(self.trained.config, name), getattr(self.config, name)
            lines += [f"  {name} was {old}, is now {new}"] * (old != new)
        total = len(self.dense_weights) + len(self.new_dense_weights)
        lines.append(f"  dense weights: {len(self.dense_weights)} of {total} kept")
        for words, names in (("new", self.new_dense_weights), ("dropped", self.dropped_dense_weights)):
            if names:
                lines.append(f"    {words}: {', '.join(names)}")
        return "\n".join(lines)

    def changed_shortcut(self) -> list[str]:
        """A sentence for each feature that goes where another one went, through a shortcut that has no weights."""
        if any("layers.0.shortcut" in name for name in (*self.dense_weights, *self.new_dense_weights)):
            return []
        return [
            f"{new.name} takes the place of {old.name} in the first layer's shortcut, which has no weights"
            for old, new in zip(self.trained.schema.sparse, self.schema.sparse, strict=False)
            if old.name != new.name
        ]

    def changed_transforms(self) -> list[str]:
        """A sentence for each dense feature that reaches the trained weights on a different scale."""
        before, sentences = {column.name: column for column in self.trained.schema.dense}, []
        for new in self.schema.dense:
            old = before.get(new.name, new)
            if old.transform != new.transform:
                sentences.append(f"{new.name}: transform was {old.transform}, is now {new.transform}")
            if _scale(old) != _scale(new):
                what = "scale (mean, standard deviation)"
                sentences.append(f"{new.name}: {what} was {_scale(old)}, is now {_scale(new)}")
        return sentences


def _scale(column: DenseColumn) -> str:
    return "none" if column.mean is None else f"({column.mean:.6g}, {column.std:.6g})"


def start_from(
    trained: TrainedModel,
    prepared: Path,
    schema: Schema,
    new_head: DhenArchitecture | None = None,
    topology: Topology | None = None,
) -> StartingPoint:
    """Match the trained model with the data in `prepared`.

    new_head: an architecture. The heads then start anew, with its head_mlp, head_inputs, task_layers and task_weights.
    topology: the ranks share out the vocabularies. They communicate; all of them call it. Without it, this process
    reads all.

    Raises ArgumentError if the model has tables, but no row of them can be kept.
    """
    old = trained.schema
    sparse, dense = _keep_places(old.sparse, schema.sparse), _keep_places(old.dense, schema.dense)
    schema = replace(schema, sparse=sparse, dense=dense)
    architecture, before = trained.config.architecture, trained.dense_weights()
    if new_head:
        taken = ("head_mlp", "head_inputs", "task_layers", "task_weights")
        architecture = replace(architecture, **{name: getattr(new_head, name) for name in taken})
    elif not schema.tasks:
        architecture = replace(architecture, task_weights=None)
    elif isinstance(weights := architecture.task_weights, dict):
        known = (LABEL_TASK, *schema.task_names)
        architecture = replace(architecture, task_weights={name: weights[name] for name in known if name in weights})
    config = config_for(architecture, schema)
    kept = match_dense_weights(before, trained.config, _names(old), config, _names(schema))
    if new_head:
        depth = len(config.layer_specs)
        kept = {name: weight for name, weight in kept.items() if part_of(name, depth) != "head"}
    match = partial(_match_table, trained, prepared)
    firsts: dict[str, SparseColumn] = {}
    for column in sparse:
        firsts.setdefault(column.table_name, column)
    of_tables = list(firsts.values())
    matches = shared_out(of_tables, match, topology) if topology else list(map(match, of_tables))
    _check_any_kept(trained, matches)
    before_names, names = (sum(_names(of), ()) for of in (old, schema))
    return StartingPoint(
        trained=trained,
        prepared=prepared,
        schema=schema,
        config=config,
        dense_weights=kept,
        tables=tuple(matches),
        new_features=tuple(name for name in names if name not in before_names),
        dropped_features=tuple(name for name in before_names if name not in names),
        new_dense_weights=tuple(name for name in _dense_part(config).state_dict() if name not in kept),
        dropped_dense_weights=tuple(name for name in before if name not in kept),
    )


def match_dense_weights(
    old: Mapping[str, Tensor],
    old_config: DhenConfig,
    old_names: FeatureNames,
    config: DhenConfig,
    names: FeatureNames,
    *,
    are_states: bool = False,
) -> dict[str, Tensor]:
    """The weights that a model with these features takes from the old one: by name, and by feature where they have one.

    What belongs to a new feature is 0, or 1 in a norm's scale. A weight whose shape depends on the features, but which
    does not say how (a user's interaction), is kept if the features are the same. are_states: `old` are states of an
    optimizer, which are 0 for what is new.
    """
    module, old_module = _dense_part(config), _dense_part(old_config)
    axes, old_axes = module.input_axes(*names), old_module.input_axes(*old_names)
    # A shortcut without weights is X itself.
    shortcuts = {name: torch.eye(len(of[1])) for name, of in old_axes.items() if name.endswith("shortcut.mix.weight")}
    old = old if are_states else shortcuts | old
    undescribed = set() if names == old_names else _shaped_by_features(config) - axes.keys()
    kept = {}
    for name, tensor in module.state_dict().items():
        if name in old and name not in undescribed and axes.get(name, {}).keys() == old_axes.get(name, {}).keys():
            is_scale = tensor.dim() == 1 and name.endswith((".weight", ".running_var"))
            fill = 1.0 if is_scale and not are_states else 0.0
            moved = _moved(old[name], old_axes.get(name, {}), axes.get(name, {}), fill)
            if moved.shape == tensor.shape:
                kept[name] = moved
    return kept


def _moved(
    old: Tensor, old_axes: Mapping[int, Sequence[Hashable]], axes: Mapping[int, Sequence[Hashable]], fill: float
) -> Tensor:
    """`old` with the entries of each axis in the order of the new labels, and `fill` for labels that it lacks."""
    for axis, labels in axes.items():
        place = {label: index for index, label in enumerate(old_axes[axis])}
        rows = torch.tensor([place.get(label, -1) for label in labels])
        new = old.new_full((*old.shape[:axis], len(labels), *old.shape[axis + 1 :]), fill)
        old = new.index_copy(axis, (rows >= 0).nonzero()[:, 0], old.index_select(axis, rows[rows >= 0]))
    return old


def _shaped_by_features(config: DhenConfig) -> set[str]:
    """The dense weights that have another shape if there is one more feature."""
    shapes = {name: tensor.shape for name, tensor in _dense_part(config).state_dict().items()}
    sparse, num_dense = config.sparse_features, config.num_dense_features
    more = [([*sparse, {"name": "one more", "num_embeddings": 1}], num_dense)]
    if num_dense:
        more.append((sparse, num_dense + 1))
    values = vars(config.architecture)
    grown = [
        _dense_part(
            DhenConfig(**values, sparse_features=tables, num_dense_features=count, tasks=config.tasks)
        ).state_dict()
        for tables, count in more
    ]
    return {name for name, shape in shapes.items() if any(name not in of or of[name].shape != shape for of in grown)}


def config_for(architecture: DhenArchitecture, schema: Schema) -> DhenConfig:
    """The config of a model with this architecture, for data with this schema."""
    tables = [
        {"name": column.name, "num_embeddings": column.num_embeddings, "pooling": column.pooling}
        | {key: told for key in ("table", "target", "max_length") if (told := getattr(column, key)) is not None}
        for column in schema.sparse
    ]
    if architecture.task_weights and not schema.tasks:
        raise ArgumentError("task_weights has no effect: the schema has no further tasks. Remove it.")
    features = {"num_dense_features": len(schema.dense), "sparse_features": tables, "tasks": list(schema.task_names)}
    return DhenConfig(**vars(architecture), **features)


def ignored_architecture(asked: DhenArchitecture, start: StartingPoint) -> list[str]:
    """A sentence for each architecture option that the user changed but that fine-tuning ignores."""
    wanted, default = (vars(config_for(each, start.schema).architecture) for each in (asked, DhenArchitecture()))
    kept = vars(start.config.architecture)
    return [
        f"{name} {value!r} has no effect: fine-tuning keeps {kept[name]!r} from the trained model"
        for name, value in wanted.items()
        if value not in (default[name], kept[name])
    ]


def frozen_and_new(freeze: str, start: StartingPoint) -> list[str]:
    """A sentence for each frozen part with weights that the trained model does not have: they are never trained."""
    new_rows = {match.table: match.rows - match.rows_kept for match in start.tables if match.rows > match.rows_kept}
    num_layers, sentences = len(start.config.layer_specs), []
    frozen = frozen_parts(freeze, num_layers)
    if "tables" in frozen and new_rows:
        counts = ", ".join(f"{count:,} of {name}" for name, count in new_rows.items())
        sentences += [f"freeze tables leaves new rows untrained, so each counts as the mean of its table: {counts}"]
    if new := [name for name in start.new_dense_weights if part_of(name, num_layers) in frozen]:
        sentences += [f"freeze {freeze} leaves new weights at their random initial values: {', '.join(new)}"]
    dense = _names(start.schema)[1] if "features" in frozen else ()
    if blocked := [name for name in start.new_features if "layers.0" in frozen or name in dense]:
        sentences += [f"freeze {freeze} leaves new features without effect on these parts: {', '.join(blocked)}"]
    return sentences


def lost_tables(start: StartingPoint) -> list[str]:
    """A sentence for each table that the trained model has, but from which no row is kept."""
    known = {column.table_name for column in start.trained.schema.sparse}
    return [
        f"no row of {match.table} is taken over: {match.how}"
        for match in start.tables
        if match.table in known and match.rows_kept <= 1 < match.rows
    ]


def _keep_places(old: Sequence[Column], columns: Sequence[Column]) -> tuple[Column, ...]:
    """Reorder the columns: known ones keep their old places if possible, and new ones fill the gaps.

    The place matters in a shortcut without weights, and in weights that do not say which feature they belong to.
    """
    by_name = {column.name: column for column in columns}
    places = [by_name.get(column.name) for column in old[: len(columns)]]
    places += [None] * (len(columns) - len(places))
    placed = {column.name for column in places if column is not None}
    rest = iter([column for column in columns if column.name not in placed])
    return tuple(column if column is not None else next(rest) for column in places)


def _names(schema: Schema) -> FeatureNames:
    return tuple(column.name for column in schema.sparse), tuple(column.name for column in schema.dense)


def _dense_part(config: DhenConfig) -> DhenForClickPrediction:
    """The module of the dense part, without memory for its weights."""
    with torch.device("meta"):
        return DhenForClickPrediction(config, with_tables=False)


def _check_any_kept(trained: TrainedModel, matches: Sequence[TableMatch]) -> None:
    """Raise ArgumentError if no row of a table is kept, except those of blanks: the run would start anew."""
    if not trained.schema.sparse or not matches or any(match.rows_kept > 1 for match in matches):
        return
    reasons = "; ".join(f"{match.table}: {match.how}" for match in matches[:5])
    raise ArgumentError(
        f"No row of any table can be taken from {trained.folder} ({reasons}). Use data with the features and keys of "
        "the trained model, and its id_encoding and hash_size (leave both out), or train without --model_name_or_path."
    )


def _match_table(trained: TrainedModel, prepared: Path, new: SparseColumn) -> TableMatch:
    """How the table of a column of the new data matches the trained model's."""
    rows, kept, name = new.num_embeddings, 0, new.table_name
    old = next((column for column in trained.schema.sparse if column.table_name == name), None)
    if old is None:
        return TableMatch(name, rows, 0, 0, "new feature")
    if old.encoding != new.encoding:
        how = f"encoding was {old.encoding}, is now {new.encoding}"
    elif old.bins != new.bins:
        how = f"bins were {old.bins}, are now {new.bins}"
    elif old.edges != new.edges:
        how = "the bins have other edges"
    elif old.encoding == "hash" and old.num_embeddings != rows:
        how = f"hash size was {old.num_embeddings:,}, is now {rows:,}"
    elif old.encoding == "vocabulary":
        kept = 1 + sum(len(ids) for ids, _ in shared_ids(trained.folder, prepared, name))  # row 0 is everyone's
        how = "by key" if kept > 1 else "the trained model knows none of its keys"
    else:
        kept, how = rows, f"same {old.encoding}"
    if kept and old.pooling != new.pooling and old.name == new.name:
        how += f"; pooling was {old.pooling}, is now {new.pooling}"
    return TableMatch(name, rows, kept, old.num_embeddings - kept, how)
