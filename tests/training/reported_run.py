"""A run as ProgressReporter sees it, with numbers that a test can foretell. Imports no more than it needs."""

from dataclasses import asdict
from pathlib import Path

import torch

from dhen.training.evaluation.metrics import MetricValues
from dhen.training.reporting.progress import ProgressReporter

TOTAL, LOGGING, EVALUATION, ROWS = 200, 20, 50, 256


def report_run(
    output_dir: Path, first: int, last: int, *, is_main: bool = True, ends: bool = True, **trackers
) -> ProgressReporter:
    """A session of a run from step `first` to `last`; ends False: it is killed, close isn't reached."""
    output_dir.mkdir(exist_ok=True)
    progress = ProgressReporter(output_dir, TOTAL, torch.device("cpu"), is_main=is_main, resumed_at=first, **trackers)
    for step in range(first + 1, last + 1):
        progress.advance(step, ROWS)
        loss = 0.4 + 1 / (step + 10)
        if step % LOGGING == 0:
            progress.log_step(step, step * ROWS, loss, loss / 0.55, 1e-3 * step / TOTAL)
        if step % EVALUATION == 0:
            values = MetricValues(auc=0.7 + step / 2000, ne=loss / 0.5, logloss=loss, calibration=1.0, examples=12_345)
            progress.log_evaluation("validation", step, step * ROWS, asdict(values))
    if ends:
        progress.close()
    return progress
