"""Checkpoints: everything a run needs to continue as if it had not stopped, on the same or a different set of ranks.

`output_dir/checkpoint-<step>/` holds DeepSpeed's files (dense weights and optimizer), `tables-<rank>.safetensors`,
`rank-<rank>.pt` (random state, running statistics) and `trainer_state.json`. The last file is written when all ranks
are done: a checkpoint is complete if it has this file. Then `output_dir/latest` is set to the new name. An interrupted
save leaves the previous checkpoint in place.
"""

import json
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.optim import Optimizer

from dhen.data.format_version import VERSION_KEY
from dhen.dense.trained_parts import ANCHOR
from dhen.model.configuration_dhen import DhenArchitecture, DhenConfig
from dhen.model.parts import part_of
from dhen.runtime import background
from dhen.runtime.topology import Topology
from dhen.tables.storage import load_tables, tables_in_pieces
from dhen.training.parallel_model import ParallelDhen
from dhen.training.saved.checkpoint_folder import (
    FORMAT_VERSION,
    CheckpointError,
    FileFacts,
    checkpoint_of,
    finish_folder,
    naming_the_disk,
    no_code_from,
    read_state,
    start_folder,
)
from dhen.training.saved.checkpoint_writing import CheckpointFiles, saving_into
from dhen.training.saved.resharding import load_resharded

_ORDER_BEFORE = {"lanes": 1, "shuffle": "window"}
"""What checkpoints do not say that are older than these options."""
_AVERAGE = "average-of-dense.safetensors"
_REPLICATED_USES = "uses-of-replicated.safetensors"
_WAY_OUT = (
    "Resume with the same value (and the same --model_name_or_path, if the run started from a trained model), or start "
    "a new run from the exported model with --model_name_or_path."
)


@dataclass
class TrainerState:
    """The progress of a run. step: steps done in total. step_in_epoch: steps done in the current epoch."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    samples_seen: int = 0
    best_step: int | None = None
    schedule: dict[str, Any] = field(default_factory=dict)
    best_metric: dict[str, Any] = field(default_factory=dict)


@dataclass
class Save:
    """A checkpoint that is being written."""

    folder: Path
    facts: dict[str, Any]
    files: "Future[FileFacts]"

    @property
    def is_written(self) -> bool:
        """Whether this rank's files are on the disk. Raises what stopped the writing."""
        return self.files.done() and bool(self.files.result())

    def finish(self, topology: Topology) -> Path:
        """Wait for the files of all ranks, complete the checkpoint and point `latest` at it. All ranks call it."""
        finish_folder(self.folder, self.facts, self.files.result(), topology)
        return self.folder


def start_save(
    model: ParallelDhen,
    output_dir: Path,
    state: TrainerState,
    running_loss: torch.Tensor | None = None,
    data_order: dict[str, Any] | None = None,
    arguments: dict[str, Any] | None = None,
    *,
    in_background: bool = False,
) -> Save:
    """Write output_dir/checkpoint-<step>. Communicates; all ranks call it, and then `finish` of the result.

    running_loss: this rank's sums for the next progress line. data_order: everything that determines which rows a step
    trains on. A resumed run must have the same. arguments: what it may have otherwise. in_background: only copy the
    states to host memory, and write them while training goes on.
    """
    topology, folder = model.topology, checkpoint_of(output_dir, state.step)
    facts = _set_up(model) | {"data_order": data_order or {}, "table_cuts": model.placement.cuts()}
    facts |= {"arguments": arguments or {}, "ds_config": model.ds_config.as_dict(), VERSION_KEY: FORMAT_VERSION}
    facts |= {"model": _model_facts(model.config), "optimizer": optimizer_facts(model)}
    facts |= {"trained": _trained_parts(model)}
    if topology.is_main:
        with naming_the_disk(folder):
            start_folder(folder)
    topology.barrier()
    files = CheckpointFiles(folder, is_staged=in_background)
    _add_states(model, files, running_loss)
    return Save(folder, json.loads(json.dumps(facts | vars(state))), background.in_background(files.write))


