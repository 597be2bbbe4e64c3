"""Reports the progress of a run: terminal lines, a live bar, metrics.csv, trackers such as TensorBoard, curves.png.

Only rank 0 reports. Each logging step has the same numbers in its line, its row of metrics.csv and its points in the
trackers.
"""

import atexit
import contextlib
import csv
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn

from dhen.paths import write_atomically
from dhen.runtime.messages import heartbeat
from dhen.training.reporting.trackers import Trackers

METRICS_FILE = "metrics.csv"
SECONDS_BETWEEN_CURVES = 30.0
"""Drawing takes about a second, during which the other ranks wait. The end of a run always draws."""
COLUMNS = (
    "step", "samples_seen", "split", "loss", "ne", "auc", "calibration", "learning_rate", "samples_per_second",
    "memory_gib", "seconds",
)  # fmt: skip
_REQUIRED = {"step": int, "samples_seen": int, "split": str, "seconds": float}
"""The columns that no row leaves blank."""

logger = logging.getLogger(__name__)


class Stopwatch:
    """Counts the seconds of training, without pauses. `before`: seconds to start from."""

    def __init__(self, before: float = 0.0) -> None:
        self._since: float | None = time.perf_counter()
        self._before = before

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self._since is not None else 0.0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count inside this context. A pause inside a pause has no effect."""
        was_running = self._since is not None
        self._before, self._since = self.seconds, None
        try:
            yield
        finally:
            if was_running:
                self._since = time.perf_counter()


class ProgressReporter:
    """Reports a run to the terminal and to files. Ranks other than 0 (is_main False) only keep time.

    resumed_at: the step from which the run continues. Rows of metrics.csv and TensorBoard points of later steps are
    dropped, so each step appears once, and the clock continues from that step. best_possible_ne: of the validation
    split, if known; it is drawn as a line in curves.png. peak_samples_per_second: rate at an MFU of 100 %, if known;
    then the lines say the MFU. report_to: names of trackers, which get the run's arguments.
    """

    def __init__(
        self,
        output_dir: Path,
        total_steps: int,
        device: torch.device,
        *,
        is_main: bool,
        resumed_at: int = 0,
        best_possible_ne: float | None = None,
        peak_samples_per_second: float | None = None,
        report_to: Sequence[str] = ("tensorboard",),
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.watch = Stopwatch()
        self.total_steps = total_steps
        self._device, self._is_main = device, is_main
        self._samples = self._samples_at_line = 0
        self._first_step = resumed_at
        self._best_possible_ne, self._peak = best_possible_ne, peak_samples_per_second
        self._bar: Progress | None = None
        if is_main:
            self._output_dir, self._csv_path = output_dir, output_dir / METRICS_FILE
            samples_seen, seconds = _keep_rows_until(self._csv_path, resumed_at)
            self._trackers = Trackers(report_to, output_dir, arguments or {}, samples_seen)
            self.watch = Stopwatch(seconds)
            if sys.stderr.isatty():
                self._bar = _start_bar(total_steps, resumed_at)
        self._first_seconds = self._seconds_at_line = self._seconds_at_update = self.watch.seconds
        self._started = self._drawn = time.perf_counter()

    def advance(self, step: int, rows: int) -> None:
        """Record that step number `step` is done, on `rows` examples over all ranks."""
        self._samples += rows
        heartbeat.doing = f"training, at step {step} of {self.total_steps}"
        self._seconds_at_update = self.watch.seconds
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    @property
    def samples_per_second(self) -> float:
        """Mean rate from the start or resume to the last step, without evaluations and checkpoints."""
        return self._samples / max(self._seconds_at_update - self._first_seconds, 1e-9)

    def log_step(self, step: int, samples_seen: int, loss: float, ne: float, learning_rate: float) -> None:
        """Report a logging step. loss and ne cover the steps since the last line."""
        if not self._is_main:
            return
        seconds = self.watch.seconds
        rate = (self._samples - self._samples_at_line) / max(seconds - self._seconds_at_line, 1e-9)
        self._samples_at_line = self._samples
        self._seconds_at_line = self._seconds_at_update = seconds
        used, total = _memory_gib(self._device)
        # Wall-clock time, because the remaining steps include evaluations and checkpoints too.
        elapsed = time.perf_counter() - self._started
        eta = duration(elapsed / max(step - self._first_step, 1) * (self.total_steps - step))
        mfu = f"mfu {rate / self._peak:.1%} | " if self._peak else ""
        logger.info(
            f"step {step}/{self.total_steps} {step / self.total_steps:.1%} | loss {loss:.4f} | ne {ne:.4f} | "
            f"lr {short(learning_rate)} | {rate:,.0f} samples/s | {mfu}{used:.1f}/{total:.1f} GiB | eta {eta}"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=f"{rate:,.0f} samples/s | eta {eta}")
        numbers = {
            "loss": loss, "ne": ne, "learning_rate": learning_rate, "samples_per_second": rate, "memory_gib": used
        }  # fmt: skip
        self._record("train", step, samples_seen, numbers)

    def log_evaluation(self, split: str, step: int, samples_seen: int, values: dict[str, Any]) -> None:
        """Report the metrics of a split, and redraw curves.png if it was drawn a while ago."""
        if not self._is_main:
            return
        logger.info(
            f"step {step}/{self.total_steps} {split} | loss {values['logloss']:.4f} | ne {values['ne']:.4f} | "
            f"auc {values['auc']:.4f} | calibration {values['calibration']:.3f} | {values['examples']:,} examples"
        )
        numbers = {"loss": values["logloss"]} | {key: values[key] for key in ("ne", "auc", "calibration")}
        self._record(split, step, samples_seen, numbers)
        if time.perf_counter() - self._drawn > SECONDS_BETWEEN_CURVES:
            with self.watch.paused():
                # Imported here because matplotlib takes a second to import and only rank 0 needs it.
                from dhen.training.reporting.curves import draw_curves

                draw_curves(self._csv_path, self._best_possible_ne)
            self._drawn = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the samples/s clock inside this context, for evaluations and checkpoints."""
        _finish_queued_work(self._device)
        with self.watch.paused():
            yield
            _finish_queued_work(self._device)

    def close(self) -> None:
        """Remove the bar and write what is still buffered."""
        if not self._is_main:
            return
        if self._bar is not None:
            self._bar.stop()
        self._trackers.close()

    def _record(self, split: str, step: int, samples_seen: int, numbers: dict[str, float]) -> None:
        row = {"step": step, "samples_seen": samples_seen, "split": split, "seconds": round(self.watch.seconds, 3)}
        is_new = not self._csv_path.is_file()
        with self._csv_path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerow(row | numbers)
        self._trackers.log({f"{split}/{name}": value for name, value in numbers.items()}, samples_seen)


