"""Sets up a run: the ds_config, the model over all ranks, the trainer and the progress reporter.

All ranks must call these functions, because most of them communicate.
"""

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dhen.config.arguments import Arguments, trackers_of
from dhen.config.command_line import ArgumentError
from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import AUTO, SECTION, DsConfig, read_ds_config
from dhen.config.training_arguments import TrainingArguments
from dhen.model.configuration_dhen import NEEDS, DhenArchitecture, DhenConfig
from dhen.model.names import quoted
from dhen.model.parts import frozen_parts
from dhen.planner.machine import read_machine
from dhen.planner.nearest_machine import gpu_at_hand
from dhen.planner.step_trace import training_flops_per_sample
from dhen.runtime.collectives import rank_zeros
from dhen.runtime.folder_lock import lock_folder
from dhen.runtime.machine_at_hand import rank_memory_bytes
from dhen.runtime.messages import log_to_file
from dhen.runtime.topology import Topology
from dhen.training.auto_ds_config import choose_ds_config
from dhen.training.dataset import TrainingData
from dhen.training.loop import Trainer
from dhen.training.memory_plan import MemoryPlan, precision_of
from dhen.training.parallel_model import ParallelDhen
from dhen.training.parallelize import Layout, lay_out, parallelize
from dhen.training.reporting.progress import ProgressReporter
from dhen.training.reporting.run_folder import (
    LOG_FILE,
    SUMMARY_FILE,
    announce,
    check_run_folder,
    clear_run_folder,
    write_setup,
)
from dhen.training.saved.checkpoint import check_same_model, load_checkpoint
from dhen.training.saved.checkpoint_folder import choose_checkpoint, point_latest_at, read_state
from dhen.training.saved.fine_tuning import config_for
from dhen.training.saved.kept_optimizer import checkpoint_of_model, take_over_states
from dhen.training.saved.pretrained_tables import PretrainedTables, frozen_tables
from dhen.training.saved.trained_model import TrainedModel

_OF_ONE_START = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "interaction_files", "async_save")
logger = logging.getLogger(__name__)


def settle_resume(arguments: Arguments, topology: Topology) -> None:
    """Set resume_from_checkpoint to the folder that it means, or None. Communicates; all ranks call it.

    On another number of ranks than saved it, each rank takes another share of the same global batch. Raises
    CheckpointError if there is none whose files are as they were saved, or ArgumentError if the shares are uneven.
    """
    training = arguments.training
    wanted, output_dir = training.resume_from_checkpoint, Path(training.output_dir)
    folder = choose_checkpoint(wanted, output_dir, topology, sets_aside=not arguments.check)
    if training.keep_optimizer and not folder:
        rank_zeros(topology, lambda: checkpoint_of_model(TrainedModel.open(training.model_name_or_path)))
    training.resume_from_checkpoint = str(folder) if folder else None
    if folder:
        _keep_global_batch(training, rank_zeros(topology, lambda: read_state(folder)), topology)


def _keep_global_batch(training: TrainingArguments, state: Mapping[str, Any], topology: Topology) -> None:
    per_rank, saved = training.per_device_train_batch_size, state["arguments"]["per_device_train_batch_size"]
    if topology.world_size == state["world_size"] or per_rank not in (None, saved):
        return
    whole, shares = state["data_order"]["global batch"], topology.world_size * training.gradient_accumulation_steps
    if whole % shares:
        raise ArgumentError(
            f"the checkpoint's global batch, {whole}, cannot be divided evenly over {topology.world_size} ranks with "
            f"gradient_accumulation_steps {training.gradient_accumulation_steps}. Use another number of ranks."
        )
    training.per_device_train_batch_size = whole // shares
    logger.info(
        "%d ranks saved the checkpoint, and %d go on: per_device_train_batch_size is now %d, so that the global batch "
        "stays %d",
        state["world_size"], topology.world_size, whole // shares, whole,
    )  # fmt: skip


def given_ds_config(arguments: Arguments, topology: Topology) -> DsConfig | None:
    """Read and check the user's ds_config. Returns None for "auto", which is planned when the model is known.

    Raises ValueError if it is wrong, or if the arguments freeze a layer that the model does not have.
    """
    num_layers = _num_layers(arguments)
    frozen_parts(arguments.training.freeze, num_layers)
    if arguments.ds_config == AUTO:
        return None
    return read_ds_config(arguments.ds_config, arguments.recipe(topology.world_size), num_layers)


