"""Train DHEN on click logs.

    deepspeed recipes/train.py --ds_config ds_configs/zero2.json --config recipes/configs/frappe.yaml

Without --config and without a data set it trains the quickstart: a click log that the project generates itself, whose
best possible normalized entropy is known. Also runs under torchrun, accelerate launch, and plain `python`.
"""

import logging
from pathlib import Path
from typing import Any

from dhen.data.batches import BatchLoader
from dhen.data.schema import Schema
from dhen.parallel import topology as job
from dhen.parallel.ds_config import read_ds_config
from dhen.parallel.parallelize import ParallelDhen, parallelize
from dhen.parallel.topology import Topology
from dhen.training.arguments import Arguments, parse_arguments
from dhen.training.checkpoint import checkpoint_of, find_checkpoint, load_checkpoint
from dhen.training.curves import draw_curves
from dhen.training.dataset import prepare_dataset
from dhen.training.fine_tuning import StartingPoint, config_for, start_from
from dhen.training.loop import Trainer, evaluate
from dhen.training.messages import log_to_stderr, user_errors
from dhen.training.model_card import model_card
from dhen.training.progress import ProgressReporter
from dhen.training.run_folder import (
    SUMMARY_FILE,
    announce,
    metrics_of,
    open_run_folder,
    print_metrics,
    write_json,
    write_setup,
)
from dhen.training.trained_model import MODEL_FOLDER, TrainedModel, export_model

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"
logger = logging.getLogger("dhen")


def main() -> None:
    """Read the arguments, join the job, train, leave the job."""
    log_to_stderr()
    with user_errors():
        arguments = parse_arguments(quickstart=QUICKSTART)
    topology = job.start()
    with user_errors(topology):
        model, loaders, start, prepared = set_up(arguments, topology)
        trainer, progress = make_trainer(arguments, model, loaders, start)
    trainer.train(progress)
    finish(arguments, trainer, progress, loaders, start, prepared)
    job.stop()


def set_up(
    arguments: Arguments, topology: Topology
) -> tuple[ParallelDhen, dict[str, BatchLoader], StartingPoint | None, Path]:
    """Run folder, data, model. Communicates; all ranks call it."""
    training = arguments.training
    output_dir = Path(training.output_dir)
    if topology.is_main:
        resumes = training.resume_from_checkpoint is not None
        open_run_folder(output_dir, resumes=resumes, overwrite=training.overwrite_output_dir)
    topology.barrier()
    ds_config = read_ds_config(arguments.ds_config, arguments.recipe(topology.world_size))
    cache = Path(arguments.data.cache_dir) if arguments.data.cache_dir else output_dir.parent / "prepared"
    prepared = prepare_dataset(arguments.data, cache, topology)
    schema = Schema.load(prepared)
    start = None
    if training.model_name_or_path:
        start = start_from(TrainedModel.open(training.model_name_or_path), prepared, schema)
        schema = start.schema
    config = start.config if start else config_for(arguments.architecture, schema)
    model = parallelize(
        config, topology, ds_config, seed=training.seed, dense_weights=start.dense_weights if start else None
    )
    if start and model.tables is not None:
        start.load_tables(model.tables)
    loaders = make_loaders(arguments, topology, prepared, schema)
    if topology.is_main:
        write_setup(output_dir, arguments, model)
        announce(arguments, model, schema, start.report() if start else None)
    return model, loaders, start, prepared


def make_loaders(arguments: Arguments, topology: Topology, prepared: Path, schema: Schema) -> dict[str, BatchLoader]:
    """A loader for each split: train is shuffled and cut into micro steps, the others are read in order."""
    training = arguments.training
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


def make_trainer(
    arguments: Arguments, model: ParallelDhen, loaders: dict[str, BatchLoader], start: StartingPoint | None
) -> tuple[Trainer, ProgressReporter]:
    """The trainer, at the first step or at that of the checkpoint. Communicates; all ranks call it."""
    training, topology = arguments.training, model.topology
    output_dir = Path(training.output_dir)
    trainer = Trainer(model, training, loaders["train"], loaders.get("validation"), output_dir)
    if training.resume_from_checkpoint:
        folder = find_checkpoint(training.resume_from_checkpoint, output_dir)
        trainer.restore(load_checkpoint(model, folder))
        if topology.is_main:
            logger.info("resuming from %s: step %d of %d", folder, trainer.state.step, trainer.total_steps)
    progress = ProgressReporter(
        output_dir, trainer.total_steps, topology.device, is_main=topology.is_main, resumed_at=trainer.state.step
    )
    return trainer, progress


def finish(
    arguments: Arguments,
    trainer: Trainer,
    progress: ProgressReporter,
    loaders: dict[str, BatchLoader],
    start: StartingPoint | None,
    prepared: Path,
) -> None:
    """Best weights back, test, export, summary. Communicates; all ranks call it."""
    training, model = arguments.training, trainer.model
    output_dir, schema = Path(training.output_dir), loaders["train"].schema
    seconds = progress.watch.seconds
    best_step = trainer.state.best_step
    if training.load_best_model_at_end and best_step not in (None, trainer.state.step):
        load_checkpoint(model, checkpoint_of(output_dir, best_step), with_random_state=False)
    tested_step = best_step if training.load_best_model_at_end and best_step is not None else trainer.state.step
    results = {
        name: metrics_of(evaluate(model, loaders[split]), schema.best_possible_ne.get(split))
        for name, split in (("eval", "validation"), ("test", "test"))
        if split in loaders
    }
    summary = results | {
        "samples_per_second": progress.samples_per_second,
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
        progress.close()
        write_json(output_dir / SUMMARY_FILE, summary)
        draw_curves(output_dir, schema.best_possible_ne.get("validation"))
        print_metrics(results)
        logger.info(
            "%s steps in %.0f s, %s samples/s",
            f"{trainer.state.step:,}",
            seconds,
            f"{progress.samples_per_second:,.0f}",
        )
        logger.info(
            "everything is in %s: curves.png, metrics.csv, summary.json, the model in %s/", output_dir, MODEL_FOLDER
        )


if __name__ == "__main__":
    main()
