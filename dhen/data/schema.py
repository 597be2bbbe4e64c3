"""The contents of a prepared data folder: its columns, their encodings, and the number of rows in each split.

A prepared folder is

    schema.json                     this file's `Schema`
    train/part-00000.parquet ...    also validation/ and test/, if the data has them
    vocabulary/<table>.parquet      key, id, count: only for features encoded by a vocabulary
    bad_rows.csv                    file, row, reason, text: only if bad rows were skipped

The Parquet columns are:

    label                one float32: 0, 1, or NaN if unknown, as in data to predict
    dense feature        one float32, already transformed and scaled
    sparse feature       one int32 or int64, or a list of them if the feature is multi-valued
    <feature>:weights    a list of float32, only if the feature's ids have weights
    :weight              the row's weight, one float32, only if the data has row weights
    <task>:label         one float32: 0, 1, or NaN if the row has no label of this further task
    :file, :row          where the row came from, only in data to predict
    <column>:kept        the raw value in this column of the file, only in data to predict, if --keep names it

Ids are rows of the feature's table: 0 <= id < num_embeddings.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from dhen.data.format_version import VERSION_KEY, check_format_version
from dhen.model.sparse_feature import Pooling
from dhen.paths import write_atomically

LABEL, WEIGHT = "label", ":weight"
SCHEMA_FILE = "schema.json"
FORMAT_VERSION = 5
"""Version of the prepared folder. Raise it when the same input and settings give a different folder, or when folders
that were written before can no longer be read as they are. A cached folder of another version is not reused."""
SHARES = "share_read"
"""Entry of `source` of data of which only the head is prepared: by split, the share of the rows that the folder has."""
ESTIMATED_KEYS = "estimated_keys"
"""Entry of `source`: by table with hash_size auto, about how many distinct keys the train split has."""
FILE, ROW = ":file", ":row"
"""Columns of rows to predict. Rows count from 1, as in bad_rows.csv: the line of a text file or the row of a Parquet
file. Feature names cannot start with a colon."""
TIME, ORDER = ":time", ":order"
"""Columns of rows that are not yet in the order of time: their time, and a number that rises with the raw rows."""
SPLITS = ("train", "validation", "test")
MISSING_ID = 0
"""The id of a blank value and of a key that is not in the vocabulary."""

_STRICT = ConfigDict(extra="forbid")


_ADDED = frozenset({"tasks", "cut_ids", "table", "target", "max_length"})


def without_unused(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A `dict_factory` for `asdict`, without what older code does not know, unless it is used."""
    return {key: value for key, value in items if value or key not in _ADDED}


def weights_column(feature: str) -> str:
    """Return the name of the Parquet column with the weights of a feature's ids."""
    return f"{feature}:weights"


def task_column(task: str) -> str:
    """Return the name of the Parquet column with the labels of a further task."""
    return f"{task}:{LABEL}"


def kept_column(column: str) -> str:
    """Return the name of the Parquet column with the raw values of a column of the file."""
    return f"{column}:kept"


def is_task_column(name: str) -> bool:
    """Whether a column has the labels of a further task. No feature's name contains a colon."""
    return name.endswith(f":{LABEL}")


@checked_dataclass(frozen=True, config=_STRICT)
class DenseColumn:
    """A dense feature. `log1p` is sign(x) * log(1 + |x|), which keeps the sign. Then comes the scale: (x - mean) / std.

    mean, std: of the transformed values in the train split; without a scale, None. If std is 0, so are all values.
    A blank is 0 in the end. missing_of: the feature is 1 where that dense feature is blank, else 0.
    """

    name: str
    transform: Literal["log1p", "identity"] = "log1p"
    mean: float | None = None
    std: float | None = None
    missing_of: str | None = None


