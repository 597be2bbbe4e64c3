"""What the planner plans for: a model, its batches and the machines."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from dhen.config.dhen_section import DhenSection
from dhen.model.configuration_dhen import DhenConfig
from dhen.planner.machine import Machine
from dhen.planner.technique import SCHEMES, Scheme

PrecisionName = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Job:
    """What is trained, and on which machines.

    batch_size: examples per rank and micro step. eval_batch_size: examples per rank and evaluation step; 0 for no
    evaluation. ids_per_bag: mean number of ids by sparse feature. accumulation_steps: micro steps per update.
    num_passes: of each example through the layers. averages: there is a moving average of all weights.
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
    num_passes: int = 1
    averages: bool = False

    @property
    def world_size(self) -> int:
        return self.nodes * self.machine.ranks_per_node

    @property
    def product_dtype(self) -> str:
        """The dtype whose rate matrix products have: "fp32", "tf32" or "bf16"."""
        is_tf32 = self.precision == "fp32" and self.section.allow_tf32 and self.machine.is_gpu
        return "tf32" if is_tf32 else self.precision

    @property
    def values_per_example(self) -> float:
        """Mean number of dense values and ids of an example."""
        ids = self.ids_per_bag or {}
        return self.config.num_dense_features + sum(ids.get(feature.name, 1.0) for feature in self.config.lookups)

    @property
    def depth(self) -> int:
        return len(self.config.layer_specs)

    def at_depth(self, layers: int) -> "Job":
        """The same job with another number of layers. Raises ValueError if the config lists its layers one by one."""
        if self.config.layers is not None:
            raise ValueError(
                "the recipe lists its layers one by one, so it cannot be planned at other depths. Use num_layers "
                "instead of layers."
            )
        config = DhenConfig(**{**self.config.to_dict(), "num_layers": layers})
        return replace(self, config=config)

    def schemes(self) -> list[Scheme]:
        """The schemes that make a difference: one rank cannot shard, and hybrid sharding needs several nodes."""
        if self.world_size == 1:
            return ["dp"]
        is_hybrid = self.nodes > 1 and self.machine.ranks_per_node > 1
        return [scheme for scheme in SCHEMES if scheme != "hsdp" or is_hybrid]