def build_model(arguments: Arguments, topology: Topology, data: TrainingData) -> ParallelDhen:
    """Build the model over all ranks, with the trained model's weights when fine-tuning. First logs the run's set-up.

    Raises ArgumentError, DsConfigError or CheckpointError.
    """
    training, start = arguments.training, data.start
    ds_config = given_ds_config(arguments, topology)
    config = start.config if start else config_for(arguments.architecture, data.schema)
    if training.resume_from_checkpoint:  # check first: the checkpoint's placement fits only the same tables
        check_same_model(Path(training.resume_from_checkpoint), config)
    frozen = _frozen_parts(training, config)
    memory_bytes = rank_memory_bytes(topology)
    if ds_config is None:
        ds_config = choose_ds_config(arguments, config, topology, memory_bytes, data.ids_per_bag)
    memory_plan = None
    if topology.is_main:
        eval_batch_size, num_passes = training.per_device_eval_batch_size, training.num_passes
        memory_plan = MemoryPlan.of(config, ds_config, memory_bytes, eval_batch_size, num_passes, frozen)
    kept = None
    if start and training.keep_optimizer and not training.resume_from_checkpoint:
        kept = choose_checkpoint(str(checkpoint_of_model(start.trained)), Path(training.output_dir), topology)
    saved = _saved_placement(ds_config, kept or training.resume_from_checkpoint)
    predict = memory_plan.use if memory_plan else None
    layout = lay_out(config, topology, ds_config, predict, ids_per_bag=data.ids_per_bag, **saved)
    _check_replicated(training, layout, frozen_tables(data.prepared))
    vectors = None
    if not training.resume_from_checkpoint:
        vectors = PretrainedTables.open(data.prepared, config.embedding_dim, ds_config.dhen.table_dtype, topology)

    def judge() -> tuple[bool, bool]:
        announce(arguments, layout, data.schema, start.report() if start else None)
        is_too_large = memory_plan.announce(layout)
        return is_too_large, training.async_save == "auto" and memory_plan.has_room_for_copy(layout)

    is_too_large, has_room = rank_zeros(topology, judge)
    if training.async_save == "auto":
        training.async_save = "on" if has_room else "off"
    if is_too_large and arguments.check:
        raise ArgumentError("check did not build the model, because it would need more memory than a rank has.")

    def fill_table(*table: Any, **tensors: Tensor) -> None:
        for source in filter(None, (vectors, start)):  # in this order, so that rows of the trained model win
            source.fill_table(*table, **tensors)

    model = parallelize(
        layout,
        frozen=frozen,
        rate_decay=training.layer_learning_rate_decay,
        seed=training.seed,
        dense_weights=start.dense_weights if start else None,
        fill_table=fill_table,
    )
    for shard, of in model.tables.shard_tensors() if model.tables is not None else ():
        fill_table(shard.name, of["weight"], of["uses"], slice(shard.first_column, shard.last_column))
    for name, uses in model.replicated.uses_by_name().items():
        fill_table(name, uses=uses)
    if start and model.tables is not None:
        model.tables.mark_new_rows()
    if kept:
        take_over_states(model, start, kept)
    if training.ema_decay:
        try:
            model.start_average(training.ema_decay)
        except ValueError as error:
            raise ArgumentError(f"ema_decay is {training.ema_decay}: {error}") from error
    return model


def _frozen_parts(training: TrainingArguments, config: DhenConfig) -> frozenset[str]:
    """The parts that stay as they are. Raises ArgumentError if nothing would be trained, or a part does not exist."""
    frozen = frozen_parts(training.freeze, len(config.layer_specs))
    if training.freezes("features") and not config.num_dense_features * config.num_dense_embeddings:
        raise ArgumentError(
            f"freeze is {quoted(training.freeze)}, but the model has no MLP of dense features. Remove features from it."
        )
    if "head" in frozen and ("tables" in frozen or not config.tables):
        raise ArgumentError(
            f"freeze is {quoted(training.freeze)}, which leaves nothing to train. Leave a part out, such as the layers."
        )
    return frozen


