"""The role of one raw column: what is made of its values."""

import re
from typing import Literal

from pydantic import ConfigDict, FiniteFloat
from pydantic.dataclasses import dataclass as checked_dataclass

from dhen.data.schema import LABEL
from dhen.model.names import quoted
from dhen.model.ranges import Bins, Count, HashSize
from dhen.model.sparse_feature import ORDERED, Pooling

STRICT = ConfigDict(extra="forbid")
_DATE_FORMAT = re.compile(r"(?=.*%[Yy])(?=.*%m)(?=.*%d)(?=.*%H|(?!.*%[MS]))([^%]|%[YymdHMS])+")


@checked_dataclass(frozen=True, config=STRICT)
class DenseRole:
    """A numeric column. missing_indicator: one more feature says where it is blank."""

    name: str
    column: str | None = None
    transform: Literal["log1p", "identity"] = "log1p"
    scale: Literal["none", "standard"] = "none"
    missing_indicator: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the dense features that it becomes."""
        return (self.name, f"{self.name}_is_missing") if self.missing_indicator else (self.name,)

    @property
    def source(self) -> str:
        """The raw column with its values."""
        return self.column or self.name

    @property
    def columns(self) -> tuple[str, ...]:
        """All raw columns that it uses."""
        return (self.source,)


Part = Literal["minute", "hour", "weekday", "weekend", "day", "week", "month", "year"]
"""Part of a date. weekday: 1 for Monday to 7. weekend: 1, or 0. day: of the month. week: of the ISO year."""


@checked_dataclass(frozen=True, config=STRICT)
class LabelRole:
    """The column with the label: 0 or 1; or the value `positive` is a click; or each number above `greater_than` is."""

    column: str = LABEL
    positive: bool | int | float | str | None = None
    greater_than: FiniteFloat | None = None

    def __post_init__(self) -> None:
        if self.positive is not None and self.greater_than is not None:
            raise ValueError("both positive and greater_than are given. Remove one of them.")
        if isinstance(self.positive, str) and not self.positive.strip():
            raise ValueError("positive is blank. Give the value of a click.")


@checked_dataclass(frozen=True, config=STRICT)
class TaskRole(LabelRole):
    """The column with the labels of a further task. A blank is no label. given_click: only clicks have a label."""

    given_click: bool = False


@checked_dataclass(frozen=True, config=STRICT)
class PretrainedRole:
    """A file of vectors that the rows of a table start from. key: its column of keys. frozen: the table stays so."""

    file: str
    key: str = "key"
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.key != "key" and self.file.endswith(".npz"):
            raise ValueError(f"key is {quoted(self.key)}, but .npz files have the arrays keys and vectors. Remove key.")


@checked_dataclass(frozen=True, config=STRICT)
class SparseRole:
    """A categorical column.

    part: of the dates in it, which are written in date_format (codes of strftime). bins: how many to make of the
    numbers in it. transform: of the numbers in it. `log_squared` is floor(log(x)^2) above 2, else the whole part: the
    winners' transform in Criteo's challenge.

    table: the name of a feature or of a table, which this feature then shares. pretrained: the table has a vocabulary.

    If `encoding`, `hash_size` or `min_count` is None, the command's setting applies.
    """

    name: str
    column: str | None = None
    characters: tuple[int, int] | None = None
    part: Part | None = None
    date_format: str | None = None
    transform: Literal["log_squared"] | None = None
    separator: str | None = None
    multi_valued: bool = False
    weights: str | None = None
    pooling: Pooling = "sum"
    encoding: Literal["hash", "vocabulary"] | None = None
    hash_size: HashSize | None = None
    min_count: Count | None = None
    bins: Bins | None = None
    table: str | None = None
    pretrained: PretrainedRole | None = None
    target: str | None = None
    max_length: Count | None = None

    def __post_init__(self) -> None:
        if self.characters is not None and not 0 <= self.characters[0] < self.characters[1]:
            raise ValueError(
                f"the characters of {quoted(self.name)} are {list(self.characters)}. Give the first one, counted from "
                f"0, and the end, which is excluded: [6, 8] selects two."
            )
        if self.part is not None and (self.characters is not None or self.is_multi_valued):
            raise ValueError(f"{quoted(self.source)} has `parts`, which need one date per row. Remove the other keys.")
        with_ids = ("characters", "part", "transform", "separator", "multi_valued", "weights", "encoding", "hash_size")
        for key in (*with_ids, "min_count", "table", "pretrained") if self.bins is not None else ():
            if getattr(self, key) not in (None, False):
                key = "parts" if key == "part" else key
                raise ValueError(
                    f"{quoted(self.name)} has bins, which make ids of numbers, and {key}. Remove one of them."
                )
        if self.transform and (self.part or self.characters or self.is_multi_valued):
            raise ValueError(
                f"{quoted(self.source)} has a `transform`, which needs one number per row. Remove the other keys."
            )
        if self.date_format is not None and (self.part is None or not _DATE_FORMAT.fullmatch(self.date_format)):
            raise ValueError(
                f"the date_format of {quoted(self.name)} is {quoted(self.date_format)}. Use %Y or %y, %m and "
                f"%d, perhaps %H, %M and %S, and what stands between them, in an entry with `parts`."
            )
        if {self.target is not None, self.max_length is not None} != {self.pooling in ORDERED}:
            raise ValueError(
                f"{quoted(self.name)} has pooling {self.pooling}, target {quoted(self.target)} and max_length "
                f"{self.max_length}. Give target and max_length with `pooling: attention` or `transformer`, and only "
                f"then."
            )
        if self.target is not None and (not self.is_multi_valued or self.is_weighted):
            raise ValueError(
                f"{quoted(self.name)} has `pooling: {self.pooling}`, which needs ids without weights. Give a separator "
                f"or multi_valued, and remove `weights`."
            )
        if self.pretrained is not None and (self.encoding == "hash" or self.hash_size is not None):
            raise ValueError(
                f"{quoted(self.name)} has `pretrained` vectors, but with a hash, two values may share a row of the "
                f"table. Remove `hash_size` and `encoding: hash`, so that it gets a vocabulary, or remove `pretrained`."
            )
        for key, encoding in (("hash_size", "vocabulary"), ("min_count", "hash")):
            if getattr(self, key) is not None and self.encoding == encoding:
                raise ValueError(
                    f"{quoted(self.name)} has a {key}, but the encoding {encoding} does not use it. Remove one of them."
                )

    @property
    def features(self) -> tuple[str, ...]:
        """The name of the sparse feature that it becomes."""
        return (self.name,)

    @property
    def table_name(self) -> str:
        """The name of its table."""
        return self.table or self.name

    @property
    def is_multi_valued(self) -> bool:
        """Whether a row can have any number of ids. Weighted features are always multi-valued."""
        return self.multi_valued or self.separator is not None or self.weights is not None

    @property
    def is_weighted(self) -> bool:
        """Whether each id has a weight."""
        return self.weights is not None

    @property
    def source(self) -> str:
        """The raw column with its ids or numbers."""
        return self.column or self.name

    @property
    def columns(self) -> tuple[str, ...]:
        """All raw columns that it uses."""
        return (self.source,) if self.weights is None else (self.source, self.weights)
