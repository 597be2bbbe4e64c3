"""Train DHEN on click logs.

    deepspeed recipes/train.py --ds_config ds_configs/zero2.json --config recipes/configs/frappe.yaml

Without --config and without a data set it trains the quickstart: a click log that the project generates itself, whose
best possible normalized entropy is known. Also runs under torchrun, accelerate launch, and plain `python`.
"""

import json
import logging
from pathlib import Path
from typing import Any

from dhen.config.arguments import ArgumentError, Arguments, TrainingArguments, parse_arguments
from dhen.config.ds_config import AUTO, DsConfig, read_ds_config
from dhen.data.loading.batches import BatchLoader
from dhen.data.loading.prepared_rows import mean_bag_sizes
from dhen.data.schema import Schema
from dhen.model.configuration_dhen import DhenConfig
from dhen.runtime import topology as job
from dhen.runtime.lost_ranks import naming_lost_ranks
from dhen.runtime.machine_at_hand import rank_memory_bytes
from dhen.runtime.messages import log_to_stderr, user_errors
from dhen.runtime.topology import Topology
from dhen.training.auto_ds_config import choose_ds_config
from dhen.training.curves import draw_curves
from dhen.training.dataset import prepare_dataset, settings_without_effect
from dhen.training.loop import Trainer, evaluate
from dhen.training.memory_plan import MemoryPlan
from dhen.training.parallelize import ParallelDhen, parallelize
from dhen.training.progress import METRICS_FILE, ProgressReporter
from dhen.training.run_folder import (
    SUMMARY_FILE,
    announce,
    check_run_folder,
    clear_run_folder,
    metrics_of,
    print_metrics,
    write_json,
    write_setup,
)
from dhen.training.saved.checkpoint import (
    check_same_model,
    checkpoint_of,
    find_checkpoint,
    is_whole,
    load_checkpoint,
    point_latest_at,
    saved_table_cuts,
)
from dhen.training.saved.fine_tuning import StartingPoint, config_for, frozen_and_new, ignored_architecture, start_from
from dhen.training.saved.model_card import model_card
from dhen.training.saved.trained_model import MODEL_FOLDER, TrainedModel, export_model

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"
logger = logging.getLogger("dhen")


def main() -> None:
    """Read the arguments, join the job, train, leave the job."""
    log_to_stderr()
    with user_errors():
        arguments = parse_arguments(quickstart=QUICKSTART)
    topology = job.start()
    with user_errors():
        model, loaders, prepared = set_up(arguments, topology)
        trainer, progress = make_trainer(arguments, model, loaders)
    with user_errors(FloatingPointError), naming_lost_ranks(topology):
        try:
            trainer.train(progress)
        finally:
            progress.close()
        finish(arguments, trainer, progress, loaders, prepared)
    job.stop()


def set_up(arguments: Arguments, topology: Topology) -> tuple[ParallelDhen, dict[str, BatchLoader], Path]:
    """Data and model; leaves the run folder as it is. Communicates; all ranks call it."""
    training = arguments.training
    output_dir = Path(training.output_dir)
    check_run_folder(output_dir, training)
    ds_config = None
    if arguments.ds_config != AUTO:  # first, so that a mistake in it is met before the data is prepared
        ds_config = read_ds_config(arguments.ds_config, arguments.recipe(topology.world_size), num_layers(arguments))
    cache = Path(arguments.data.cache_dir) if arguments.data.cache_dir else output_dir.parent / "prepared"
    prepared = prepare_dataset(arguments.data, cache, topology)
    schema = Schema.load(prepared)
    start = None
    if training.model_name_or_path:
        start = start_from(TrainedModel.open(training.model_name_or_path), prepared, schema)
        schema = start.schema
    warn_of_ignored(arguments, schema, start, topology)
    config = start.config if start else config_for(arguments.architecture, schema)
    if training.resume_from_checkpoint:  # before the model is built: other tables can't be placed as the save's were
        check_same_model(find_checkpoint(training.resume_from_checkpoint, output_dir), config)
    memory_bytes, ids_per_bag = rank_memory_bytes(topology), mean_bag_sizes(prepared, schema)
    if ds_config is None:
        ds_config = choose_ds_config(arguments, config, topology, memory_bytes, ids_per_bag)
    memory_plan = None
    if topology.is_main:
        memory_plan = MemoryPlan.of(config, ds_config, memory_bytes, training.per_device_eval_batch_size)
    model = parallelize(
        config,
        topology,
        ds_config,
        seed=training.seed,
        table_epsilon=training.table_epsilon,
        dense_weights=start.dense_weights if start else None,
        ids_per_bag=ids_per_bag,
        fill_table=start.fill_table if start else None,
        **fixed_placement(ds_config, training),
    )
    check_replicated(training, model)
    if start and model.tables is not None:
        start.load_tables(model.tables)
    loaders = make_loaders(arguments, topology, prepared, schema)
    if topology.is_main:
        announce(arguments, model, schema, start.report() if start else None)
        memory_plan.announce(model)
    return model, loaders, prepared