def _add_states(model: ParallelDhen, files: CheckpointFiles, running_loss: torch.Tensor | None) -> None:
    topology, folder = model.topology, files.folder
    if model.tables is not None:
        model.tables.synchronize()
    of_rank = {"random": _random_state(topology.device), "running_loss": running_loss} | model.statistics()
    files.add_pickle(f"rank-{topology.rank:05d}.pt", of_rank)
    with model.with_average_buffers(), saving_into(files, model.engine):
        model.engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        if model.average is not None:
            with model.average.swapped_in():  # without the tables, which would bring all rows up to date
                state_dict = model.dense_state_dict(fills_unused=False)
                if topology.is_main:
                    files.add_tensors(_AVERAGE, state_dict)
    if model.tables is not None and model.tables.replica_index == 0:
        files.add_pieces(f"tables-{topology.rank:05d}.safetensors", *tables_in_pieces(model.tables))
    if model.replicated.tables:
        model.replicated.gather_uses()
        if topology.is_main:
            files.add_tensors(_REPLICATED_USES, model.replicated.uses_by_name())


def load_checkpoint(
    model: ParallelDhen,
    folder: Path,
    running_loss: torch.Tensor | None = None,
    data_order: dict[str, Any] | None = None,
    *,
    with_random_state: bool = True,
) -> TrainerState:
    """Load model, optimizers and random state from `folder`. Communicates; all ranks call it.

    running_loss: filled with this rank's sums, if as many ranks saved them.

    Raises CheckpointError before loading anything if the checkpoint is not complete, or its set-up, model or data
    differ from this run's.
    """
    check_same_model(folder, model.config)
    values = read_state(folder)
    topology = model.topology
    here = _set_up(model)
    saved = {name: values.pop(name) for name in here}
    is_same_cut = here["zero_stage"] == 0 or saved["shard_size"] == here["shard_size"]
    # DeepSpeed's universal form, by which other ranks load, supports the states of Adam only.
    can_load = is_same_cut or "adam" in model.ds_config.deepspeed["optimizer"]["type"].lower()
    if saved["zero_stage"] != here["zero_stage"] or not can_load:
        raise CheckpointError(
            f"{folder}: saved by {saved['world_size']} ranks, {saved['shard_size']} per replica, under ZeRO stage "
            f"{saved['zero_stage']}. This job has {here['world_size']} ranks, {here['shard_size']} per replica, and "
            f"stage {here['zero_stage']}. Use the same stage and, unless the optimizer is Adam, the same number of "
            "ranks per replica. Or start from the exported model with --model_name_or_path."
        )
    now = optimizer_facts(model)
    _check_same(folder, now | values["optimizer"], now, of="optimizer.")
    then, parts = values["trained"], _trained_parts(model)
    if then != parts:
        raise CheckpointError(
            f"{folder}: saved with optimizer states for {', '.join(then)}, but this run trains {', '.join(parts)}. "
            "Use the same freeze (except for tables), and layer_learning_rate_decay below 1 if it was, or start from "
            "the exported model with --model_name_or_path."
        )
    saved_order = _ORDER_BEFORE | values.pop("data_order")
    why = "The resumed run would train on other rows or features than the saved one. "
    _check_same(folder, saved_order, saved_order | (data_order or {}), why=why)
    groups = optimizer_of(model).param_groups
    options = [{key: group[key] for key in group.keys() - {"params", "lr"}} for group in groups]
    with no_code_from(folder):
        if is_same_cut:
            name, root = folder.name, str(folder.parent)
            loaded, _ = model.engine.load_checkpoint(root, tag=name, load_lr_scheduler_states=False)
            if loaded is None:
                raise CheckpointError(f"{folder}: DeepSpeed found no checkpoint here. Resume from another one.")
        else:
            load_resharded(model, folder)
    _step_as_configured(model, options)
    if model.tables is not None:
        load_tables(model.tables, folder, topology)
    if model.average is not None and (folder / _AVERAGE).is_file():
        model.average.load(load_file(folder / _AVERAGE))
    elif model.average is not None:  # the run that saved had none, so the tables start theirs here, too
        model.average.restart()
    if model.replicated.tables:
        model.replicated.load_uses(load_file(folder / _REPLICATED_USES))
    if with_random_state and saved["world_size"] == here["world_size"]:
        with no_code_from(folder):
            of_rank = torch.load(folder / f"rank-{topology.rank:05d}.pt", map_location="cpu")
        _set_random_state(of_rank["random"])
        for name, statistics in model.statistics().items():  # the run that saved may have had no average
            for statistic, of_this_rank in zip(statistics, of_rank.get(name, ()), strict=name in of_rank):
                statistic.copy_(of_this_rank)
        if running_loss is not None and of_rank["running_loss"] is not None:
            running_loss.copy_(of_rank["running_loss"])
    return TrainerState(**{item.name: values[item.name] for item in fields(TrainerState)})


