"""Finishes a run: loads the best weights, tests and exports them, and writes summary.json."""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dhen.config.arguments import Arguments
from dhen.data.formats.roles import COLUMNS_FILE, load_roles
from dhen.data.schema import Schema
from dhen.model.mixture_of_experts import dropped_rows
from dhen.planner.step_trace import training_flops_per_sample
from dhen.training.dataset import TrainingData
from dhen.training.evaluation.group_metrics import GroupedValues, groups_by
from dhen.training.evaluation.unseen import UNSEEN_FILE, report_unseen, write_unseen
from dhen.training.loop import Evaluation, Trainer, evaluate
from dhen.training.memory_plan import precision_of
from dhen.training.reporting.by_group import report_groups, summary_of_groups
from dhen.training.reporting.curves import draw_curves
from dhen.training.reporting.progress import METRICS_FILE, ProgressReporter
from dhen.training.reporting.run_folder import ENVIRONMENT_FILE, SUMMARY_FILE, metrics_of, print_metrics, write_json
from dhen.training.saved.deltas import DELTA_FOLDER, write_delta
from dhen.training.saved.model_card import model_card
from dhen.training.saved.trained_model import MODEL_FOLDER, TrainedModel, export_model

logger = logging.getLogger(__name__)
_FEW_STEPS, _FAR_OFF = 100, 0.05
_NAMES = {"validation": "eval", "test": "test"}
"""The splits in summary.json."""


