"""A sparse feature and its table, as a config names them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from dhen.model.names import check_names, check_type, is_valid_table_name, listed, quoted
from dhen.model.ranges import Rows

Pooling = Literal["sum", "mean", "attention", "transformer"]
ORDERED = ("attention", "transformer")
"""The poolings that have a target and a max_length."""
TableDtype = Literal["float32", "float16", "int8", "int4"]


@dataclass(frozen=True)
class SparseFeature:
    """A sparse feature and its table of `num_embeddings` rows.

    pooling: `sum` adds w_i e_i over the ids in a bag; `mean` divides the sum by the number of ids. An empty bag gives
    zeros. Of the last `max_length` ids, `attention` weighs each by its embedding and that of the feature `target`;
    `transformer` lets them attend to each other and the target (attention_pooling.py). dtype: of the exported table
    (int8 and int4: quantization.py). table: the name of its table, which features share that give the same name; by
    default that of the feature.
    """

    name: str
    num_embeddings: int
    pooling: Pooling = "sum"
    dtype: TableDtype = "float32"
    table: str = ""
    target: str | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError naming the feature. The name is also the table's key in the saved weights."""
        object.__setattr__(self, "table", self.table or self.name)
        if not is_valid_table_name(self.name) or not is_valid_table_name(self.table):
            raise ValueError(
                f"sparse feature {quoted(self.name)}: the name is not allowed. It must not be empty, contain a dot, "
                f"start with '__', or be the name of a module attribute ('type', 'training', …). Rename the feature."
            )
        check_type(f"sparse feature {quoted(self.name)}: num_embeddings", self.num_embeddings, Rows)
        if self.pooling not in get_args(Pooling):
            raise ValueError(
                f"sparse feature {quoted(self.name)}: pooling is {quoted(self.pooling)}. Use one of "
                f"{listed(get_args(Pooling))}."
            )
        if {self.target is not None, self.max_length is not None} != {self.pooling in ORDERED}:
            raise ValueError(
                f"sparse feature {quoted(self.name)}: give target and max_length with pooling 'attention' or "
                f"'transformer', and only then."
            )
        if self.dtype not in get_args(TableDtype):
            raise ValueError(
                f"sparse feature {quoted(self.name)}: dtype is {quoted(self.dtype)}. Use 'float32', 'float16', 'int8' "
                f"or 'int4'."
            )

    @property
    def num_lookups(self) -> int:
        """Number of embeddings that are looked up for it: 1, or one for each position of an ordered bag."""
        return self.max_length or 1


def features_of_tables(features: Sequence[SparseFeature]) -> dict[str, list[int]]:
    """The places of each table's features, by table, in the order of the first ones."""
    places: dict[str, list[int]] = {}
    for place, feature in enumerate(features):
        places.setdefault(feature.table, []).append(place)
    return places


def sparse_feature(entry: dict[str, Any]) -> SparseFeature:
    """The feature of an entry of `sparse_features`. Raises ValueError naming the key."""
    allowed = [item.name for item in fields(SparseFeature)]
    check_names("sparse_features key", entry, allowed)
    for key in ("name", "num_embeddings"):
        if key not in entry:
            raise ValueError(f"sparse_features: {quoted(entry)} has no {key!r}. Add it.")
    return SparseFeature(**entry)