def make_trainer(arguments: Arguments, data: TrainingData, model: ParallelDhen) -> Trainer:
    """Make the trainer: at step 0, or at the step of the checkpoint to resume from. Changes no file."""
    training, rows = arguments.training, data.schema.splits["train"].rows
    output_dir = Path(training.output_dir)
    trainer = Trainer(model, training, data.loaders["train"], data.loaders.get("validation"), output_dir, rows)
    dropouts = [module.p for module in model.engine.module.modules() if isinstance(module, nn.Dropout)]
    if training.self_ensemble and not any(dropouts) and model.topology.is_main:
        logger.warning("self_ensemble has no effect: dropout is 0 in all layers")
    specs, default = model.config.layer_specs, DhenArchitecture()
    for name, (key, values) in NEEDS.items() if model.topology.is_main else ():
        given = [spec for spec in specs if getattr(spec, name) != getattr(default, name)]
        if any(getattr(spec, key) not in values for spec in given):
            logger.warning("%s has no effect in layers whose %s is not %s", name, key, " or ".join(values))
    if training.resume_from_checkpoint:
        folder = Path(training.resume_from_checkpoint)
        trainer.restore(load_checkpoint(model, folder, trainer.running_loss.sums, trainer.data_order), folder)
    if model.tables is not None:
        model.tables.freeze(frozen_tables(data.prepared))
    return trainer


def has_nothing_to_do(arguments: Arguments, trainer: Trainer) -> bool:
    """Whether a resumed run already did all its steps, and more or tested them too. Logs this, or what it resumes.

    Communicates; all ranks call it.
    """
    training, state, topology = arguments.training, trainer.state, trainer.model.topology
    summary = Path(training.output_dir) / SUMMARY_FILE
    # Rank 0 wrote it, perhaps on a disk of its own.
    done = rank_zeros(topology, lambda: json.loads(summary.read_text("utf-8")) if summary.is_file() else {})
    tested_step = state.best_step or state.step if training.load_best_model_at_end else state.step
    wanted = {"steps": state.step, "tested_step": tested_step}
    wanted |= {"calibrate": training.calibrate, "ema_decay": training.ema_decay}
    is_tested = wanted.items() <= done.items() and (training.skip_test or not done["skip_test"])
    is_tested &= not training.write_delta or done.get("write_delta", False)
    is_over = state.step > trainer.total_steps or (trainer.is_done and is_tested)
    if is_over:
        logger.info(
            "the run already did step %d of %d. There is nothing left to train, and its folder stays as it is. Raise "
            "max_steps or num_train_epochs to train on, or set max_steps to %d to test and export these weights.",
            state.step, trainer.total_steps, state.step,
        )  # fmt: skip
    elif training.resume_from_checkpoint and topology.is_main:
        folder = Path(training.resume_from_checkpoint)
        logger.info("resuming from %s at step %d of %d", folder, state.step, trainer.total_steps)
        of_recipe = arguments.recipe(topology.world_size).values()
        changes = _changed_arguments(folder, training, state.step)
        for sentence in changes + _changed_settings(folder, trainer.model, of_recipe):
            logger.info("%s", sentence)
    return is_over


def start_reporting(arguments: Arguments, data: TrainingData, trainer: Trainer) -> ProgressReporter:
    """Clear the run folder, unless the run resumes, and write the set-up to it. Start reporting to the terminal,
    metrics.csv and the trackers. Communicates; all ranks call it. Raises ValueError if another run has the folder.
    """
    output_dir, topology = Path(arguments.training.output_dir), trainer.model.topology

    def lock() -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock_folder(output_dir)
        check_run_folder(arguments.training)  # once more: another run may have come and gone since the first time

    rank_zeros(topology, lock)
    if topology.is_main:
        if arguments.training.resume_from_checkpoint:
            point_latest_at(Path(arguments.training.resume_from_checkpoint), output_dir)
        else:
            clear_run_folder(output_dir)
        log_to_file(output_dir / LOG_FILE)
        write_setup(output_dir, arguments, trainer.model)
    model, gpu = trainer.model, gpu_at_hand(topology) if topology.is_main else None
    peak = peak_samples_per_second(model.config, model.ds_config, arguments.training, gpu) if gpu else None
    return ProgressReporter(
        output_dir,
        trainer.total_steps,
        topology.device,
        is_main=topology.is_main,
        resumed_at=trainer.state.step,
        best_possible_ne=data.schema.best_possible_ne.get("validation"),
        peak_samples_per_second=peak and peak * topology.world_size,
        report_to=trackers_of(arguments.training),
        arguments={"ds_config": arguments.ds_config, **arguments.as_dict()},
    )