def finish(arguments: Arguments, data: TrainingData, trainer: Trainer, progress: ProgressReporter) -> None:
    """Test and export the best weights, or the last ones if load_best_model_at_end is false.

    Communicates; all ranks call it.
    """
    training, model, state, best_ne = arguments.training, trainer.model, trainer.state, data.schema.best_possible_ne
    output_dir, seconds, world = Path(training.output_dir), progress.watch.seconds, model.topology.world
    tested_step = trainer.load_best("Testing") if training.load_best_model_at_end else state.step
    splits = ["validation"] if training.skip_test else ["validation", "test"]
    splits = [split for split in splits if split in data.loaders]
    groups = {split: groups_by(training.metrics_by, data.schema) for split in splits}
    values = {split: evaluate(model, data.loaders[split], list(groups[split].values())) for split in splits}
    before = {split: of_split.metrics for split, of_split in values.items()}
    scale, task_scales = 1.0, {}
    if training.calibrate:
        scale = values["validation"].scores.best_scale(world)
        task_scales = {name: each.best_scale(world) for name, each in values["validation"].task_scores.items()}
        if scale == 1:
            logger.warning("calibrate: no number makes the validation loss least, so the logits stay as they are")
        values = {split: _scaled(of_split, scale, task_scales, world) for split, of_split in values.items()}
    results = {_NAMES[split]: metrics_of(of_split, best_ne.get(split)) for split, of_split in values.items()}
    by_group: dict[str, dict[str, GroupedValues]] = {}
    for split, of_split in groups.items() if training.metrics_by else ():
        for each in of_split.values():
            each.scale(scale)
        by_group[split] = {name: each.compute(model.topology) for name, each in of_split.items()}
        results[_NAMES[split]]["by"] = summary_of_groups(by_group[split])
    for split, metrics in before.items() if scale != 1 else ():
        results[_NAMES[split]] |= {"ne_before_scale": metrics.ne, "calibration_before_scale": metrics.calibration}
    flops = None
    if model.topology.is_main:
        batch_size, precision = training.per_device_train_batch_size, precision_of(model.ds_config)
        flops = training_flops_per_sample(model.config, batch_size, precision, training.num_passes)
    summary = results | {
        "calibrate": training.calibrate,
        "skip_test": training.skip_test,
        "write_delta": training.write_delta,
        "ema_decay": training.ema_decay,
        "logit_scale": scale,
        "task_logit_scales": task_scales,
        "samples_per_second": progress.samples_per_second or _earlier_rate(output_dir),
        "seconds": seconds,
        "world_size": model.topology.world_size,
        "steps": state.step,
        "tested_step": tested_step,
        "samples_seen": state.samples_seen,
        "ds_config": arguments.ds_config,
        "zero_stage": model.ds_config.zero_stage,
        "setup": f"{model.ds_config.in_short()}; {model.topology.world_size} ranks on {model.topology.device.type}",
        "training_flops_per_sample": flops,
    }
    if (rows := dropped_rows(model.engine.module)) is not None:
        dist.all_reduce(rows, group=world)
        summary["dropped_share"] = rows[1].item() / max(rows[0].item(), 1)
    card = ""
    if model.topology.is_main:
        environment = json.loads((output_dir / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
        columns = data.prepared / COLUMNS_FILE
        roles = load_roles(columns) if columns.is_file() else None
        card = model_card(model.config, data.schema, summary, environment, output_dir / MODEL_FOLDER, roles)
        shutil.rmtree(output_dir / DELTA_FOLDER, ignore_errors=True)  # an earlier one does not give this model
    with model.averaged():
        scales = {"head": scale} | {f"tasks.heads.{name}": of_task for name, of_task in task_scales.items()}
        export_model(model, output_dir / MODEL_FOLDER, data.schema, data.prepared, card, scales)
    if model.topology.is_main:
        if training.write_delta:
            folder, exported = output_dir / DELTA_FOLDER, TrainedModel(output_dir / MODEL_FOLDER)
            changed = write_delta(data.start.trained, exported, folder)
            rows = ", ".join(f"{rows:,} rows of {table}" for table, rows in changed.items())
            logger.info("%s has what changed: all dense weights, %s", folder, rows)
        write_json(output_dir / SUMMARY_FILE, summary)  # last: a run that has it is finished
        _say(arguments, data, summary, values, by_group)


def _say(
    arguments: Arguments,
    data: TrainingData,
    summary: Mapping[str, Any],
    values: Mapping[str, Evaluation],
    by_group: Mapping[str, Mapping[str, GroupedValues]],
) -> None:
    """Print and draw the results, and say what was tested, what is doubtful and where all is. Rank 0 calls it.

    values: by split. by_group: by split and feature.
    """
    training, output_dir, steps = arguments.training, Path(arguments.training.output_dir), summary["steps"]
    draw_curves(output_dir / METRICS_FILE, data.schema.best_possible_ne.get("validation"))
    print_metrics({_NAMES[split]: summary[_NAMES[split]] for split in values})
    for split, of_split in by_group.items():
        for name, each in of_split.items():
            report_groups(name, each, data.loaders[split], output_dir / _NAMES[split])
    unseen = {split: of_split.unseen for split, of_split in values.items()}
    write_unseen(output_dir / UNSEEN_FILE, unseen)
    for split, of_split in unseen.items():
        report_unseen(split, of_split, data.schema)
    for sentence in doubts(arguments, steps, summary["tested_step"], values, data.schema):
        logger.warning("%s", sentence)
    if "dropped_share" in summary:
        logger.info("experts were full for %.2f %% of the choices in training", 100 * summary["dropped_share"])
    seconds, rate = summary["seconds"], summary["samples_per_second"]
    logger.info("%s steps in %.0f s, %s samples/s", f"{steps:,}", seconds, f"{rate:,.0f}")
    is_last = summary["tested_step"] == steps
    best = "" if is_last else f", whose validation {training.metric_for_best_model} was the best"
    tested = "" if training.skip_test else "tested and "
    logger.info(f"{tested}exported: the weights of step %s%s", f"{summary['tested_step']:,}", best)
    logger.info(
        "results are in %s: curves.png, metrics.csv, summary.json, unseen.csv, and the model in %s/",
        output_dir,
        MODEL_FOLDER,
    )


def _scaled(values: Evaluation, scale: float, task_scales: Mapping[str, float], group: dist.ProcessGroup) -> Evaluation:
    """With all logits multiplied by the scale of their task. Communicates over `group`."""
    metrics = values.metrics if scale == 1 else values.scores.scaled(scale).compute(group)
    tasks = {name: scores.scaled(task_scales[name]).compute(group) for name, scores in values.task_scores.items()}
    return replace(values, metrics=metrics, tasks=tasks)


def doubts(
    arguments: Arguments, steps: int, tested_step: int, values: Mapping[str, Evaluation], schema: Schema
) -> list[str]:
    """A sentence if the run was short; otherwise one for each split whose predictions are far from its click rate."""
    if steps < _FEW_STEPS:
        way_out = "a smaller per_device_train_batch_size or more num_train_epochs, or leave both out"
        if arguments.training.max_steps > 0:
            way_out = "a larger max_steps"
        return [f"the run made only {steps} steps, so it has probably learned little from these rows. Use {way_out}."]
    advice = "Train longer" + " or with less dropout" * bool(arguments.architecture.dropout)
    advice += "" if arguments.training.calibrate else ", or use --calibrate"
    if tested_step < steps:
        advice = "The model overfits after that step: try a larger table_epsilon, fewer epochs or dropout"
    sentences = []
    for name, of_split in values.items():
        calibration, counts = of_split.metrics.calibration, schema.splits[name]
        if abs(calibration - 1) > _FAR_OFF:
            chance = math.sqrt((1 - counts.clicks / counts.rows) / counts.clicks)
            why = f"With so few clicks, chance explains this: its standard error is {chance:.3f}."
            if abs(calibration - 1) >= 2 * chance:
                why = f"{advice}, and check that these rows are like the training rows."
            way = "high" if calibration > 1 else "low"
            sentences.append(
                f"{name}: the predictions are too {way} on average: calibration is {calibration:.3f}. {why}"
            )
    return sentences


def _earlier_rate(output_dir: Path) -> float:
    """samples/s from an earlier summary.json, for a finished run that is resumed and makes no step. 0 without one."""
    path = output_dir / SUMMARY_FILE
    return json.loads(path.read_text(encoding="utf-8"))["samples_per_second"] or 0.0 if path.is_file() else 0.0
