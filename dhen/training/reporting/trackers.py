"""Sends a run's numbers to its trackers (--report_to): TensorBoard, Weights & Biases and MLflow.

Only rank 0 reports. The x-axis is the number of samples seen. A resumed run continues the tracker's own run, whose id
is in trackers.json. DeepSpeed's monitors do not serve: they lack MLflow, the run's arguments, and resuming.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dhen.config.command_line import ArgumentError
from dhen.paths import write_atomically

TENSORBOARD_FOLDER, TRACKERS_FILE = "tensorboard", "trackers.json"
_MOST_PARAMS = 100  # that MLflow takes at once

logger = logging.getLogger(__name__)


class _Tracker(NamedTuple):
    log: Callable[[dict[str, float], int], Any]
    close: Callable[[], Any]
    run_id: str | None = None


class Trackers:
    """All trackers of a run. arguments: of the run. samples_seen: so far; TensorBoard drops later points.

    Raises ArgumentError, in one line, if one cannot start. One that fails later is left out, and the run goes on.
    """

    def __init__(self, names: Sequence[str], folder: Path, arguments: Mapping[str, Any], samples_seen: int) -> None:
        path, self._all = folder / TRACKERS_FILE, dict[str, _Tracker]()
        ids = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for name in dict.fromkeys(names):
            try:
                self._all[name] = _STARTERS[name](folder, arguments, samples_seen, ids.get(name))
            except Exception as error:  # each tracker has its own
                raise ArgumentError(
                    f"report_to: {name} cannot start ({' '.join(str(error).split()):.200}). Log in, correct its "
                    f"environment variables, remove {path} for a new run of it, or leave it out."
                ) from error
        if ids := {name: tracker.run_id for name, tracker in self._all.items() if tracker.run_id}:
            write_atomically(path, json.dumps(ids) + "\n")

    def log(self, numbers: dict[str, float], samples_seen: int) -> None:
        """Report numbers by name."""
        self._tell_each(lambda tracker: tracker.log(numbers, samples_seen))

    def close(self) -> None:
        """Write what is still buffered."""
        self._tell_each(lambda tracker: tracker.close())

    def _tell_each(self, tell: Callable[[_Tracker], Any]) -> None:
        for name, tracker in list(self._all.items()):
            try:
                tell(tracker)
            except Exception as error:  # such as a lost connection
                logger.warning("report_to: %s fails (%.200s). The run goes on without it.", name, error)
                del self._all[name]


# Each imports its package itself: this takes a second or more, and only rank 0 needs it.
def _tensorboard(folder: Path, arguments: Mapping[str, Any], samples_seen: int, run_id: str | None) -> _Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=samples_seen + 1)

    def log(numbers: dict[str, float], samples_seen: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, global_step=samples_seen)
        writer.flush()

    return _Tracker(log, writer.close)


def _wandb(folder: Path, arguments: Mapping[str, Any], samples_seen: int, run_id: str | None) -> _Tracker:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "dhen"), name=folder.name, dir=folder, config=dict(arguments),
        id=run_id, resume="allow" if run_id else None, settings=wandb.Settings(console="off"),
    )  # fmt: skip
    run.define_metric("*", step_metric="samples_seen")
    return _Tracker(lambda numbers, samples: run.log({"samples_seen": samples, **numbers}), run.finish, run.id)


def _mlflow(folder: Path, arguments: Mapping[str, Any], samples_seen: int, run_id: str | None) -> _Tracker:
    import mlflow

    run = mlflow.start_run(run_id=run_id, run_name=None if run_id else folder.name)
    pairs = list(arguments.items()) if run_id is None else []  # of a run they cannot be changed
    for first in range(0, len(pairs), _MOST_PARAMS):
        mlflow.log_params(dict(pairs[first : first + _MOST_PARAMS]))
    return _Tracker(lambda numbers, samples: mlflow.log_metrics(numbers, samples), mlflow.end_run, run.info.run_id)


_STARTERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
