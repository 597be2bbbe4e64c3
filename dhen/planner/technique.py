"""A set of memory techniques: what the planner chooses between (paper 3.1)."""

from dataclasses import dataclass
from typing import Literal

Scheme = Literal["dp", "zero1", "zero2", "hsdp", "zero3"]
Offload = Literal["none", "optimizer", "parameters"]
SCHEMES: dict[Scheme, int] = {"dp": 0, "zero1": 1, "zero2": 2, "hsdp": 3, "zero3": 3}
"""ZeRO stage of each scheme, from the most to the least memory per rank."""


@dataclass(frozen=True)
class Technique:
    """A set of memory techniques. checkpointing, offload_activations: number of layers, counted from the input.

    offload: what is kept in host memory: the "optimizer" states, or the "parameters" too.
    """

    scheme: Scheme = "dp"
    checkpointing: int = 0
    offload: Offload = "none"
    offload_activations: int = 0

    @property
    def count(self) -> int:
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
