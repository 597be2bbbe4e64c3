"""Which memory techniques a model needs on a machine: the minimum set (paper 3.1).

'Since all of these techniques hurt training efficiency, we carefully tune the system to turn on a minimum set of them
based on the number of DHEN layers.' Here every set is predicted, memory and speed; of those that fit the fastest is the
plan, and of equally fast ones that with the fewest techniques.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import DsConfig
from dhen.model.configuration_dhen import DhenConfig
from dhen.planner.machine import Machine
from dhen.planner.memory import MemorySetting, MemoryUse, predict_memory
from dhen.planner.step_time import StepSeconds, segments, step_seconds
from dhen.planner.step_trace import Precision, StepTrace, evaluation_bytes, trace_step
from dhen.tables.placement.agreed import place_as_asked, setting_of, table_memory
from dhen.tables.placement.costs import StepSetting, read_costs, replicated_seconds
from dhen.tables.placement.plan import Placement

Scheme = Literal["dp", "zero1", "zero2", "hsdp", "zero3"]
Offload = Literal["none", "optimizer", "parameters"]
PrecisionName = Literal["fp32", "bf16"]
SCHEMES: dict[Scheme, int] = {"dp": 0, "zero1": 1, "zero2": 2, "hsdp": 3, "zero3": 3}
"""ZeRO stage of each, in the order of how little they keep."""
_OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "parameters")
_ALLOCATOR_SHARE = 0.95
"""Of a GPU's memory, what fragments of the allocator leave."""
_EQUALLY_FAST = 1e-3


def gib(size: int) -> str:
    """Bytes as GiB, of small sizes the first three digits.

    >>> gib(3 * 2**30), gib(2**20)
    ('3.00', '0.000977')
    """
    value = size / 2**30
    return f"{value:.2f}" if value >= 1 or not size else f"{value:.3g}"