def short(value: float) -> str:
    """Format with two digits and a short power of ten: 1.0e-3, where Python writes 1.0e-03."""
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}e{int(power)}"


def duration(seconds: float) -> str:
    """Format for reading: 45s, 14m, 3h05m."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f}s"
    return f"{minutes}m" if minutes < 90 else f"{minutes // 60}h{minutes % 60:02d}m"


def _memory_gib(device: torch.device) -> tuple[float, float]:
    """(used, total): on CUDA, the allocator's peak and the device's memory; on CPU, this process and the machine."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device) / 2**30, total / 2**30
    return psutil.Process().memory_info().rss / 2**30, psutil.virtual_memory().total / 2**30


def _finish_queued_work(device: torch.device) -> None:
    """On CUDA, wait for queued kernels, so that their time counts for the code that queued them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_bar(total_steps: int, step: int) -> Progress:
    columns = (MofNCompleteColumn(), TaskProgressColumn(), BarColumn(bar_width=None), TextColumn("{task.description}"))
    bar = Progress(*columns, console=Console(stderr=True), transient=True, expand=True)
    bar.start()
    atexit.register(bar.stop)  # shows the cursor again, even after a failure
    bar.add_task("starting", total=total_steps, completed=step)
    return bar


def _keep_rows_until(path: Path, step: int) -> tuple[int, float]:
    """Drop the rows after `step`, which a resumed run writes again. Step 0 drops all rows.

    Returns samples_seen and seconds of the last row kept, or (0, 0.0) if there is none.
    """
    if step == 0:
        path.unlink(missing_ok=True)
    if not path.is_file():
        return 0, 0.0
    lines, rows = path.read_text("utf-8", errors="replace").splitlines()[1:], []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(_read_row(line))
    if unread := len(lines) - len(rows):  # a kill leaves one, the last
        logger.warning("%s: %d of %d rows could not be read and are dropped", path, unread, len(lines))
    rows = [row for row in rows if int(row["step"]) <= step]
    write_atomically(path, "".join(",".join(row) + "\r\n" for row in (COLUMNS, *(row.values() for row in rows))))
    return (int(rows[-1]["samples_seen"]), float(rows[-1]["seconds"])) if rows else (0, 0.0)


def _read_row(line: str) -> dict[str, str]:
    """A line of metrics.csv. Raises ValueError if it is incomplete or damaged."""
    row = dict(zip(COLUMNS, line.split(","), strict=True))
    for name, value in row.items():
        if value or name in _REQUIRED:
            _REQUIRED.get(name, float)(value)
    return row