def optimizer_of(model: ParallelDhen) -> Optimizer:
    """The optimizer inside of DeepSpeed's, which has the states of the dense part."""
    return getattr(model.engine.optimizer, "optimizer", model.engine.optimizer)


def optimizer_facts(model: ParallelDhen) -> dict[str, Any]:
    """What the state of the dense part's optimizer depends on."""
    optimizer = optimizer_of(model)
    group = optimizer.param_groups[0]
    switches = {f"params.{name}": bool(group.get(name)) for name in ("amsgrad", "centered", "momentum")}
    return {"type": type(optimizer).__name__} | switches


def _trained_parts(model: ParallelDhen) -> list[str]:
    """The parts of the dense part that are trained, which the files of the optimizer's state depend on."""
    num_layers, weights = len(model.config.layer_specs), model.engine.module.named_parameters()
    parts = {part_of(name, num_layers) for name, weight in weights if weight.requires_grad} - {ANCHOR}
    has_rates = len(optimizer_of(model).param_groups) > 1
    return sorted(parts) + ["each with a learning rate"] * has_rates or ["no weight"]


def _step_as_configured(model: ParallelDhen, options: list[dict[str, Any]]) -> None:
    """Let the optimizer step with the options of this run, by group. Loading its state replaced them by the saved ones.

    A fused step reads its counters on the device of the weights, where DeepSpeed's universal loader doesn't put them.
    """
    optimizer = optimizer_of(model)
    for group, of_group in zip(optimizer.param_groups, options, strict=True):
        group.update(of_group)
    for weight, state in optimizer.state.items():
        if options[0].get("fused") and isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].to(weight.device)


def check_same_model(folder: Path, config: DhenConfig) -> None:
    """Raise CheckpointError, naming the difference, if the checkpoint's model is not that of `config`.

    An option that the checkpoint does not have is newer than it. Its default leaves a model as it was before.
    """
    _check_same(folder, vars(DhenArchitecture()) | read_state(folder)["model"], _model_facts(config))


def _check_same(folder: Path, saved: dict[str, Any], now: dict[str, Any], of: str = "", why: str = "") -> None:
    for name in saved | now:
        before, after = saved.get(name), now.get(name)
        if before != after:
            raise CheckpointError(f"{folder}: saved with {of}{name} {_shown(before, after)}. {why}{_WAY_OUT}")


def _set_up(model: ParallelDhen) -> dict[str, int]:
    """The values that the ranks' files depend on. shard_size: number of ranks that share one dense replica."""
    return {
        "world_size": model.topology.world_size,
        "shard_size": model.shard_size,
        "zero_stage": model.ds_config.zero_stage,
    }


def _model_facts(config: DhenConfig) -> dict[str, Any]:
    """The values that the weights depend on, in JSON types: the features, in order, and the architecture."""
    facts = {
        "sparse features": [feature.name for feature in config.features],
        "rows of tables": {table.name: table.num_embeddings for table in config.tables},
        "pooling": {feature.name: feature.pooling for feature in config.features},
        "num_dense_features": config.num_dense_features,
    }
    if longest := {feature.name: feature.max_length for feature in config.features if feature.max_length}:
        facts["max_length"] = longest
    if any(layer.gate != "none" for layer in config.layer_specs):
        facts["start of gates"] = 0  # it was 2, when their weights had another meaning
    if len(config.tables) < len(config.features):
        facts["tables of features"] = {feature.name: feature.table for feature in config.features}
    return json.loads(json.dumps(facts | vars(config.architecture)))


def _shown(saved: Any, now: Any) -> str:
    """Both values. For mappings and lists of equal length, only the first difference."""
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        saved, now = dict(enumerate(saved, start=1)), dict(enumerate(now, start=1))
    where = ""
    if isinstance(saved, dict) and isinstance(now, dict):
        key = next(key for key in (*saved, *now) if saved.get(key) != now.get(key))
        where, saved, now = f" (at {key!r})", saved.get(key), now.get(key)
    return f"{saved!r:.300}, now {now!r:.300}{where}"


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
