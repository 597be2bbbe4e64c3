"""Optimizer states that fine-tuning takes over: those of the checkpoint whose weights the trained model has.

States move with their rows and weights, as fine-tuning matches them; what is new starts at zero. The states of the
dense part are read whole, so the ranks and the ZeRO stage may be others than those that saved.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch import Tensor
from torch.optim import Optimizer

from dhen.config.command_line import ArgumentError
from dhen.dense.averaged_weights import masters_of, set_whole
from dhen.dense.trained_parts import freeze, groups_of
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.model.parts import frozen_parts
from dhen.runtime.collectives import rank_zeros
from dhen.tables.storage import load_states
from dhen.training.parallel_model import ParallelDhen
from dhen.training.reporting.run_folder import SUMMARY_FILE
from dhen.training.saved.checkpoint import optimizer_facts, optimizer_of
from dhen.training.saved.checkpoint_folder import checkpoint_of, is_whole, no_code_from, read_state
from dhen.training.saved.fine_tuning import StartingPoint
from dhen.training.saved.resharding import converted
from dhen.training.saved.trained_model import TrainedModel

logger = logging.getLogger(__name__)
_LEAVE_OUT = "or leave keep_optimizer out."
_States = dict[str, dict[str, Tensor]]
"""By name of the weight and of the state, such as "exp_avg". "step" has no dimension."""


def checkpoint_of_model(trained: TrainedModel) -> Path:
    """The checkpoint whose weights were exported as this model. Raises ArgumentError if it is not there."""
    run = trained.folder.parent
    summary = run / SUMMARY_FILE
    if summary.is_file():
        folder = checkpoint_of(run, json.loads(summary.read_text(encoding="utf-8"))["tested_step"])
        if is_whole(folder):
            return folder
        missing = f"the checkpoint with its optimizer states, {folder}, is gone"
    else:
        missing = f"it is not in the folder of a run, with {SUMMARY_FILE} and checkpoints"
    raise ArgumentError(f"keep_optimizer: {trained.folder}: {missing}. Restore it, {_LEAVE_OUT}")


def take_over_states(model: ParallelDhen, start: StartingPoint, checkpoint: Path) -> None:
    """Let the optimizers of a model that was just built go on from `checkpoint`. Communicates; all ranks call it.

    Raises ArgumentError, TableStorageError or CheckpointError if they cannot.
    """
    topology = model.topology
    saved = rank_zeros(topology, lambda: read_state(checkpoint))
    _check(model, saved, checkpoint)
    if model.tables is not None:
        old_rows = {of.table: of.rows_kept + of.rows_dropped for of in start.tables if of.rows_kept}
        load_states(model.tables, checkpoint, topology, old_rows, start.kept_rows)
    states = _matched(model, start, _read_dense(model, start.trained, saved, checkpoint))
    _write_dense(model, states)
    if topology.is_main:
        logger.info(
            "keep_optimizer: the optimizers go on from %s: states of %d dense weights and of %s rows of tables",
            checkpoint, len(states), f"{sum(match.rows_kept for match in start.tables):,}",
        )  # fmt: skip


def _check(model: ParallelDhen, saved: dict[str, Any], checkpoint: Path) -> None:
    now, offload = optimizer_facts(model), model.ds_config.deepspeed.get("zero_optimization", {})
    name = now["type"]
    if saved["optimizer"] != now:
        raise ArgumentError(
            f"keep_optimizer: {checkpoint} has states of {saved['optimizer']}, but this run has {now}. Use the same "
            f"optimizer and offload in the ds_config, {_LEAVE_OUT}"
        )
    # DeepSpeed's universal form, by which whole states are read, supports those of Adam only.
    is_adam = name in ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam") and not now["params.amsgrad"]
    if not is_adam and (saved["zero_stage"] or model.ds_config.zero_stage):
        raise ArgumentError(f"keep_optimizer: of {name}, states are kept under ZeRO stage 0 only. Use it, {_LEAVE_OUT}")
    if (offload.get("offload_optimizer") or {}).get("device") == "nvme":
        raise ArgumentError(f"keep_optimizer: states on NVMe cannot be taken over. Offload to cpu, {_LEAVE_OUT}")


def _read_dense(model: ParallelDhen, trained: TrainedModel, saved: dict[str, Any], checkpoint: Path) -> _States:
    """The whole states of the dense part in the checkpoint. Communicates; all ranks call it."""
    replicated = [name for name, cuts in saved["table_cuts"].items() if not cuts]
    with torch.device("meta"):
        dense = DhenForClickPrediction(trained.config, with_tables=replicated)
    weights = dict(dense.named_parameters())
    with no_code_from(checkpoint):
        if saved["zero_stage"]:
            with converted(checkpoint, model.topology) as folder:
                files = {name: list((folder / "zero" / name).glob("*.pt")) for name in weights}
                common = {}
                if saved["zero_stage"] == 3:  # which has the number of steps once
                    common = torch.load(folder / "zero" / "optimizer_state.pt")["optimizer_state_dict"]["state"][0]
                common = {"step": torch.as_tensor(common["step"])} if common else {}
                return {
                    name: common | {path.stem: _whole(torch.load(path), weights[name]) for path in of_weight}
                    for name, of_weight in files.items()
                    if of_weight
                }
        of_optimizer = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu")["optimizer"]
    arguments = saved["arguments"]
    freeze(dense, frozen_parts(arguments.get("freeze", "none"), len(trained.config.layer_specs)))
    groups = groups_of(dense, arguments.get("layer_learning_rate_decay", 1.0))
    in_order = [each for group in groups for each in (group["params"] if isinstance(group, dict) else [group])]
    names = {id(weight): name for name, weight in dense.named_parameters()}
    return {
        names[id(in_order[number])]: {kind: torch.as_tensor(of) for kind, of in of_weight.items() if of is not None}
        for number, of_weight in of_optimizer["state"].items()
    }


def _whole(loaded: Any, weight: Tensor) -> Tensor:
    """A state of the universal form in the shape of its weight; stage 3 saves it flat. "step" is one number."""
    state = torch.as_tensor(loaded["param"] if isinstance(loaded, dict) else loaded)
    return state.flatten()[: weight.numel()].view(weight.shape) if state.dim() else state


def _matched(model: ParallelDhen, start: StartingPoint, states: _States) -> _States:
    """The states of the weights that are kept, moved with the features and rows that they belong to."""
    matched: _States = {}
    for kind in {kind for of_weight in states.values() for kind in of_weight}:
        of_kind = {name: of_weight[kind] for name, of_weight in states.items() if kind in of_weight}
        moved = start.matched({name: state for name, state in of_kind.items() if state.dim()})
        moved |= {name: state for name, state in of_kind.items() if not state.dim() and name in start.dense_weights}
        for match in start.tables:
            name = f"tables.{match.table}.weight"
            if match.table in model.placement.replicated and name in of_kind:
                moved[name] = old = of_kind[name]
                if old.dim():
                    moved[name] = old.new_zeros(match.rows, *old.shape[1:])
                    for rows, here in start.kept_rows(match.table):
                        moved[name][here] = old[rows]
        for name, state in moved.items():
            matched.setdefault(name, {})[kind] = state
    return matched


@torch.no_grad()
def _write_dense(model: ParallelDhen, states: _States) -> None:
    """Give the dense part's optimizer its states; a weight without any has 0. Does not communicate."""
    engine, optimizer = model.engine, optimizer_of(model)
    weights = {name: weight for name, weight in engine.module.named_parameters() if weight.requires_grad}
    known = {name: of_weight for name, of_weight in states.items() if name in weights}
    if model.ds_config.zero_stage == 0:
        for name, of_weight in known.items():
            of_optimizer = optimizer.state[weights[name]]
            of_optimizer.update({kind: state.to(weights[name].device) for kind, state in of_weight.items()})
            _set_step(optimizer, of_optimizer, of_weight.get("step"), weights[name].device)
    elif known:
        # DeepSpeed cuts the fp32 weights. Each state goes to its ranks by way of them; then they are put back.
        masters = masters_of(engine)
        before = [master.detach().clone() for master in masters]
        for kind in ("exp_avg", "exp_avg_sq"):
            for name, weight in weights.items():
                new = torch.zeros(getattr(weight, "ds_shape", weight.shape))
                set_whole(engine, weight, known.get(name, {}).get(kind, new))
            for master in masters:
                optimizer.state[master][kind] = master.detach().clone()
        for master, kept in zip(masters, before, strict=True):
            master.data.copy_(kept)
            _set_step(optimizer, optimizer.state[master], next(iter(known.values()))["step"], master.device)


def _set_step(optimizer: Optimizer, state: dict[str, Any], step: Tensor | None, device: torch.device) -> None:
    """Set the number of steps as the optimizer counts them. device: of the weight."""
    if isinstance(optimizer, DeepSpeedCPUAdam | FusedAdam):
        state["step"] = int(step)
    elif step is not None:
        is_on_device = optimizer.param_groups[0].get("fused")
        state["step"] = torch.tensor(float(step), device=device if is_on_device else "cpu")
