"""The arguments that say where the click log is and how to read it."""

from dataclasses import dataclass
from typing import Literal

from dhen.config.command_line import Paths, Text
from dhen.model import ranges
from dhen.model.configuration_dhen import option

DatasetFormat = Literal["auto", "criteo", "libsvm", "csv", "parquet", "hub"]


@dataclass
class DataArguments:
    """Where the click log is, and how its values become ids and numbers."""

    dataset_name: Paths = option(
        None,
        "Data to train on: raw files, globs or URLs of them, a prepared folder, or a Hugging Face data set "
        "(owner/name). 'quickstart', 'planted' and 'planted-500k' (training rows) generate a click log.",
    )
    dataset_format: DatasetFormat = option(
        "auto",
        "Format of the raw files. auto decides by the file's name and its first bytes and, for .txt and .tsv, by its "
        "first line.",
    )
    dataset_schema: Text | None = option(
        None,
        "YAML file that says which columns are the label, dense features and sparse features. csv, parquet and hub "
        "require it. recipes/configs/schemas has examples.",
    )
    train_file: Paths = option(
        None,
        "Raw files or globs of the training split. Use instead of --dataset_name if each split has its own files.",
    )
    validation_file: Paths = option(None, "Raw files or globs of the validation split. Requires --train_file.")
    test_file: Paths = option(None, "Raw files or globs of the test split. Requires --train_file.")
    split_fractions: list[ranges.Share] = option(
        [0.8, 0.1, 0.1],
        "Fractions of rows for train, validation and test. They must sum to 1. Ignored if the data has its own splits.",
    )
    split_order: Literal["random", "sequential"] = option(
        "random",
        "How to assign rows to splits. random: by a hash of the row number. sequential: in file order, the first rows "
        "to train and the last to test; use it for logs in time order.",
    )
    time_column: Text | None = option(
        None,
        "Column of numbers or dates that puts the rows of each split in order. --split_order sequential then splits by "
        "it, and --shuffle none trains in this order.",
    )
    id_encoding: Literal["auto", "hash", "vocabulary"] = option(
        "auto",
        "How sparse values become table rows. hash: one pass over the data; different values may share a row. "
        "vocabulary: one more pass; each value gets its own row. auto: a vocabulary for features with up to a million "
        "values, and the hash for others, or for all if hash_size is given; with --model_name_or_path, as in the "
        "trained model.",
    )
    hash_size: ranges.HashSize | None = option(
        None,
        "Rows per table of a hashed feature. More rows mean fewer collisions and more memory. auto: about twice the "
        "feature's distinct values, which takes one more pass over the data. Default: 100,000, or a million where "
        "--id_encoding auto chose the hash. With --model_name_or_path, as in the trained model.",
    )
    max_hash_size: ranges.HashRows | None = option(
        None, "With --hash_size auto, the most rows of a table. Default: 40,000,000."
    )
    min_count: ranges.Count | None = option(
        None,
        "With a vocabulary, values seen fewer times than this in the training split share row 0. Default: 1, or with "
        "--model_name_or_path as in the trained model.",
    )
    vocabulary_keys: Literal["union", "new"] = option(
        "union",
        "With --model_name_or_path, the keys of a vocabulary. union: those of the trained model and of the new data. "
        "new: only those of the new data.",
    )
    bad_rows: Literal["error", "skip"] = option(
        "error", "What to do with malformed rows. error: stop at the first. skip: list them in bad_rows.csv."
    )
    cache_dir: Text | None = option(
        None, "Folder for prepared data, which later runs reuse. Default: the folder 'prepared' beside output_dir."
    )
    prepare_here: bool = option(
        False,
        "Prepare more than 5 GiB of raw files on the first node of a job although the other nodes wait. Without it, "
        "such a job stops with the command that prepares them.",
    )
