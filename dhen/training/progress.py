"""What a run tells its user: lines or a live bar, metrics.csv, TensorBoard, curves. Rank 0 speaks for all.

A logging step's line, its row of metrics.csv and its TensorBoard points hold the same numbers; TensorBoard's x is the
number of samples seen.
"""

import contextlib
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

METRICS_FILE = "metrics.csv"
TENSORBOARD_FOLDER = "tensorboard"
COLUMNS = (
    "step", "samples_seen", "split", "loss", "ne", "auc", "calibration", "learning_rate", "samples_per_second",
    "memory_gib", "seconds",
)  # fmt: skip


class Stopwatch:
    """Seconds of training, without what happens while it is paused."""

    def __init__(self) -> None:
        self._since: float | None = time.perf_counter()
        self._before = 0.0

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._before + (time.perf_counter() - self._since if self._since is not None else 0.0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Not counting within it."""
        self._before, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = time.perf_counter()


class ProgressReporter:
    """Reports the run to terminal and files. On other ranks than 0 (is_main False) it keeps time and says nothing.

    resumed_at: the step at which the run goes on; later rows of an earlier metrics.csv are dropped, so that each step
    stands in it once.
    """

    def __init__(
        self, output_dir: Path, total_steps: int, device: torch.device, *, is_main: bool, resumed_at: int = 0
    ) -> None:
        self.watch = Stopwatch()
        self.total_steps = total_steps
        self._device, self._is_main = device, is_main
        self._samples = self._samples_at_line = 0
        self._seconds_at_line = 0.0
        self._first_step = self._step = resumed_at
        if not is_main:
            return
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._csv_path = output_dir / METRICS_FILE
        _keep_rows_until(self._csv_path, resumed_at)
        self._writer = _summary_writer(output_dir / TENSORBOARD_FOLDER)
        self._bar = self._start_bar() if sys.stderr.isatty() else None

    def _start_bar(self) -> Progress:
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), console=self._console, transient=True
        )
        bar.start()
        bar.add_task("starting", total=self.total_steps, completed=self._step)
        return bar

    def advance(self, step: int, rows: int) -> None:
        """An update is done: the `step`-th of the run, on `rows` examples of all ranks."""
        self._step = step
        self._samples += rows
        if self._is_main and self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    @property
    def samples_per_second(self) -> float:
        """Over the whole session, evaluations and checkpoints not counted."""
        return self._samples / self.watch.seconds if self.watch.seconds else 0.0

    def log_step(self, step: int, samples_seen: int, loss: float, ne: float, learning_rate: float) -> None:
        """A line of progress; loss and NE are of the updates since the last one."""
        if not self._is_main:
            return
        seconds = self.watch.seconds
        rate = (self._samples - self._samples_at_line) / max(seconds - self._seconds_at_line, 1e-9)
        self._samples_at_line, self._seconds_at_line = self._samples, seconds
        used, total = _memory_gib(self._device)
        eta = seconds / max(step - self._first_step, 1) * (self.total_steps - step)
        line = (
            f"step {step}/{self.total_steps} {step / self.total_steps:.1%} | loss {loss:.4f} | ne {ne:.4f} | "
            f"lr {learning_rate:.1e} | {rate:,.0f} samples/s | {used:.1f}/{total:.1f} GiB | eta {duration(eta)}"
        )
        self._say(line)
        numbers = {
            "loss": loss, "ne": ne, "learning_rate": learning_rate, "samples_per_second": rate, "memory_gib": used
        }  # fmt: skip
        self._record("train", step, samples_seen, numbers)

    def log_evaluation(self, split: str, step: int, samples_seen: int, values: dict[str, Any]) -> None:
        """A line of metrics of a split."""
        if not self._is_main:
            return
        self._say(
            f"step {step}/{self.total_steps} {split} | loss {values['logloss']:.4f} | ne {values['ne']:.4f} | "
            f"auc {values['auc']:.4f} | calibration {values['calibration']:.3f} | {values['examples']:,} examples"
        )
        numbers = {"loss": values["logloss"]} | {key: values[key] for key in ("ne", "auc", "calibration")}
        self._record(split, step, samples_seen, numbers)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the clock of samples/s stands still: for evaluations and checkpoints."""
        with self.watch.paused():
            yield

    def close(self) -> None:
        """End the bar and write what is still in memory."""
        if not self._is_main:
            return
        if self._bar is not None:
            self._bar.stop()
        self._writer.close()

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=line)

    def _record(self, split: str, step: int, samples_seen: int, numbers: dict[str, float]) -> None:
        row = {"step": step, "samples_seen": samples_seen, "split": split, "seconds": round(self.watch.seconds, 3)}
        is_new = not self._csv_path.is_file()
        with self._csv_path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerow(row | numbers)
        for name, value in numbers.items():
            self._writer.add_scalar(f"{split}/{name}", value, global_step=samples_seen)
        self._writer.flush()


def duration(seconds: float) -> str:
    """For a reader: 45s, 14m, 3h05m."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f}s"
    return f"{minutes}m" if minutes < 90 else f"{minutes // 60}h{minutes % 60:02d}m"


def _memory_gib(device: torch.device) -> tuple[float, float]:
    """(peak of the allocator, of the device) on CUDA; (this process, of the machine) on CPU."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device) / 2**30, total / 2**30
    return psutil.Process().memory_info().rss / 2**30, psutil.virtual_memory().total / 2**30


def _keep_rows_until(path: Path, step: int) -> None:
    """Drop the rows of later steps, which a resumed run will write again; without a resume, all."""
    if not path.is_file():
        return
    if step == 0:
        path.unlink()
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
    draft = path.with_suffix(".draft")
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    draft.replace(path)


def _summary_writer(folder: Path) -> Any:
    # Imported here, because TensorBoard takes a second and only rank 0 needs it.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
