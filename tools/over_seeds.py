"""Statistics over seeds: mean and spread, and differences that are paired by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tools.experiments import Result


class Statistic(NamedTuple):
    """Mean over `n` seeds. spread: their sample standard deviation, None for one seed."""

    mean: float
    spread: float | None
    n: int


def over_seeds(values: Sequence[float | None]) -> Statistic | None:
    """Mean and sample standard deviation of the values that exist, None if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Statistic(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def difference(own: Mapping[int, Result], base: Mapping[int, Result], metric: str) -> Statistic | None:
    """own - base over the seeds that both have; None if they share none."""
    pairs = [(own[seed].metric(metric), base[seed].metric(metric)) for seed in own.keys() & base.keys()]
    return over_seeds([one - other for one, other in pairs if None not in (one, other)])


def signed(difference: Statistic | None, digits: int) -> str:
    """A difference with its spread. One of up to twice its standard error, spread / sqrt(n), is not resolved."""
    if difference is None:
        return ""
    mean, spread, n = difference
    is_resolved = spread is not None and abs(mean) > 2 * spread / math.sqrt(n)
    shown = "" if spread is None else f" ± {spread:.{digits}f}"
    return f"{mean:+.{digits}f}{shown}{'' if is_resolved else ', not resolved'}"
