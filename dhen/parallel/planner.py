"""Which memory techniques a model needs on a machine: the minimum set (paper 3.1).

'Since all of these techniques hurt training efficiency, we carefully tune the system to turn on a minimum set of them
based on the number of DHEN layers.' Here every set is predicted, memory and speed; of those that fit the fastest is the
plan, and of equally fast ones that with the fewest techniques.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from dhen.model.configuration_dhen import DhenConfig
from dhen.parallel.ds_config import DhenSection, DsConfig
from dhen.parallel.machine import Machine
from dhen.parallel.memory import MemorySetting, MemoryUse, predict_memory
from dhen.parallel.placement import Placement, PlacementOptions, place_tables
from dhen.parallel.step_time import StepSeconds, segments, step_seconds
from dhen.parallel.step_trace import Precision, StepTrace, trace_step
from dhen.parallel.table_costs import StepSetting, read_costs

Scheme = Literal["dp", "zero1", "zero2", "hsdp", "zero3"]
PrecisionName = Literal["fp32", "bf16"]
SCHEMES: dict[Scheme, int] = {"dp": 0, "zero1": 1, "zero2": 2, "hsdp": 3, "zero3": 3}
"""ZeRO stage of each, in the order of how little they keep."""
_ALLOCATOR_SHARE = 0.95
"""Of a GPU's memory, what fragments of the allocator leave."""
_EQUALLY_FAST = 1e-3


@dataclass(frozen=True)
class Technique:
    """A set of memory techniques. checkpointing, offload_activations: so many layers, from the input up.

    offload: what waits in the host's memory, "optimizer" states or "parameters" too.
    """

    scheme: Scheme = "dp"
    checkpointing: int = 0
    offload: Literal["none", "optimizer", "parameters"] = "none"
    offload_activations: int = 0

    @property
    def count(self) -> int:
        """How many techniques it turns on."""
        on = (self.scheme != "dp", self.checkpointing, self.offload != "none", self.offload == "parameters")
        return sum(map(bool, (*on, self.offload_activations)))

    def __str__(self) -> str:
        parts = [self.scheme]
        if self.checkpointing:
            parts.append(f"recompute {self.checkpointing}")
        if self.offload_activations:
            parts.append(f"offload activations of {self.offload_activations}")
        if self.offload != "none":
            parts.append(f"offload {self.offload}")
        return " + ".join(parts)


@dataclass(frozen=True)
class Prediction:
    """What a technique is expected to need and to take. batch: examples of all ranks in a step."""

    technique: Technique
    memory: MemoryUse
    seconds: StepSeconds
    batch: int
    fits: bool

    @property
    def samples_per_second(self) -> float:
        """Of all ranks together."""
        return self.batch / self.seconds.total


class NothingFitsError(ValueError):
    """No set of techniques fits; the message says what the smallest needs, what there is, and what to change."""


