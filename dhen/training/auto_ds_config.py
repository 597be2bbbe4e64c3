"""--ds_config auto: the planner chooses the memory techniques for this machine (paper 3.1).

A resumed run keeps the techniques of the run that wrote its checkpoint, because another ZeRO stage could not load it.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dhen.config.arguments import Arguments
from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import AUTO, DsConfig, DsConfigError, Recipe, check_ds_config
from dhen.model.configuration_dhen import DhenConfig
from dhen.planner.job import Job
from dhen.planner.minimum_set import NothingFitsError, Planner
from dhen.planner.nearest_machine import machine_at_hand
from dhen.planner.step_trace import UntraceableError
from dhen.runtime.collectives import rank_zeros
from dhen.runtime.topology import Topology
from dhen.tables.placement.costs import CostsError
from dhen.tables.placement.plan import PlacementError
from dhen.training.saved.checkpoint_folder import read_state

logger = logging.getLogger(__name__)


def choose_ds_config(
    arguments: Arguments,
    config: DhenConfig,
    topology: Topology,
    memory_bytes: int,
    ids_per_bag: Mapping[str, float],
) -> DsConfig:
    """Plan the ds_config on rank 0 and return it on all ranks. Communicates; all ranks call it.

    memory_bytes: memory per rank. Raises ValueError on all ranks if no set of techniques fits or planning fails.
    """
    training, recipe = arguments.training, arguments.recipe(topology.world_size)

    def choose() -> tuple[dict[str, Any], str]:
        if training.resume_from_checkpoint:
            return _saved_ds_config(Path(training.resume_from_checkpoint), recipe)
        nodes, rest = divmod(topology.world_size, topology.local_size)
        if rest:
            raise DsConfigError(
                f"ds_config auto needs the same number of ranks on every node, but this job has {topology.world_size} "
                f"ranks, {topology.local_size} of them on this node. Name a ds_config."
            )
        job = Job(
            config,
            training.per_device_train_batch_size,
            machine_at_hand(topology, memory_bytes),
            nodes,
            ids_per_bag=ids_per_bag,
            eval_batch_size=training.per_device_eval_batch_size,
            accumulation_steps=training.gradient_accumulation_steps,
            num_passes=training.num_passes,
            averages=training.ema_decay > 0,
            section=DhenSection(table_optimizer=training.table_optimizer or DhenSection().table_optimizer),
        )
        return _planned(job)

    raw, why = rank_zeros(topology, choose)
    return replace(check_ds_config(AUTO, raw, recipe), rung=f"{AUTO}: {why}")


def _planned(job: Job) -> tuple[dict[str, Any], str]:
    """The ds_config of the fastest set of techniques that fits, and why it is that one."""
    try:
        planner = Planner(job)
        chosen = planner.plan()
    except (NothingFitsError, UntraceableError, PlacementError, CostsError) as error:
        way_out = "" if isinstance(error, NothingFitsError) else " Name a ds_config."
        raise DsConfigError(f"ds_config auto: {error}{way_out}") from error
    why = f"{chosen.technique}, because with products in {job.product_dtype} {planner.reason(chosen)}"
    return planner.whole_ds_config(chosen.technique), why


def _saved_ds_config(checkpoint: Path, recipe: Recipe) -> tuple[dict[str, Any], str]:
    """The ds_config of the run that wrote the checkpoint, with the recipe's values set back to "auto"."""
    raw = read_state(checkpoint)["ds_config"]
    for key in recipe.values():
        *outer, name = key.split(".")
        section = raw
        for part in outer:
            section = section.get(part, {})
        if name in section:
            section[name] = AUTO
    return raw, f"taken from {checkpoint}"