@checked_dataclass(frozen=True, config=_STRICT)
class SparseColumn:
    """A sparse feature, and how its raw values become ids in a table of `num_embeddings` rows.

    `hash`: 1 + hash(value) mod (num_embeddings - 1). `vocabulary`: the id of the key in the table's vocabulary. Id 0
    stands for a blank, and with `vocabulary` also for an unseen or rare key. `bins`: 1 + the number of `edges` below
    the value. The edges are quantiles of the train split, so that up to `bins` bins have about as many rows each.
    table: which the feature shares with others, so that equal values have equal ids; None for one of its own name.
    target, max_length: of the poolings `attention` and `transformer`, which read the last max_length ids of a row.
    """

    name: str
    num_embeddings: int
    encoding: Literal["hash", "vocabulary", "bins"] = "hash"
    min_count: int = 1
    is_multi_valued: bool = False
    is_weighted: bool = False
    pooling: Pooling = "sum"
    bins: int | None = None
    edges: tuple[float, ...] | None = field(default=None, repr=False)
    table: str | None = None
    target: str | None = None
    max_length: int | None = None

    @property
    def table_name(self) -> str:
        """The name of the feature's table, after which its hash and its vocabulary are named too."""
        return self.table or self.name


@checked_dataclass(frozen=True, config=_STRICT)
class SplitCounts:
    """Number of rows in one split, and how many of them are clicks or `unlabelled` (label NaN).

    `rows` does not include the `bad_rows`, which were skipped. unknown_keys: by feature with a vocabulary, the number
    of values that are not a key. digest: of all values, in the order of the rows. weight: sum of the row weights, to 8
    digits, if all rows have one. cut_ids: by feature with a max_length, the ids before the last ones of their rows.
    tasks: by further task, how many rows have its label, and how many of these are 1.
    """

    rows: int
    clicks: int
    bad_rows: int = 0
    unlabelled: int = 0
    unknown_keys: dict[str, int] = field(default_factory=dict)
    digest: str = ""
    weight: float | None = None
    cut_ids: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, tuple[int, int]] = field(default_factory=dict)


@checked_dataclass(frozen=True, config=_STRICT)
class TaskColumn:
    """A task beside the label, with labels of its own. given_click: only rows with a click have one."""

    name: str
    given_click: bool = False


@dataclass(frozen=True)
class Schema:
    """Everything needed to read a prepared folder. Only generated data has `best_possible_ne`, by split.

    has_weights: rows have weights, which may be NaN in data to predict.
    """

    dense: tuple[DenseColumn, ...]
    sparse: tuple[SparseColumn, ...]
    splits: dict[str, SplitCounts] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    best_possible_ne: dict[str, float] = field(default_factory=dict)
    has_weights: bool = False
    tasks: tuple[TaskColumn, ...] = ()

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def lookups(self) -> tuple[SparseColumn, ...]:
        """The sparse features, one with a max_length so many times: what a batch has ids of (see `in_positions`)."""
        return tuple(column for column in self.sparse for _ in range(column.max_length or 1))

    @property
    def looked_up(self) -> tuple[str, ...]:
        """Names of the tables whose features are encoded by a vocabulary."""
        names = (column.table_name for column in self.sparse if column.encoding == "vocabulary")
        return tuple(dict.fromkeys(names))

    def check_weights(self, split: str) -> None:
        """Raise ValueError if rows of the split should have a weight above 0, but do not."""
        if self.has_weights and not self.splits[split].weight:
            raise ValueError(
                f"some rows of {split} have no weight, or all have 0, in the column that row_weight names. Add weights."
            )

    def save(self, folder: Path) -> None:
        """Write schema.json into `folder` atomically."""
        values = {VERSION_KEY: FORMAT_VERSION} | asdict(self, dict_factory=without_unused)
        write_atomically(folder / SCHEMA_FILE, json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Schema":
        """Read schema.json from `folder`. Raises FileNotFoundError or ValueError naming the file and the key."""
        path = Path(folder) / SCHEMA_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file, so {folder} is not a prepared data folder, and no whole model. Prepare data "
                "with tools/prepare_data.py, or copy the model again."
            )
        text = path.read_text(encoding="utf-8")
        try:
            values = TypeAdapter(dict[str, Any]).validate_json(text)
            check_format_version(path, values, FORMAT_VERSION, "prepare the data and train the model again")
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ValueError(
                f"{path}: {key or 'the file'}: {first['msg']}. Prepare the data again, or copy the model again."
            ) from error