def num_layers(arguments: Arguments) -> int:
    """Depth of the model that is trained: in fine-tuning the trained model's."""
    if arguments.training.model_name_or_path:
        return len(TrainedModel.open(arguments.training.model_name_or_path).config.layer_specs)
    return len(DhenConfig(**vars(arguments.architecture)).layer_specs)


def fixed_placement(ds_config: DsConfig, training: TrainingArguments) -> dict[str, Any]:
    """What a resumed run must keep of its placement: which tables the dense optimizer has, and under row-wise Adagrad,
    whose state is one number a row and shard, the column shards of the others."""
    if not training.resume_from_checkpoint:
        return {}
    cuts = saved_table_cuts(find_checkpoint(training.resume_from_checkpoint, Path(training.output_dir)))
    kept = {name: shards for name, shards in cuts.items() if shards}
    return {
        "replicated": [name for name in cuts if name not in kept],
        "table_cuts": kept if ds_config.dhen.table_optimizer == "rowwise_adagrad" else None,
    }


def check_replicated(training: TrainingArguments, model: ParallelDhen) -> None:
    """Raise ArgumentError for what is done to sharded tables alone, where tables are replicated."""
    replicated = model.placement.replicated
    asked = {name: getattr(training, name) for name in ("freeze", "looked_up_l2", "whole_table_l2")}
    for name, value in asked.items():
        if replicated and value and value != "none":
            raise ArgumentError(
                f"{name} is {value}, but {model.ds_config.path} replicates tables ({', '.join(replicated)}), which are "
                f"trained as the dense part is. Leave out {name}, or set dhen.placement.replicate_below_rows to 0."
            )


def warn_of_ignored(arguments: Arguments, schema: Schema, start: StartingPoint | None, topology: Topology) -> None:
    """Say what the user set and nothing will read, and what stays as it is drawn at random."""
    if topology.is_main:
        sentences = settings_without_effect(arguments.data, schema) + arguments.training.without_effect()
        if start:
            sentences += ignored_architecture(arguments.architecture, start)
            sentences += frozen_and_new(arguments.training.freeze, start)
        for sentence in sentences:
            logger.warning("%s", sentence)


def make_loaders(arguments: Arguments, topology: Topology, prepared: Path, schema: Schema) -> dict[str, BatchLoader]:
    """A loader for each split: train is shuffled and cut into micro steps, the others are read in order."""
    training = arguments.training
    check_splits(arguments, schema)
    place = {"rank": topology.rank, "world_size": topology.world_size, "pin_memory": topology.device.type == "cuda"}
    loaders = {
        split: BatchLoader(prepared, split, batch_size=training.per_device_eval_batch_size, schema=schema, **place)
        for split in schema.splits
        if split != "train"
    }
    train: dict[str, Any] = {
        "batch_size": training.per_device_train_batch_size,
        "accumulation_steps": training.gradient_accumulation_steps,
        "drop_last": training.dataloader_drop_last,
    }
    loaders["train"] = BatchLoader(prepared, "train", shuffle=True, seed=training.seed, schema=schema, **train, **place)
    return loaders


def check_splits(arguments: Arguments, schema: Schema) -> None:
    """Raise ArgumentError where the data hasn't what the arguments rely on."""
    training = arguments.training
    for split, counts in schema.splits.items():
        if counts.unlabelled:
            raise ArgumentError(f"{counts.unlabelled:,} rows of the {split} split have no label. Give labelled rows.")
    if "validation" not in schema.splits:
        if training.early_stopping_patience:
            raise ArgumentError("early_stopping_patience needs a validation split, and the data has none.")
        if training.lr_scheduler_type == "reduce_lr_on_plateau":
            raise ArgumentError("lr_scheduler_type reduce_lr_on_plateau needs a validation split; the data has none.")


