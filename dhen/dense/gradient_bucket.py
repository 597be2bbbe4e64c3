"""When ZeRO stages 2 and 3 reduce gradients: DeepSpeed 0.19.8's rule for stage 2, and LeanStage3's for stage 3."""

from dataclasses import dataclass, field


def is_nearly_full(elements: int, room: int) -> bool:
    """Whether stage 3 reduces a bucket, or one gradient, now: it does so at three quarters of the bucket's capacity.

    The gradients of a large layer are then reduced, and cross nodes, during the backward of the very next layer.
    """
    return 4 * elements >= 3 * room


@dataclass
class GradientBucket:
    """Gradients that wait to be reduced together. room: capacity in elements. waiting: elements by name of the weight.

    is_eager: stage 3's rule: a gradient that nearly fills a bucket is reduced alone, and a nearly full bucket at once.
    Without it, a bucket is reduced when the next gradient does not fit.
    """

    room: int
    is_eager: bool = False
    waiting: dict[str, int] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Number of elements that wait."""
        return sum(self.waiting.values())

    def take(self, name: str, elements: int) -> list[dict[str, int]]:
        """Add a gradient. Returns the gradients of each reduction that starts now, in order."""
        if self.is_eager and is_nearly_full(elements, self.room):
            return [{name: elements}]
        due = [self.empty()] if self.waiting and self.elements + elements > self.room else []
        self.waiting[name] = elements
        if self.is_eager and is_nearly_full(self.elements, self.room):
            due.append(self.empty())
        return due

    def empty(self) -> dict[str, int]:
        """Empty the bucket and return its contents."""
        waiting, self.waiting = self.waiting, {}
        return waiting
