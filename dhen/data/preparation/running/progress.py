"""How far a preparation is, for whoever shows it."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparationProgress:
    """The progress of a pass. `bytes_total` is 0 if unknown."""

    stage: str
    rows: int
    bytes_read: int
    bytes_total: int
    is_done: bool = False


ProgressCallback = Callable[[PreparationProgress], None]


class LogProgress:
    """Logs a line every ten seconds and at the end of each pass."""

    _EVERY_SECONDS = 10.0

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def __call__(self, state: PreparationProgress) -> None:
        now = time.monotonic()
        if not state.is_done and now - self._last < self._EVERY_SECONDS:
            return
        share = f"{state.bytes_read / state.bytes_total:.0%} | " if state.bytes_total else ""
        rate = state.rows / max(now - self._start, 1e-9)
        logger.info("%s | %s%s rows | %s rows/s", state.stage, share, f"{state.rows:,}", f"{rate:,.0f}")
        self._last = now
        if state.is_done:
            self._start = now
