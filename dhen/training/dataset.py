"""Opens the data of a run, given a prepared folder, raw files, a hub data set, or the name of a generated log."""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dhen.config.arguments import Arguments
from dhen.config.command_line import ArgumentError, Paths
from dhen.config.data_arguments import DataArguments
from dhen.config.left_out import MOST_BATCH, choose_sizes
from dhen.data.loading.batches import BatchLoader
from dhen.data.loading.lanes import GROUPS_PER_LANE
from dhen.data.loading.prepared_rows import check_has, mean_bag_sizes
from dhen.data.preparation import preprocessing
from dhen.data.preparation.caching import prepare_cached
from dhen.data.preparation.encoding.vocabulary import digest_of_keys
from dhen.data.preparation.head import is_partial, whole_schema
from dhen.data.preparation.settings import Head, PreparationSettings
from dhen.data.schema import SCHEMA_FILE, SHARES, Schema, SplitCounts
from dhen.data.synthetic import TRUTH_FILE, Recipe, generate_click_log, generated_log, holds_click_log
from dhen.runtime.background import in_background
from dhen.runtime.topology import Topology
from dhen.training.evaluation.group_metrics import groups_by
from dhen.training.saved.fine_tuning import StartingPoint, frozen_and_new, ignored_architecture, lost_tables, start_from
from dhen.training.saved.trained_model import TrainedModel

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS, HEAD_ROWS = 30.0, 100_000
MANY_ROWS = 10_000_000
"""Of fewer rows, each rank may read all."""
_USE_RAW = "Use the raw files instead: they are prepared with the model's schema."


@dataclass(frozen=True)
class TrainingData:
    """The data of a run.

    prepared: the prepared folder. schema: the features, in the model's order. start: what fine-tuning takes from the
    trained model; None without fine-tuning. loaders: one loader per split.
    """

    prepared: Path
    schema: Schema
    start: StartingPoint | None
    loaders: dict[str, BatchLoader]

    @cached_property
    def ids_per_bag(self) -> dict[str, float]:
        """Mean number of ids per example, for each multi-valued feature."""
        return mean_bag_sizes(self.prepared, self.schema)


def cache_of(arguments: Arguments) -> Path:
    return Path(arguments.data.cache_dir or Path(arguments.training.output_dir).parent / "prepared")


def open_data(arguments: Arguments, topology: Topology, head: Path | None = None) -> TrainingData:
    """Prepare the data, unless an earlier run did, and open its splits. Communicates; all ranks call it.

    head: a folder to prepare only the head in. The loaders then read the head, and the schema estimates the whole. Sets
    the batch size and the number of epochs in `arguments` if they were left out. Raises ArgumentError, DataError,
    ValueError or FileNotFoundError if the arguments or the data are wrong.
    """
    data, training = arguments.data, arguments.training
    trained = TrainedModel.open(training.model_name_or_path) if training.model_name_or_path else None
    like = trained.folder if trained else None
    batch = training.per_device_train_batch_size or MOST_BATCH
    rows = max(HEAD_ROWS, 2 * batch * training.gradient_accumulation_steps * topology.world_size)
    prepared = prepare_dataset(data, cache_of(arguments), topology, like=like, head=head and Head(head, rows))
    schema, start = whole_schema(prepared), None
    check_has(prepared, "train", schema)
    if is_partial(schema) and training.resume_from_checkpoint:
        raise ArgumentError(
            f"{cache_of(arguments)} does not have the data, which check compares with the checkpoint's."
        )
    if trained is not None:
        start = start_from(trained, prepared, schema, arguments.architecture if training.new_head else None, topology)
        schema = start.schema
    _check_splits(arguments, schema)
    chosen = choose_sizes(training, schema.splits["train"].rows, topology.world_size)
    sentences = _without_effect(arguments, schema, start)  # on all ranks, because it may raise
    if topology.is_main:
        if chosen:
            logger.info(chosen)
        for sentence in sentences:
            logger.warning("%s", sentence)
    read = replace(schema, splits=Schema.load(prepared).splits)
    return TrainingData(prepared, schema, start, _open_splits(arguments, topology, prepared, read))


