"""When ZeRO stages 2 and 3 reduce a bucket of gradients: DeepSpeed 0.19.8's rule, and that of hybrid sharding."""

from dataclasses import dataclass, field


def is_nearly_full(elements: int, room: int) -> bool:
    """Whether hybrid sharding reduces a bucket now: it does so at three quarters full, without waiting for more.

    The gradients of a large layer then cross nodes during the backward of the very next layer.
    """
    return 4 * elements >= 3 * room


@dataclass
class GradientBucket:
    """Gradients that wait to be reduced. room: capacity in elements; a larger gradient is reduced alone.

    leaves_early: reduce once the bucket is nearly full. waiting: elements by name of the weight.
    """

    room: int
    leaves_early: bool = False
    waiting: dict[str, int] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Number of elements that wait."""
        return sum(self.waiting.values())

    def has_room_for(self, elements: int) -> bool:
        """Whether another gradient of this size fits."""
        return not self.waiting or self.elements + elements <= self.room

    def put(self, name: str, elements: int) -> None:
        """Add a gradient."""
        self.waiting[name] = elements

    @property
    def is_due(self) -> bool:
        """Whether the bucket must be reduced now."""
        return self.leaves_early and is_nearly_full(self.elements, self.room)

    def empty(self) -> dict[str, int]:
        """Empty the bucket and return its contents."""
        waiting, self.waiting = self.waiting, {}
        return waiting