def make_trainer(
    arguments: Arguments, model: ParallelDhen, loaders: dict[str, BatchLoader]
) -> tuple[Trainer, ProgressReporter]:
    """The trainer, at step 0 or at the checkpoint's, and its run folder. Communicates; all ranks call it."""
    training, topology = arguments.training, model.topology
    output_dir = Path(training.output_dir)
    trainer = Trainer(model, training, loaders["train"], loaders.get("validation"), output_dir)
    if training.resume_from_checkpoint:
        folder = find_checkpoint(training.resume_from_checkpoint, output_dir)
        trainer.restore(load_checkpoint(model, folder, trainer.data_order))
        if topology.is_main:
            point_latest_at(folder, output_dir)
            logger.info("resuming from %s: step %d of %d", folder, trainer.state.step, trainer.total_steps)
    elif topology.is_main:
        clear_run_folder(output_dir)
    if topology.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_setup(output_dir, arguments, model)
    progress = ProgressReporter(
        output_dir,
        trainer.total_steps,
        topology.device,
        is_main=topology.is_main,
        resumed_at=trainer.state.step,
        best_possible_ne=loaders["train"].schema.best_possible_ne.get("validation"),
    )
    return trainer, progress


def finish(
    arguments: Arguments,
    trainer: Trainer,
    progress: ProgressReporter,
    loaders: dict[str, BatchLoader],
    prepared: Path,
) -> None:
    """Best weights back, test, export, summary. Communicates; all ranks call it."""
    training, model = arguments.training, trainer.model
    output_dir, schema = Path(training.output_dir), loaders["train"].schema
    seconds = progress.watch.seconds
    tested_step = load_best(trainer, output_dir) if training.load_best_model_at_end else trainer.state.step
    results = {
        name: metrics_of(evaluate(model, loaders[split]), schema.best_possible_ne.get(split))
        for name, split in (("eval", "validation"), ("test", "test"))
        if split in loaders
    }
    samples_per_second = progress.samples_per_second or earlier_rate(output_dir)
    summary = results | {
        "samples_per_second": samples_per_second,
        "seconds": seconds,
        "world_size": model.topology.world_size,
        "steps": trainer.state.step,
        "tested_step": tested_step,
        "samples_seen": trainer.state.samples_seen,
        "ds_config": arguments.ds_config,
        "zero_stage": model.ds_config.zero_stage,
    }
    export_model(model, output_dir / MODEL_FOLDER, schema, prepared, model_card(model.config, schema, summary))
    if model.topology.is_main:
        write_json(output_dir / SUMMARY_FILE, summary)
        draw_curves(output_dir / METRICS_FILE, schema.best_possible_ne.get("validation"))
        print_metrics(results)
        logger.info(
            "%s steps in %.0f s, %s samples/s",
            f"{trainer.state.step:,}",
            seconds,
            f"{samples_per_second:,.0f}",
        )
        logger.info(
            "everything is in %s: curves.png, metrics.csv, summary.json, the model in %s/", output_dir, MODEL_FOLDER
        )


def earlier_rate(output_dir: Path) -> float:
    """samples/s of an earlier session: one that resumes a finished run makes no update of its own."""
    path = output_dir / SUMMARY_FILE
    return json.loads(path.read_text(encoding="utf-8"))["samples_per_second"] or 0.0 if path.is_file() else 0.0


def load_best(trainer: Trainer, output_dir: Path) -> int:
    """Bring back the weights of the best checkpoint; returns its step. Communicates; all ranks call it."""
    state = trainer.state
    if state.best_step in (None, state.step):
        return state.step
    folder = checkpoint_of(output_dir, state.best_step)
    if not is_whole(folder):  # resumed from elsewhere, or from before a better one took its place
        if trainer.model.topology.is_main:
            logger.warning("%s is the best checkpoint but isn't there: the last weights are tested", folder)
        return state.step
    load_checkpoint(trainer.model, folder, with_random_state=False)
    return state.best_step


if __name__ == "__main__":
    main()
