"""The user's settings for raw data: where it is, and how to read, split and encode it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_type_hints

from dhen.data.formats.text_blocks import BLOCK_BYTES
from dhen.data.schema import SPLITS
from dhen.model.names import check_type
from dhen.model.ranges import Count, HashRows, HashSize
from dhen.paths import find

Format = Literal["auto", "criteo", "libsvm", "csv", "parquet", "hub"]
FORMATS: tuple[str, ...] = get_args(Format)
Paths = str | Sequence[str] | None


@dataclass(frozen=True)
class Head:
    """A folder to prepare the head of data in, and about how many rows to read of each set of files."""

    folder: Path
    rows: int


@dataclass(frozen=True)
class PreparationSettings:
    """Which raw files to prepare, and how. Raises ValueError naming a setting that is wrong or contradicts another.

    dataset_name: one or more paths, globs, folders or URLs of these, or the name of a data set on the Hugging Face hub
        (`owner/name` or `owner/name/configuration`). Its rows are split by `split_fractions`, unless a hub data set
        already has several of the splits train, validation and test.
    train_file, validation_file, test_file: paths, globs or URLs for each split, instead of dataset_name.
    dataset_format: `auto` detects Parquet from the first bytes, and others from the file's name or its first lines.
    dataset_schema: YAML file with the role of each column (dhen/data/formats/roles.py). Required for csv, parquet, hub.
    split_fractions: shares of train, validation and test. They must sum to 1.
    split_order: `random` splits by a hash of split_seed and the row's position. `sequential` puts the first rows into
        train and the last into test.
    time_column: put the rows of each split in the order of this column, and split sequentially by it: rows of one time
        are never in two splits. It has finite numbers, or dates and times (ISO 8601, or Parquet's own).
    id_encoding: `hash` into hash_size rows, or `vocabulary` of the keys seen min_count times in the train split. `auto`
        takes a vocabulary for features with up to a million keys, and the hash for others; or for all, if hash_size is
        given.
    hash_size, min_count: None for 100,000 (a million where `auto` chose the hash) and 1. The hash_size `auto` follows
        the number of distinct keys in the train split (`hash_rows`), up to max_hash_size, by default 40 million.
    like: an exported model, whose id_encoding, hash_size and min_count each feature takes unless these settings or the
        dataset_schema say otherwise. vocabulary_keys: its keys and the `new` ones (`union`), or only those of the data.
    bad_rows: `error` stops at the first bad row, `skip` counts and lists them.
    is_label_required: False to prepare rows to predict. The label is NaN for rows without one.
    only_split: read only this split of a hub data set, without splitting it further. None: read all of its splits.
    schema_from: prepared folder or saved model whose features, ids and transforms are reused. The encoding settings
        above then have no effect.
    keep: columns of the raw files whose values each row keeps, only without is_label_required.
    block_bytes: how much of a text file to read at a time. Does not affect the result.
    head: prepare only the head, unless a cache has all.
    """

    dataset_name: Paths = None
    train_file: Paths = None
    validation_file: Paths = None
    test_file: Paths = None
    dataset_format: Format = "auto"
    dataset_schema: str | Path | None = None
    split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    split_order: Literal["random", "sequential"] = "random"
    split_seed: int = 0
    time_column: str | None = None
    id_encoding: Literal["auto", "hash", "vocabulary"] = "auto"
    hash_size: HashSize | None = None
    max_hash_size: HashRows | None = None
    min_count: Count | None = None
    like: str | Path | None = None
    vocabulary_keys: Literal["union", "new"] = "union"
    bad_rows: Literal["error", "skip"] = "error"
    is_label_required: bool = True
    only_split: str | None = None
    schema_from: str | Path | None = None
    keep: tuple[str, ...] = ()
    block_bytes: Count = BLOCK_BYTES
    head: Head | None = None

    def __post_init__(self) -> None:
        for name in ("dataset_name", "train_file", "validation_file", "test_file", "dataset_schema"):
            object.__setattr__(self, name, _found(getattr(self, name)))
        if self.like is not None and (Path(self.like) / "model").is_dir():  # a run folder
            object.__setattr__(self, "like", Path(self.like) / "model")
        fractions = tuple(self.split_fractions)
        object.__setattr__(self, "split_fractions", fractions)
        if len(fractions) != len(SPLITS) or min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
            raise ValueError(
                f"split_fractions is {fractions}. Use three shares for train, validation and test that sum to 1, such "
                f"as 0.8 0.1 0.1."
            )
        for name, kind in get_type_hints(PreparationSettings, include_extras=True).items():
            check_type(name, getattr(self, name), kind)
        if bool(self.dataset_name) == bool(self.files_by_split()):
            raise ValueError(
                "give either dataset_name, which is split by split_fractions, or files per split (train_file, "
                "validation_file, test_file), but not both."
            )

    def files_by_split(self) -> dict[str, tuple[str, ...]]:
        """Return the paths or globs for each split that the user gave files for."""
        given = zip(SPLITS, (self.train_file, self.validation_file, self.test_file), strict=True)
        return {split: as_tuple(paths) for split, paths in given if paths}


def _found(paths: Paths | Path) -> Paths:
    """The paths with those of the repository in place of the ones that exist only there."""
    if paths is None or isinstance(paths, str | Path):
        return find(str(paths)) if paths else None
    return tuple(find(str(path)) for path in paths)


def as_tuple(paths: Paths) -> tuple[str, ...]:
    """Return one path, several or none as a tuple."""
    if not paths:
        return ()
    return (str(paths),) if isinstance(paths, str | Path) else tuple(str(path) for path in paths)