@dataclass(frozen=True)
class Job:
    """What is trained and on what. batch_size: examples of a rank in a micro step; ids_per_bag: by sparse feature."""

    config: DhenConfig
    batch_size: int
    machine: Machine
    nodes: int = 1
    precision: PrecisionName = "fp32"
    section: DhenSection = DhenSection()
    ids_per_bag: Mapping[str, float] | None = None

    @property
    def world_size(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.machine.ranks_per_node

    @property
    def depth(self) -> int:
        """DHEN layers."""
        return len(self.config.layer_specs)

    def at_depth(self, layers: int) -> "Job":
        """The same with so many layers. Raises ValueError where the config lists its layers one by one."""
        if self.config.layers is not None:
            raise ValueError("the recipe lists its layers one by one, so it has one depth. Use num_layers.")
        config = DhenConfig(**{**self.config.to_dict(), "num_layers": layers})
        return replace(self, config=config)

    def schemes(self) -> list[Scheme]:
        """Those that differ on this job: alone a rank shards nothing, and hybrid sharding is of several nodes."""
        if self.world_size == 1:
            return ["dp"]
        is_hybrid = self.nodes > 1 and self.machine.ranks_per_node > 1
        return [scheme for scheme in SCHEMES if scheme != "hsdp" or is_hybrid]


class Planner:
    """Predicts techniques for one job, and finds the minimum set."""

    def __init__(self, job: Job) -> None:
        """Raises PlacementError where the tables alone don't fit, CostsError for costs that can't be read."""
        self.job = job
        machine, section = job.machine, job.section
        wires = section.all_to_all_dtype
        setting = StepSetting(
            job.world_size, machine.ranks_per_node, job.batch_size, optimizer=section.table_optimizer,
            table_dtype=section.table_dtype, wire_forward=wires.forward, wire_backward=wires.backward,
            table_rounding=section.table_rounding,
        )  # fmt: skip
        self.placement: Placement | None = None
        if job.config.tables:
            costs = read_costs(section.placement.costs or machine.costs, setting)
            options = PlacementOptions(memory_bytes=machine.memory_bytes)
            self.placement = place_tables(
                job.config.tables, job.config.embedding_dim, setting, costs, job.ids_per_bag, options
            )

    @property
    def table_bytes(self) -> int:
        """Of the fullest rank."""
        ranks = range(self.job.world_size)
        return max(map(self.placement.bytes_of_rank, ranks)) if self.placement else 0

    @functools.cache  # noqa: B019 - lives as long as the planner
    def predict(self, technique: Technique) -> Prediction:
        """Memory and speed under a technique."""
        job, machine = self.job, self.job.machine
        trace, setting = self._trace(technique), self.setting(technique)
        memory = predict_memory(trace, setting, self.table_bytes, is_gpu=machine.is_gpu)
        table_seconds = self.placement.makespan if self.placement else 0.0
        dtype = "bf16" if job.precision == "bf16" else "fp32"
        seconds = step_seconds(trace, setting, machine, job.nodes, dtype=dtype, table_seconds=table_seconds)
        has = machine.memory_bytes * (_ALLOCATOR_SHARE if machine.is_gpu else 1.0)
        fits = memory.peak <= has and (not machine.is_gpu or memory.host <= machine.host_bytes)
        return Prediction(technique, memory, seconds, job.batch_size * job.world_size, fits)

    def candidates(self) -> Iterator[Technique]:
        """Every set worth a look: of checkpointing and activation offload as few layers as make it fit."""
        for scheme in self.job.schemes():
            for offload in ("none", "optimizer", "parameters"):
                if (offload == "optimizer" and SCHEMES[scheme] == 0) or (
                    offload == "parameters" and SCHEMES[scheme] < 3
                ):
                    continue
                plain = Technique(scheme, offload=offload)
                yield plain
                yield self._fewest(plain, "checkpointing")
                if self.job.machine.is_gpu:
                    yield self._fewest(plain, "offload_activations")
                    yield self._fewest(replace(plain, checkpointing=self.job.depth), "offload_activations")

    def _fewest(self, plain: Technique, name: str) -> Technique:
        """`plain` with as few layers of `name` as make it fit, by bisection; all layers where none does."""
        fits_at, fails_at = self.job.depth, 0
        while fits_at - fails_at > 1:
            middle = (fits_at + fails_at) // 2
            if self.predict(replace(plain, **{name: middle})).fits:
                fits_at = middle
            else:
                fails_at = middle
        return replace(plain, **{name: fits_at})

    def plan(self) -> Prediction:
        """The minimum set: the fastest that fits. Raises NothingFitsError."""
        predictions = [self.predict(technique) for technique in dict.fromkeys(self.candidates())]
        fitting = [prediction for prediction in predictions if prediction.fits]
        if not fitting:
            raise NothingFitsError(self._nothing_fits(min(predictions, key=lambda each: each.memory.peak)))
        fastest = max(each.samples_per_second for each in fitting)
        equal = [each for each in fitting if each.samples_per_second >= (1 - _EQUALLY_FAST) * fastest]
        return min(equal, key=lambda each: (each.technique.count, -each.samples_per_second))

    def _nothing_fits(self, smallest: Prediction) -> str:
        job, memory = self.job, smallest.memory
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.parts.items())
        return (
            f"{job.depth} layers at {job.batch_size} examples a rank fit on no rank of {job.nodes} x "
            f"{job.machine.ranks_per_node} ({job.machine.name}): {smallest.technique} needs {memory.peak / 2**30:.2f} "
            f"GiB ({parts}) at its worst moment, {memory.moment}, and {memory.host / 2**30:.2f} GiB of the host; there "
            f"are {job.machine.memory_gib:g} and {job.machine.host_bytes / 2**30:.2f} GiB. Possible solutions: a "
            "smaller per_device_train_batch_size with gradient_accumulation_steps, bf16, more ranks, fewer layers, a "
            "smaller num_embeddings_out or embedding_dim."
        )

    def setting(self, technique: Technique) -> MemorySetting:
        """What the technique's ds_config means for memory."""
        machine = self.job.machine
        shard = machine.ranks_per_node if technique.scheme == "hsdp" else self.job.world_size
        config = DsConfig("plan", self.ds_config(technique), self._section(technique))
        setting = MemorySetting.of(config, shard, self.job.world_size, is_gpu=machine.is_gpu)
        return replace(setting, offload_activations=technique.offload_activations if machine.is_gpu else 0)

    def _trace(self, technique: Technique) -> StepTrace:
        precision = Precision()
        if self.job.precision == "bf16":  # under stage 0 as autocast
            precision = Precision(torch.bfloat16) if SCHEMES[technique.scheme] else Precision(autocast=torch.bfloat16)
        return trace_step(self.job.config, self.job.batch_size, precision, technique.checkpointing)

    def _section(self, technique: Technique) -> DhenSection:
        update: dict[str, Any] = {
            "activation_checkpointing": technique.checkpointing or "none",
            "activation_offload": technique.offload_activations or "none",
            "shard_group": "node" if technique.scheme == "hsdp" else "world",
        }
        return self.job.section.model_copy(update=update)

    def ds_config(self, technique: Technique) -> dict[str, Any]:
        """DeepSpeed's part of the technique's ds_config; what the recipe decides is "auto".

        Stage 3 gathers one layer ahead and lets go of a layer at once, so that two layers are there at a time.
        """
        trace = self._trace(replace(technique, checkpointing=0))
        layer = max(segment.gradients for segment in segments(trace, None))
        stage = SCHEMES[technique.scheme]
        bucket = max(layer, *trace.weights.values())
        zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket}
        if stage == 3:
            zero |= {
                "stage3_prefetch_bucket_size": layer,
                "stage3_max_live_parameters": 2 * layer,
                "stage3_max_reuse_distance": 0,
            }
        if technique.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        if technique.offload == "parameters":
            zero["offload_param"] = {"device": "cpu"}
        params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
        raw: dict[str, Any] = {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "optimizer": {"type": "AdamW", "params": params},
            "zero_optimization": zero,
        }
        if technique.offload != "none":
            raw["zero_force_ds_cpu_optimizer"] = False
        if self.job.precision == "bf16" and stage:
            raw["bf16"] = {"enabled": True}
        elif self.job.precision == "bf16":
            raw["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        return raw

    def whole_ds_config(self, technique: Technique) -> dict[str, Any]:
        """The ds_config to write: DeepSpeed's part and our section, as far as it isn't the default."""
        section = self._section(technique).model_dump(exclude_defaults=True)
        return self.ds_config(technique) | ({"dhen": section} if section else {})


def by_depth(predictions: Sequence[tuple[int, Prediction]]) -> list[tuple[int, Prediction]]:
    """The deepest of each run of depths that have one technique but for the number of layers that it names."""
    rungs: list[tuple[int, Prediction]] = []
    for depth, prediction in predictions:
        if rungs and rungs[-1][1].technique == prediction.technique:
            rungs.pop()
        rungs.append((depth, prediction))
    return rungs