def _open_splits(arguments: Arguments, topology: Topology, prepared: Path, schema: Schema) -> dict[str, BatchLoader]:
    """One loader per split. The training split is cut into micro steps. Of the others, each rank reads one stretch."""
    training = arguments.training
    open_split = partial(
        BatchLoader,
        prepared,
        schema=schema,
        rank=topology.rank,
        world_size=topology.world_size,
        pin_memory=topology.device.type == "cuda",
    )
    loaders = {
        split: open_split(split, batch_size=training.per_device_eval_batch_size, lanes=topology.world_size)
        for split in schema.splits
        if split != "train"
    }
    loaders["train"] = open_split(
        "train",
        batch_size=training.per_device_train_batch_size,
        accumulation_steps=training.gradient_accumulation_steps,
        drop_last=training.dataloader_drop_last,
        shuffle=training.shuffle != "none",
        seed=training.seed,
    )
    if topology.is_main:
        _say_lanes(loaders["train"], topology.world_size)
    return loaders


def _say_lanes(train: BatchLoader, ranks: int) -> None:
    """Say how many lanes the training rows are read in, and whether ranks read more than their own rows."""
    if train.lanes > 1:
        logger.info("the training rows are read in %d lanes, which the ranks share out", train.lanes)
    if train.read_per_own > 2 and train.num_rows > MANY_ROWS:
        why = (
            f"the lanes are fewer than the ranks: {train.lanes}. Their number is a power of two that divides the "
            f"global batch, {train.global_batch}, and each has at least {GROUPS_PER_LANE} row groups"
            if train.shuffle
            else "shuffle is none"
        )
        logger.warning("each of %d ranks reads %.0f times its own training rows: %s", ranks, train.read_per_own, why)


def _check_splits(arguments: Arguments, schema: Schema) -> None:
    """Raise ArgumentError or ValueError if the data lacks labels, or a split or feature that the arguments need."""
    training = arguments.training
    for split, counts in schema.splits.items():
        if counts.unlabelled:
            raise ArgumentError(f"{counts.unlabelled:,} rows in the {split} split have no label. Use labelled rows.")
        schema.check_weights(split)
    groups_by(training.metrics_by, schema)
    is_cut = schema.source.get("format") != "hub" and schema.source.get("settings", {}).get("dataset_name")
    if training.negative_sampling_rate < 1 and is_cut:
        raise ArgumentError(
            f"negative_sampling_rate is {training.negative_sampling_rate}, but all splits are cut from the same rows. "
            "Give train_file, and validation_file and test_file with all their rows."
        )
    train = schema.splits["train"]
    if _has_one_class(train) and not is_partial(schema):
        raise ArgumentError(
            f"The labels of the {train.rows:,} training rows are all {int(train.clicks > 0)}, so there is nothing to "
            "learn. Check the label in dataset_schema, or use more rows."
        )
    for task in schema.tasks:
        labels, clicks = train.tasks.get(task.name, (0, 0))
        if clicks in (0, labels) and not is_partial(schema):
            raise ArgumentError(
                f"The task {task.name} has {labels:,} labels in the training rows, of which {clicks:,} are 1, so there "
                "is nothing to learn. Check `tasks` in dataset_schema, or use more rows."
            )
        if training.negative_sampling_rate < 1 and not task.given_click:
            raise ArgumentError(
                f"negative_sampling_rate is {training.negative_sampling_rate}, but the task {task.name} also has "
                "labels in rows without a click. Set given_click for it in dataset_schema, or remove one of the two."
            )
    if "validation" not in schema.splits:
        asked = {
            "early_stopping_patience": training.early_stopping_patience,
            "lr_scheduler_type reduce_lr_on_plateau": training.lr_scheduler_type == "reduce_lr_on_plateau",
            "calibrate": training.calibrate,
        }
        for name in filter(asked.get, asked):
            raise ArgumentError(
                f"{name} needs a validation split, but the data has none. Add one with validation_file or "
                "split_fractions."
            )
    elif training.calibrate and not is_partial(schema) and _has_one_class(schema.splits["validation"]):
        raise ArgumentError("calibrate needs both labels in the validation split. Use more rows, or leave it out.")


