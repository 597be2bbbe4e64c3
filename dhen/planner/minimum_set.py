"""Finds the minimum set of memory techniques that a model needs on a machine (paper 3.1).

'Since all of these techniques hurt training efficiency, we carefully tune the system to turn on a minimum set of them
based on the number of DHEN layers.' The planner predicts memory and speed of every set and picks the fastest one that
fits. If two are equally fast, it picks the one with fewer techniques.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import DsConfig
from dhen.config.zero_sizes import SIZE_KEYS
from dhen.planner.job import Job
from dhen.planner.memory import MemoryUse, predict_memory
from dhen.planner.memory_setting import MemorySetting
from dhen.planner.step_time import StepSeconds, step_seconds
from dhen.planner.step_trace import Precision, StepTrace, evaluation_bytes, trace_step
from dhen.planner.technique import SCHEMES, Offload, Scheme, Technique
from dhen.runtime.topology import shard_size
from dhen.tables.placement.agreed import (
    RankMemory,
    place_as_asked,
    place_fastest,
    setting_of,
    sharded_columns,
    table_memory,
)
from dhen.tables.placement.beyond_device import ALLOCATOR_SHARE
from dhen.tables.placement.costs import StepSetting, hop_seconds, read_costs, replicated_seconds
from dhen.tables.placement.plan import Placement, PlacementError, lookups_of_tables

_OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "parameters")
_EQUALLY_FAST = 1e-3


def gib(size: int) -> str:
    """Format bytes as GiB; sizes below 1 GiB with three significant digits.

    >>> gib(3 * 2**30), gib(2**20)
    ('3.00', '0.000977')
    """
    value = size / 2**30
    return f"{value:.2f}" if value >= 1 or not size else f"{value:.3g}"


@dataclass(frozen=True)
class Prediction:
    """Predicted memory and time of a technique. batch: examples per step on all ranks."""

    technique: Technique
    memory: MemoryUse
    seconds: StepSeconds
    batch: int
    fits: bool

    @property
    def samples_per_second(self) -> float:
        """Throughput of all ranks together."""
        return self.batch / self.seconds.total


class NothingFitsError(ValueError):
    """No set of techniques fits. The message says what the smallest one needs, what a rank has, and what to change."""


class Planner:
    """Predicts memory and speed of techniques for one job, and finds the minimum set."""

    def __init__(self, job: Job) -> None:
        """Raises PlacementError if the tables alone do not fit, and CostsError if their costs cannot be read."""
        self.job, self._moves_tables = job, False
        self.placement_of(Technique())

    def placement_of(self, technique: Technique) -> Placement | None:
        """The placement of the tables in a job that uses the technique; None without tables."""
        return self._placed(self._table_setting(technique)) if self.job.config.tables else None

    def table_bytes(self, technique: Technique) -> tuple[int, int]:
        """Bytes of the tables on the fullest rank, on its device and in host memory."""
        placement = self.placement_of(technique)
        if placement is None:
            return 0, 0
        if self._moves_tables and placement.world_size == self.job.world_size:  # replicas must stay
            left = RankMemory(0, self.job.machine.memory_bytes, self._dense(technique).peak)
            placement = replace(placement, device_bytes=left.room)
        return table_memory(self.job.config, placement)

    @functools.cache  # noqa: B019 - lives as long as the planner
    def table_seconds(self, technique: Technique, group: str | int | None = None) -> float:
        """Seconds per step for the tables, on the slowest rank. group: instead of the job's table group.

        The all-to-all uses the machine's link rates, unless the ds_config names costs, which have measured link rates.
        """
        job, dim = self.job, self.job.config.embedding_dim
        if not job.config.tables:
            return 0.0
        setting = self._table_setting(technique, group)
        placement = self._placed(setting)
        costs = read_costs(job.section.placement.costs or job.machine.costs)
        lookups = lookups_of_tables(job.config.lookups, job.ids_per_bag or {})
        replicated = sum(
            replicated_seconds(costs, setting, table.num_embeddings, dim, *lookups[table.name])
            for table in job.config.tables
            if table.name in placement.replicated
        )
        if job.section.placement.costs is None:
            within, between = job.machine.exchange_rates
            costs = replace(costs, intra_node_bytes_per_second=within, inter_node_bytes_per_second=between)
        waits = hop_seconds(costs, setting, sharded_columns(job.config, placement), placement.hops)
        return replicated + placement.makespan_at(costs, setting) + waits

    def _table_setting(self, technique: Technique, group: str | int | None = None) -> StepSetting:
        job, options = self.job, {"averages": self.job.averages}
        if job.section.placement.replicate_below_rows:  # otherwise all techniques share one placement
            options |= {"zero_stage": SCHEMES[technique.scheme], "shard_size": self._shard_size(technique)}
        group, world, node = group or job.section.table_group, job.world_size, job.machine.ranks_per_node
        places = [(node, rank % node) for rank in range(world)]
        try:
            sizes = [world] if group in ("world", "auto") else [shard_size(group, places)]
        except ValueError as error:
            raise PlacementError(f"dhen.table_group is {error}") from error
        if group == "auto" and node > 1:
            sizes.append(node)
        settings = [setting_of(job.section, world, node, job.batch_size, size) for size in sizes]
        return place_fastest(self._placed, [replace(setting, **options) for setting in settings])[0]

    @functools.cache  # noqa: B019
    def _placed(self, setting: StepSetting) -> Placement:
        job, machine = self.job, self.job.machine
        has = (machine.host_bytes, machine.memory_bytes) if machine.is_gpu else (machine.memory_bytes,)
        return place_as_asked(job.config, job.section, setting, machine.costs, RankMemory(*has), job.ids_per_bag)

    @property
    def has_bytes(self) -> int:
        """Bytes that a rank may use. On a GPU, fragmentation takes a share of its memory."""
        machine = self.job.machine
        return int(machine.memory_bytes * (ALLOCATOR_SHARE if machine.is_gpu else 1.0))

    def predict(self, technique: Technique) -> Prediction:
        seconds, batch = self._seconds(technique), self.job.batch_size * self.job.world_size
        return Prediction(technique, self.memory(technique), seconds, batch, self.fits(technique))

    @functools.cache  # noqa: B019
    def memory(self, technique: Technique) -> MemoryUse:
        """Memory of a rank, on the device and on the host."""
        return self._dense(technique).with_tables(*self.table_bytes(technique))

    @functools.cache  # noqa: B019
    def _dense(self, technique: Technique) -> MemoryUse:
        """Memory of a rank without its tables."""
        setting, is_gpu = self.setting(technique), self.job.machine.is_gpu
        evaluation = 0
        if self.job.eval_batch_size:
            evaluation = evaluation_bytes(self.job.config, self.job.eval_batch_size, self._precision(technique))
        return predict_memory(self._trace(technique), setting, evaluation=evaluation, is_gpu=is_gpu)

    def fits(self, technique: Technique) -> bool:
        """Whether a rank has enough memory; on GPUs, its share of the host's must suffice, too."""
        memory, machine = self.memory(technique), self.job.machine
        return memory.peak <= self.has_bytes and (not machine.is_gpu or memory.host <= machine.host_bytes)

    def ring_latency(self, technique: Technique) -> float:
        """Seconds of a step's waiting that are latency of the dense part's collectives: links without it save them."""
        return self._seconds(technique).waiting - self._seconds(technique, has_latency=False).waiting

    @functools.cache  # noqa: B019
    def _seconds(self, technique: Technique, has_latency: bool = True) -> StepSeconds:
        job = self.job
        return step_seconds(
            self._trace(technique),
            self.setting(technique),
            job.machine if has_latency else replace(job.machine, seconds_per_collective=0.0),
            job.nodes,
            dtype=job.product_dtype,
            table_seconds=self.table_seconds(technique),
            accumulation_steps=job.accumulation_steps,
            num_values=job.batch_size * job.values_per_example,
        )

    def candidates(self) -> Iterator[Technique]:
        """The sets worth considering. Checkpointing and activation offload cover just enough layers to fit.

        Once a set fits, more techniques would only slow it down, so none are added.
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
        """The schemes, and what each can keep on the host, starting with the least."""
        alone_on_gpu = self.job.world_size == 1 and self.job.machine.is_gpu
        for scheme in self.job.schemes():
            yield scheme, list(_OFFLOADS[: 1 if scheme == "dp" else 2 if SCHEMES[scheme] < 3 else 3])
        if alone_on_gpu:  # one rank shards nothing, but stage 0 has no offload
            yield "zero2", ["optimizer"]
            yield "zero3", ["parameters"]

    def _fewest(self, plain: Technique, name: str = "checkpointing") -> Technique:
        """`plain` with the fewest layers of `name` that make it fit, by bisection; all layers if it never fits."""
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
        """Find the minimum set: the fastest that fits. Raises NothingFitsError.

        Only if nothing fits, table_group "auto" is all ranks; and if nothing fits on a GPU then, tables give way to the
        dense part and go to host memory, as few as possible.
        """
        techniques = list(dict.fromkeys(self.candidates()))
        fitting = [self.predict(technique) for technique in techniques if self.fits(technique)]
        if not fitting and self.job.section.table_group == "auto":  # replicas may take too much
            of_all = self.job.section.model_copy(update={"table_group": "world"})
            self.job = replace(self.job, section=of_all)
            return self._plan_again()
        if not fitting and self.job.machine.is_gpu and not self._moves_tables:
            self._moves_tables = True
            return self._plan_again()
        if self._moves_tables and fitting:
            fewest = min(self.table_bytes(each.technique)[1] for each in fitting)
            fitting = [each for each in fitting if self.table_bytes(each.technique)[1] == fewest]
        if not fitting:
            smallest = min(techniques, key=lambda each: self.memory(each).peak)
            raise NothingFitsError(self._nothing_fits(smallest, self.memory(smallest)))
        fastest = max(each.samples_per_second for each in fitting)
        equal = [each for each in fitting if each.samples_per_second >= (1 - _EQUALLY_FAST) * fastest]
        return min(equal, key=lambda each: (each.technique.count, -each.samples_per_second))

    def _plan_again(self) -> Prediction:
        for known in (Planner.memory, Planner.table_seconds, Planner._seconds):
            known.cache_clear()
        return self.plan()

    def reason(self, chosen: Prediction) -> str:
        """Why `chosen` is the minimum set: which plain schemes need too much memory, and which fit but are slower."""
        plain = [self.predict(Technique(scheme)) for scheme in self.job.schemes()]
        too_large = [each for each in plain if not each.fits]
        slower = [each for each in plain if each.fits and each.technique.count < chosen.technique.count]
        has = f"{gib(self.has_bytes)} GiB"
        parts = []
        if too_large:
            needs = ", ".join(f"{each.technique} needs {gib(each.memory.peak)}" for each in too_large)
            parts.append(f"{needs} of {has}")
        parts += [
            f"{each.technique} also fits, but is {1 - each.samples_per_second / chosen.samples_per_second:.1%} slower"
            for each in slower
        ]
        if moved := self.table_bytes(chosen.technique)[1]:
            parts.append(f"{gib(moved)} GiB of tables go to host memory, to make room")
        use = "" if too_large else f" ({gib(chosen.memory.peak)} of {has})"
        return "; ".join([*parts, f"{chosen.technique} is the fastest that fits{use}"])

    def _nothing_fits(self, smallest: Technique, memory: MemoryUse) -> str:
        job = self.job
        parts = ", ".join(f"{name} {gib(size)}" for name, size in memory.parts.items())
        needs, has = f"{gib(memory.peak)} GiB", f"{gib(self.has_bytes)} GiB"
        if job.machine.is_gpu:
            needs += f" and {gib(memory.host)} GiB of host memory"
            has += f" and {gib(job.machine.host_bytes)} GiB of host memory"
        return (
            f"{job.depth} layers with {job.batch_size} examples per rank do not fit on {job.nodes} x "
            f"{job.machine.ranks_per_node} ranks ({job.machine.name}). The smallest set of techniques, {smallest}, "
            f"needs {needs} at its peak ({memory.moment}; GiB by part: {parts}), but a rank has {has}. Possible "
            "solutions: a smaller per_device_train_batch_size with gradient_accumulation_steps, a smaller "
            "per_device_eval_batch_size, bf16, more ranks, fewer layers, a smaller num_embeddings_out or embedding_dim"
            + ("." if job.section.table_group == "world" else ', dhen.table_group "world".')
        )

    def setting(self, technique: Technique) -> MemorySetting:
        machine = self.job.machine
        shard = self._shard_size(technique)
        config = DsConfig("plan", self.ds_config(technique), self._section(technique))
        config = config.sized(self._traced(0, Precision()).weights)
        setting = MemorySetting.of(config, shard, self.job.world_size, is_gpu=machine.is_gpu)
        offloaded = technique.offload_activations if machine.is_gpu else 0
        states = setting.state_bytes + (4 if self.job.averages else 0)
        accumulates = self.job.accumulation_steps > 1
        return replace(setting, offload_activations=offloaded, accumulates=accumulates, state_bytes=states)

    def _shard_size(self, technique: Technique) -> int:
        return self.job.machine.ranks_per_node if technique.scheme == "hsdp" else self.job.world_size

    def _trace(self, technique: Technique) -> StepTrace:
        return self._traced(technique.checkpointing, self._precision(technique))

    @functools.cache  # noqa: B019
    def _traced(self, checkpointing: int, precision: Precision) -> StepTrace:
        return trace_step(self.job.config, self.job.batch_size, precision, checkpointing, self.job.num_passes)

    def _precision(self, technique: Technique) -> Precision:
        if self.job.precision == "fp32":
            return Precision()
        by_autocast = Precision(autocast=torch.bfloat16, is_gpu=self.job.machine.is_gpu)
        return by_autocast if technique.scheme == "dp" else Precision(torch.bfloat16)

    def _section(self, technique: Technique) -> DhenSection:
        is_hybrid = technique.scheme == "hsdp"
        update: dict[str, Any] = {
            "activation_checkpointing": self._layers(technique.checkpointing),
            "activation_offload": self._layers(technique.offload_activations),
            "shard_group": "node" if is_hybrid else "world",
        }
        if not is_hybrid:  # without replicas, the ds_config's check rejects these keys
            update |= {"all_reduce_dtype": None, "async_all_reduce": True}
        if self.job.section.table_group == "world":  # likewise
            update |= {"table_sync_steps": 1, "table_sync_dtype": "fp32", "table_sync_overlap": False}
        return self.job.section.model_copy(update=update)

    def _layers(self, count: int) -> int | Literal["none", "all"]:
        """A number of layers as it is written in a ds_config."""
        return "all" if count == self.job.depth else count or "none"

    def ds_config(self, technique: Technique) -> dict[str, Any]:
        """DeepSpeed's part of the technique's ds_config. What the recipe decides, and ZeRO's sizes, are "auto"."""
        stage = SCHEMES[technique.scheme]
        keys = SIZE_KEYS if stage == 3 else SIZE_KEYS[:1] if stage else ()
        zero: dict[str, Any] = {"stage": stage} | dict.fromkeys(keys, "auto")
        if technique.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        if technique.offload == "parameters":
            zero["offload_param"] = {"device": "cpu"}
        params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
        params["fused"] = True
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
        """The ds_config to write: DeepSpeed's part, and the values of our section that are not defaults."""
        section = self._section(technique).model_dump(exclude_defaults=True)
        return self.ds_config(technique) | ({"dhen": section} if section else {})
