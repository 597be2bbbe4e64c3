"""What limits a job: what the seconds of its steps go to, and the samples/s that its hosts allow (paper figure 6)."""

import contextlib
from dataclasses import dataclass

from dhen.planner.job import Job
from dhen.planner.minimum_set import Planner
from dhen.planner.technique import SCHEMES, Technique
from dhen.tables.placement.plan import PlacementError


@dataclass(frozen=True)
class Limits:
    """What limits the steps of a job with a technique.

    parts: seconds of a step by what they go to; their sum is the step. The tables' part has the latency of their own
    messages; that of rings is the dense part's. Links include copies to and from the host, as far as nothing hides
    them. limited_by: the longest of the parts, or the host's if a GPU waits for it. table_group: ranks that the tables
    are sharded over. table_seconds: of the tables per step, over all ranks and over each node's, if these differ; None:
    they do not fit there.
    """

    parts: dict[str, float]
    limited_by: str
    table_group: str
    table_seconds: dict[str, float | None]

    @classmethod
    def of(cls, planner: Planner, technique: Technique) -> "Limits":
        job, seconds, latency = planner.job, planner.predict(technique).seconds, planner.ring_latency(technique)
        machine, placement = job.machine, planner.placement_of(technique)
        start = machine.seconds_per_step.get(SCHEMES[technique.scheme], 0.0)
        load = job.batch_size * job.values_per_example * machine.seconds_per_value
        if machine.is_gpu:  # it waits for the longer one, as far as nothing hides it
            start, load = (seconds.host, 0.0) if start >= load else (0.0, seconds.host)
        host = {"host's start": start, "loader": load}
        dense = {"compute": seconds.compute, "links": seconds.waiting - latency, "rings' latency": latency}
        parts = dense | {"optimizer": seconds.optimizer, "tables": seconds.tables} | host
        limited_by = max(host if machine.is_gpu and seconds.host else parts, key=parts.__getitem__)
        size = placement.world_size if placement else 0
        names = {0: "-", machine.ranks_per_node: "node", job.world_size: "world"}
        has_groups = size and 1 < machine.ranks_per_node < job.world_size
        tables: dict[str, float | None] = dict.fromkeys(("world", "node") if has_groups else ())
        for group in tables:
            with contextlib.suppress(PlacementError):
                tables[group] = planner.table_seconds(technique, group)
        return cls(parts, limited_by, names.get(size, f"{size} ranks"), tables)


def most_samples_per_second(job: Job) -> dict[str, float]:
    """Samples/s that the hosts of all ranks can load, and start steps for, as far as the machine has their seconds."""
    seconds = {"loading rows": job.values_per_example * job.machine.seconds_per_value}
    for stage in sorted({SCHEMES[scheme] for scheme in job.schemes()}):
        seconds[f"starting steps of ZeRO-{stage}"] = job.machine.seconds_per_step.get(stage, 0.0) / job.batch_size
    return {name: job.world_size / each for name, each in seconds.items() if each}