def _has_one_class(counts: SplitCounts) -> bool:
    return counts.clicks in (0, counts.rows)


def _without_effect(arguments: Arguments, schema: Schema, start: StartingPoint | None) -> list[str]:
    """A sentence for each setting that has no effect, and one for frozen weights that were never trained."""
    like = start.trained.folder if start else None
    sentences = settings_without_effect(arguments.data, schema, like) + arguments.training.without_effect()
    sentences += [
        f"{name}: {count:,} ids of {split} come before the last max_length of their row and are not used"
        for split, counts in schema.splits.items()
        for name, count in counts.cut_ids.items()
        if count
    ]
    sentences += _missing_metrics(arguments.training.metric_for_best_model, schema)
    if start:
        sentences += ignored_architecture(arguments.architecture, start)
        sentences += frozen_and_new(arguments.training.freeze, start) + lost_tables(start)
    return sentences


def _missing_metrics(best: str, schema: Schema) -> list[str]:
    """A sentence for each split with one class, in which auc and ne do not exist."""
    sentences = []
    for split, counts in schema.splits.items():
        if _has_one_class(counts) and not is_partial(schema):
            sentence = (
                f"the labels of the {split} split are all {int(counts.clicks > 0)}, so its auc and ne do not exist"
            )
            if split == "validation" and best != "logloss" and not schema.tasks:
                sentence += (
                    f". So {best} chooses no checkpoint, and early stopping and reduce_lr_on_plateau do not act: the "
                    "last weights are tested and exported. Or set metric_for_best_model to logloss"
                )
            sentences.append(sentence)
        for name, (labels, clicks) in counts.tasks.items():
            if clicks in (0, labels) and not is_partial(schema):
                sentences.append(f"the {labels:,} labels of the task {name} in the {split} split give no auc and ne")
    return sentences


def prepare_dataset(
    data: DataArguments,
    cache: Path,
    topology: Topology,
    schema_from: Path | None = None,
    only_split: str | None = None,
    *,
    like: Path | None = None,
    is_label_required: bool | None = None,
    keep: Sequence[str] = (),
    head: Head | None = None,
) -> Path:
    """Return the prepared folder for `data`. Rank 0 prepares it and the others wait. All ranks call it.

    schema_from: a trained model whose features, ids and transforms to use; labels are then optional. only_split: the
    only split to read from a hub data set. like: a trained model whose encoding of each feature to use, unless `data`
    says otherwise. is_label_required: by default, unless there is a schema_from. keep: columns of the raw
    files whose values to keep. head: prepare only the head.

    Raises DataError, ValueError or FileNotFoundError if the arguments or the data are wrong.
    """
    more = {"schema_from": schema_from, "only_split": only_split, "like": like, "head": head, "keep": tuple(keep)}
    more["is_label_required"] = schema_from is None if is_label_required is None else is_label_required
    more["may_be_large"] = data.prepare_here or topology.local_size == topology.world_size
    work = in_background(partial(_prepare, data, cache, **more)) if topology.is_main else None
    answer: list[Path | None] = [None]
    while answer[0] is None:
        # Broadcast None as a heartbeat: the process group fails if a collective waits for half an hour.
        if work is not None and wait([work], HEARTBEAT_SECONDS).done:
            answer = [work.result()]
        dist.broadcast_object_list(answer, src=0, group=topology.world)
    return answer[0]


def settings_without_effect(data: DataArguments, schema: Schema, like: Path | None = None) -> list[str]:
    """A sentence for each setting that the user changed but that had no effect on the data of `schema`."""
    if not is_prepared(data.dataset_name):
        return preprocessing.settings_without_effect(settings_of(data, like=like), schema)
    return [
        f"{name} has no effect: {data.dataset_name} is already prepared"
        for name, default in vars(DataArguments()).items()
        if name not in ("dataset_name", "cache_dir") and getattr(data, name) != default
    ]