@dataclass(frozen=True)
class Technique:
    """A set of memory techniques. checkpointing, offload_activations: so many layers, from the input up.

    offload: what waits in the host's memory, "optimizer" states or "parameters" too.
    """

    scheme: Scheme = "dp"
    checkpointing: int = 0
    offload: Offload = "none"
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
    """What is trained and on what. batch_size, eval_batch_size: examples of a rank in a micro step, and in a step of an
    evaluation, 0 where there is none; ids_per_bag: by sparse feature; accumulation_steps: micro steps for an update.
    """

    config: DhenConfig
    batch_size: int
    machine: Machine
    nodes: int = 1
    precision: PrecisionName = "fp32"
    section: DhenSection = DhenSection()
    ids_per_bag: Mapping[str, float] | None = None
    eval_batch_size: int = 0
    accumulation_steps: int = 1

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
        self.placement_of(Technique())

    def placement_of(self, technique: Technique) -> Placement | None:
        """The tables', as a job under the technique will place them; None without tables."""
        return self._placed(self._table_setting(technique)) if self.job.config.tables else None

    def table_bytes(self, technique: Technique) -> tuple[int, int]:
        """Of the fullest rank, on its device, and on the host behind a cache there."""
        placement, machine = self.placement_of(technique), self.job.machine
        if placement is None:
            return 0, 0
        return table_memory(self.job.config, placement, machine.memory_bytes if machine.is_gpu else None)

    @functools.cache  # noqa: B019 - lives as long as the planner
    def table_seconds(self, technique: Technique) -> float:
        """A step's, of the slowest rank. What is exchanged goes over the machine's links, unless the ds_config names
        costs, which have rates of links that somebody measured.
        """
        job, placement = self.job, self.placement_of(technique)
        if placement is None:
            return 0.0
        setting, ids, dim = self._table_setting(technique), job.ids_per_bag or {}, job.config.embedding_dim
        costs = read_costs(job.section.placement.costs or job.machine.costs)
        replicated = sum(
            replicated_seconds(costs, setting, table.num_embeddings, dim, ids.get(table.name, 1.0))
            for table in job.config.tables
            if table.name in placement.replicated
        )
        if job.section.placement.costs is None:
            within, between = job.machine.exchange_rates
            costs = replace(costs, intra_node_bytes_per_second=within, inter_node_bytes_per_second=between)
        return replicated + placement.makespan_at(costs, setting, ids)

    def _table_setting(self, technique: Technique) -> StepSetting:
        job = self.job
        setting = setting_of(job.section, job.world_size, job.machine.ranks_per_node, job.batch_size)
        if not job.section.placement.replicate_below_rows:  # then one placement serves all techniques
            return setting
        return replace(setting, zero_stage=SCHEMES[technique.scheme], shard_size=self._shard_size(technique))

    @functools.cache  # noqa: B019
    def _placed(self, setting: StepSetting) -> Placement:
        job, machine = self.job, self.job.machine
        memory = [machine.memory_bytes]
        if machine.is_gpu:
            memory.append(machine.memory_bytes + machine.host_bytes)
        return place_as_asked(job.config, job.section, setting, machine.costs, memory, job.ids_per_bag)

    @property
    def has_bytes(self) -> int:
        """What a rank may fill: on a GPU fragments of the allocator take their share."""
        machine = self.job.machine
        return int(machine.memory_bytes * (_ALLOCATOR_SHARE if machine.is_gpu else 1.0))

    def predict(self, technique: Technique) -> Prediction:
        """Memory and speed under a technique."""
        seconds, batch = self._seconds(technique), self.job.batch_size * self.job.world_size
        return Prediction(technique, self.memory(technique), seconds, batch, self.fits(technique))

    @functools.cache  # noqa: B019
    def memory(self, technique: Technique) -> MemoryUse:
        """A rank's, of the device and of the host."""
        setting, is_gpu = self.setting(technique), self.job.machine.is_gpu
        evaluation = 0
        if self.job.eval_batch_size:
            evaluation = evaluation_bytes(self.job.config, self.job.eval_batch_size, self._precision(technique))
        on_device, on_host = self.table_bytes(technique)
        use = predict_memory(self._trace(technique), setting, on_device, evaluation=evaluation, is_gpu=is_gpu)
        return replace(use, host=use.host + on_host)

    def fits(self, technique: Technique) -> bool:
        """Whether a rank has the memory, and on GPUs its share of the host too."""
        memory, machine = self.memory(technique), self.job.machine
        return memory.peak <= self.has_bytes and (not machine.is_gpu or memory.host <= machine.host_bytes)

    @functools.cache  # noqa: B019
    def _seconds(self, technique: Technique) -> StepSeconds:
        job = self.job
        what = (self._trace(technique), self.setting(technique), job.machine, job.nodes)
        more = {"table_seconds": self.table_seconds(technique), "accumulation_steps": job.accumulation_steps}
        return step_seconds(*what, dtype=job.precision, **more)

    def candidates(self) -> Iterator[Technique]:
        """Every set worth a look: of checkpointing and activation offload as few layers as make it fit.

        What fits already is only slowed down by more, so nothing is added to it.
        """
        depth, is_gpu = self.job.depth, self.job.machine.is_gpu
        for scheme, offloads in self._offloads():
            for offload in offloads:
                plain = Technique(scheme, offload=offload)
                yield plain
                if self.fits(plain):
                    break
                yield self._fewest(plain)
                if is_gpu:
                    yield self._fewest(plain, "offload_activations")
                    for recomputed in {depth, self._fewest(replace(plain, offload_activations=depth)).checkpointing}:
                        yield self._fewest(replace(plain, checkpointing=recomputed), "offload_activations")

    def _offloads(self) -> Iterator[tuple[Scheme, list[Offload]]]:
        """The schemes, and what each can have on the host, the least first."""
        alone_on_gpu = self.job.world_size == 1 and self.job.machine.is_gpu
        for scheme in self.job.schemes():
            yield scheme, list(_OFFLOADS[: 1 if scheme == "dp" else 2 if SCHEMES[scheme] < 3 else 3])
        if alone_on_gpu:  # these shard nothing there, but stage 0 has no offload
            yield "zero2", ["optimizer"]
            yield "zero3", ["parameters"]

    def _fewest(self, plain: Technique, name: str = "checkpointing") -> Technique:
        """`plain` with as few layers of `name` as make it fit, by bisection; all layers where none does."""
        fits_at, fails_at = self.job.depth, 0
        if not self.fits(replace(plain, **{name: fits_at})):
            return replace(plain, **{name: fits_at})
        while fits_at - fails_at > 1:
            middle = (fits_at + fails_at) // 2
            if self.fits(replace(plain, **{name: middle})):
                fits_at = middle
            else:
                fails_at = middle
        return replace(plain, **{name: fits_at})

    def plan(self) -> Prediction:
        """The minimum set: the fastest that fits. Raises NothingFitsError."""
        techniques = list(dict.fromkeys(self.candidates()))
        fitting = [self.predict(technique) for technique in techniques if self.fits(technique)]
        if not fitting:
            smallest = min(techniques, key=lambda each: self.memory(each).peak)
            raise NothingFitsError(self._nothing_fits(smallest, self.memory(smallest)))
        fastest = max(each.samples_per_second for each in fitting)
        equal = [each for each in fitting if each.samples_per_second >= (1 - _EQUALLY_FAST) * fastest]
        return min(equal, key=lambda each: (each.technique.count, -each.samples_per_second))

    def reason(self, chosen: Prediction) -> str:
        """Why it is the minimum set: the plain schemes that need too much, and those that fit but are slower."""
        plain = [self.predict(Technique(scheme)) for scheme in self.job.schemes()]
        too_large = [each for each in plain if not each.fits]
        slower = [each for each in plain if each.fits and each.technique.count < chosen.technique.count]
        has = f"{gib(self.has_bytes)} GiB"
        parts = []
        if too_large:
            needs = ", ".join(f"{each.technique} needs {gib(each.memory.peak)}" for each in too_large)
            parts.append(f"{needs} of {has}")
        parts += [
            f"{each.technique} fits too, but is {1 - each.samples_per_second / chosen.samples_per_second:.1%} slower"
            for each in slower
        ]
        use = "" if too_large else f" ({gib(chosen.memory.peak)} of {has})"
        return "; ".join([*parts, f"{chosen.technique} is the fastest that fits{use}"])

    def _nothing_fits(self, smallest: Technique, memory: MemoryUse) -> str:
        job = self.job
        parts = ", ".join(f"{name} {gib(size)}" for name, size in memory.parts.items())
        needs, has = f"{gib(memory.peak)} GiB", f"{gib(self.has_bytes)} GiB"
        if job.machine.is_gpu:
            needs += f" and {gib(memory.host)} of the host's"
            has += f" and {gib(job.machine.host_bytes)} of the host's"
        return (
            f"{job.depth} layers at {job.batch_size} examples a rank fit on no rank of {job.nodes} x "
            f"{job.machine.ranks_per_node} ({job.machine.name}): {smallest} needs {needs} ({parts}) at its worst "
            f"moment, {memory.moment}; there are {has}. Possible solutions: "
            "a smaller per_device_train_batch_size with gradient_accumulation_steps, a smaller "
            "per_device_eval_batch_size, bf16, more ranks, fewer layers, a smaller num_embeddings_out or embedding_dim."
        )

    def setting(self, technique: Technique) -> MemorySetting:
        """What the technique's ds_config means for memory."""
        machine = self.job.machine
        shard = self._shard_size(technique)
        config = DsConfig("plan", self.ds_config(technique), self._section(technique))
        setting = MemorySetting.of(config, shard, self.job.world_size, is_gpu=machine.is_gpu)
        offloaded = technique.offload_activations if machine.is_gpu else 0
        return replace(setting, offload_activations=offloaded, accumulates=self.job.accumulation_steps > 1)

    def _shard_size(self, technique: Technique) -> int:
        return self.job.machine.ranks_per_node if technique.scheme == "hsdp" else self.job.world_size

    def _trace(self, technique: Technique) -> StepTrace:
        return self._traced(technique.checkpointing, self._precision(technique))

    @functools.cache  # noqa: B019
    def _traced(self, checkpointing: int, precision: Precision) -> StepTrace:
        return trace_step(self.job.config, self.job.batch_size, precision, checkpointing)

    def _precision(self, technique: Technique) -> Precision:
        if self.job.precision == "fp32":
            return Precision()
        return Precision(autocast=torch.bfloat16) if technique.scheme == "dp" else Precision(torch.bfloat16)

    @functools.cached_property
    def _bucket(self) -> tuple[int, int]:
        """Most elements of a layer's weights, and of the larger of that and a weight outside the layers."""
        trace = self._traced(0, Precision())
        layer = max(sum(segment.gradients.values()) for segment in segments(trace, None))
        return layer, max(layer, *trace.weights.values())

    def _section(self, technique: Technique) -> DhenSection:
        is_hybrid = technique.scheme == "hsdp"
        update: dict[str, Any] = {
            "activation_checkpointing": self._layers(technique.checkpointing),
            "activation_offload": self._layers(technique.offload_activations),
            "shard_group": "node" if is_hybrid else "world",
        }
        if not is_hybrid:  # these are refused where nothing is replicated
            update |= {"all_reduce_dtype": None, "async_all_reduce": True}
        return self.job.section.model_copy(update=update)

    def _layers(self, count: int) -> int | Literal["none", "all"]:
        """As the ds_config says it."""
        return "all" if count == self.job.depth else count or "none"

    def ds_config(self, technique: Technique) -> dict[str, Any]:
        """DeepSpeed's part of the technique's ds_config; what the recipe decides is "auto".

        Stage 3 gathers one layer ahead and lets go of a layer at once, so that two layers are there at a time.
        """
        stage = SCHEMES[technique.scheme]
        layer, bucket = self._bucket
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
