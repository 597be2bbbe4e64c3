"""When gradients leave to be reduced under ZeRO stages 2 and 3: DeepSpeed 0.19.8's rule, and hybrid sharding's."""

from dataclasses import dataclass, field


def is_nearly_full(elements: int, room: int) -> bool:
    """Whether hybrid sharding reduces a bucket before another gradient needs its room: from three quarters on.

    A large layer then crosses nodes under the backward of the very next one.
    """
    return 4 * elements >= 3 * room


@dataclass
class GradientBucket:
    """Gradients that wait. room: elements; a larger gradient leaves alone. leaves_early: once it is nearly full.

    waiting: elements by name of the weight.
    """

    room: int
    leaves_early: bool = False
    waiting: dict[str, int] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """All that wait."""
        return sum(self.waiting.values())

    def has_room_for(self, elements: int) -> bool:
        """Whether a gradient fits in beside what waits."""
        return not self.waiting or self.elements + elements <= self.room

    def put(self, name: str, elements: int) -> None:
        """One gradient more."""
        self.waiting[name] = elements

    @property
    def is_due(self) -> bool:
        """Whether it leaves now."""
        return self.leaves_early and is_nearly_full(self.elements, self.room)

    def empty(self) -> dict[str, int]:
        """Take out what waits."""
        waiting, self.waiting = self.waiting, {}
        return waiting