def peak_samples_per_second(
    config: DhenConfig, ds_config: DsConfig, training: TrainingArguments, gpu: str
) -> float | None:
    """Samples/s at which the dense part would take all of a GPU's rate; None if the model cannot be traced.

    Actual samples/s divided by this are the MFU. gpu: a built-in machine, which has the rates of a data sheet.
    """
    precision = precision_of(ds_config)
    is_bf16 = torch.bfloat16 in (precision.weights, precision.autocast)
    dtype = "bf16" if is_bf16 else "tf32" if ds_config.dhen.allow_tf32 else "fp32"
    flops = training_flops_per_sample(config, training.per_device_train_batch_size, precision, training.num_passes)
    return read_machine(gpu).flops[dtype] / flops if flops else None


def _num_layers(arguments: Arguments) -> int:
    """Number of layers of the model. When fine-tuning, it comes from the trained model."""
    if arguments.training.model_name_or_path:
        return len(TrainedModel.open(arguments.training.model_name_or_path).config.layer_specs)
    return len(DhenConfig(**vars(arguments.architecture)).layer_specs)


def _changed_arguments(folder: Path, training: TrainingArguments, step: int) -> list[str]:
    """A sentence for each argument that the run that wrote the checkpoint had otherwise."""
    recorded, sentences = read_state(folder)["arguments"], []
    for item in fields(training):
        old, new = recorded.get(item.name, item.default), getattr(training, item.name)
        if old != new and item.name not in _OF_ONE_START:
            does = "keeps the weights of the checkpoint" if item.name == "model_name_or_path" else "honours it"
            sentences.append(f"{item.name} was {old} until step {step}, now {new}: the resumed run {does}")
    return sentences


def _changed_settings(folder: Path, model: ParallelDhen, of_recipe: Collection[str]) -> list[str]:
    """A sentence for each setting of the ds_config that the run of the checkpoint had otherwise.

    of_recipe: settings that follow from the arguments.
    """
    old, new = (dict(_flat(of)) for of in (read_state(folder)["ds_config"], model.ds_config.as_dict()))
    old = dict(_flat({SECTION: DhenSection().model_dump()})) | old  # a key that the checkpoint lacks is newer
    return [
        f"ds_config: {key} was {old.get(key)}, now {new.get(key)}: the resumed run honours it"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in of_recipe
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in json.loads(json.dumps(settings)).items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _saved_placement(ds_config: DsConfig, checkpoint: str | Path | None) -> dict[str, Any]:
    """The parts of the checkpoint's placement that a run with its states must keep, as arguments of `parallelize`.

    Replicated tables stay replicated, because the dense optimizer holds their state. Under row-wise Adagrad, sharded
    tables keep their column cuts, because its state has one number per row and shard.
    """
    if not checkpoint:
        return {}
    cuts = read_state(Path(checkpoint))["table_cuts"]
    sharded = {name: shards for name, shards in cuts.items() if shards}
    return {
        "replicated": [name for name in cuts if name not in sharded],
        "table_cuts": sharded if ds_config.dhen.table_optimizer == "rowwise_adagrad" else None,
    }


def _check_replicated(training: TrainingArguments, layout: Layout, frozen: Collection[str]) -> None:
    """Raise ArgumentError if an option, or `frozen` tables, work on sharded tables only and some are replicated."""
    replicated = layout.placement.replicated
    unset = {"looked_up_l2": 0.0, "whole_table_l2": 0.0, "new_row_learning_rate": None}
    unset |= {"freeze": "none"} if training.freezes("tables") else {}
    for name, default in unset.items():
        if replicated and (value := getattr(training, name)) != default:
            raise ArgumentError(
                f"{name} is {value}, which works on sharded tables only, but {layout.ds_config.path} replicates "
                f"{', '.join(replicated)}. Remove {name}, or set dhen.placement.replicate_below_rows to 0."
            )
    if frozen and (training.whole_table_l2 or not {*frozen}.isdisjoint(replicated)):
        raise ArgumentError(
            f"the schema has `frozen: true` for the vectors of {', '.join(frozen)}, which works without whole_table_l2 "
            "and on sharded tables only. Set whole_table_l2 and dhen.placement.replicate_below_rows to 0."
        )