def is_prepared(name: Paths) -> bool:
    return isinstance(name, str) and (Path(name) / SCHEMA_FILE).is_file()


def settings_of(data: DataArguments, **more: Any) -> PreparationSettings:
    """What these arguments say about the preparation. more: what they cannot say."""
    own = PreparationSettings.__dataclass_fields__
    return PreparationSettings(**{name: value for name, value in vars(data).items() if name in own}, **more)


def _prepare(data: DataArguments, cache: Path, *, may_be_large: bool = True, **more: Any) -> Path:
    if isinstance(data.dataset_name, str) and (recipe := generated_log(data.dataset_name)):
        return _prepare_generated(recipe, data, cache, **more)
    return prepare_cached(settings_of(data, **more), cache, may_be_large=may_be_large)


def _prepare_generated(recipe: Recipe, data: DataArguments, cache: Path, head: Head | None, **more: Any) -> Path:
    """Generate a click log, prepare it, and record the best possible NE, which the generator knows."""
    raw, rows = cache / data.dataset_name, recipe.rows
    if head and not holds_click_log(raw, rows):
        raw, rows = head.folder / data.dataset_name, {split: min(count, head.rows) for split, count in rows.items()}
    if not holds_click_log(raw, rows):
        logger.info("generating a click log of %s rows in %s", f"{sum(rows.values()):,}", raw)
        generate_click_log(raw, rows, recipe=recipe)
    files = {split: f"{raw}/{split}.tsv.gz" for split in rows}
    named = replace(
        data, dataset_name=None, dataset_format="criteo", **{f"{split}_file": f for split, f in files.items()}
    )
    folder = _prepare(named, cache, head=head, **more)
    schema = Schema.load(folder)
    if not schema.best_possible_ne:
        truth = json.loads((raw / TRUTH_FILE).read_text(encoding="utf-8"))["files"]
        best = {split: truth[Path(file).name]["best_possible_ne"] for split, file in files.items()}
        if SHARES in schema.source:
            schema.source[SHARES] = {split: schema.splits[split].rows / recipe.rows[split] for split in files}
        replace(schema, best_possible_ne=best).save(folder)
    return folder


def check_prepared_for(folder: Path, trained: Path) -> Schema:
    """The schema of a prepared folder, in the trained model's feature order. Raises ValueError if they do not match."""
    schema, wanted = Schema.load(folder), Schema.load(trained)
    dense = {column.name: column for column in schema.dense}
    sparse = {column.name: column for column in schema.sparse}
    for kind, have, want in (("dense", dense, wanted.dense), ("sparse", sparse, wanted.sparse)):
        for column in want:
            if have.get(column.name) != column and str(have.get(column.name)) == str(column):
                raise ValueError(
                    f"{folder}: the bins of {column.name!r} have other edges than those of the model in {trained}, so "
                    f"the ids have other meanings. {_USE_RAW}"
                )
            if have.get(column.name) != column:
                raise ValueError(
                    f"{folder}: {kind} feature {column.name!r} is {have.get(column.name, 'missing')}, but the model in "
                    f"{trained} was trained on {column}. {_USE_RAW}"
                )
        if extra := set(have) - {column.name for column in want}:
            raise ValueError(
                f"{folder}: the model in {trained} has no {kind} features {sorted(extra)}. Prepare data without them."
            )
    for name in wanted.looked_up:
        if digest_of_keys(folder, name) != digest_of_keys(trained, name):
            raise ValueError(
                f"{folder}: the vocabulary of {name!r} differs from that of the model in {trained}, so the ids "
                f"have other meanings. {_USE_RAW}"
            )
    tasks = tuple(task for task in schema.tasks if task.name in wanted.task_names)
    if other := [task for task in tasks if task not in wanted.tasks]:
        raise ValueError(
            f"{folder}: {other[0]} has another given_click than in the model in {trained}, so its labels have another "
            f"meaning. {_USE_RAW}"
        )
    return replace(schema, dense=wanted.dense, sparse=wanted.sparse, tasks=tasks)
