"""What a run tells its user, on a terminal, in a pipe and in its files, also after a kill and a resume."""

import csv
import json
import logging
import math
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dhen.training.reporting.progress
from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import read_ds_config
from dhen.config.training_arguments import TrainingArguments
from dhen.model.configuration_dhen import DhenConfig
from dhen.planner.machine import read_machine
from dhen.planner.step_trace import training_flops_per_sample
from dhen.training.evaluation.metrics import MetricValues
from dhen.training.loop import Evaluation
from dhen.training.reporting.curves import CURVES_FILE, draw_curves
from dhen.training.reporting.progress import (
    COLUMNS,
    METRICS_FILE,
    ProgressReporter,
    Stopwatch,
    duration,
    short,
)
from dhen.training.reporting.run_folder import metrics_of, print_metrics, write_json
from dhen.training.reporting.trackers import TENSORBOARD_FOLDER
from dhen.training.session import peak_samples_per_second
from tests import ROOT
from tests.plain import CONFIG, recipe
from tests.training.reported_run import EVALUATION, LOGGING, ROWS, TOTAL, report_run

CPU = torch.device("cpu")
STEP_LINE = re.compile(
    r"step \d+/200 \d+\.\d% \| loss \d\.\d{4} \| ne \d\.\d{4} \| lr \d\.\de-\d+ \| [\d,]+ samples/s \| "
    r"\d+\.\d/\d+\.\d GiB \| eta \d+(s|m|h\d\dm)"
)
EVALUATION_LINE = re.compile(
    r"step \d+/200 validation \| loss \d\.\d{4} \| ne \d\.\d{4} \| auc \d\.\d{4} \| calibration \d\.\d{3} \| "
    r"[\d,]+ examples"
)


def rows_of(output_dir: Path) -> list[dict[str, str]]:
    with (output_dir / METRICS_FILE).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers_of(output_dir: Path) -> list[tuple[str, ...]]:
    """The rows of metrics.csv without what depends on the clock and the machine."""
    names = ("step", "samples_seen", "split", "loss", "ne", "auc", "calibration", "learning_rate")
    return [tuple(row[name] for name in names) for row in rows_of(output_dir)]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """stderr of one run into a pipe, and of one on a terminal that ends in an error; stdout of both."""
    call = (
        "from dhen.runtime.messages import log_to_stderr; log_to_stderr(); "
        "from pathlib import Path; from tests.training.reported_run import report_run; "
        "from dhen.training.reporting.curves import draw_curves; folder = Path({folder!r}); "
        "report_run(folder, 0, 200, ends={ends}); draw_curves(folder / 'metrics.csv')"
    )
    program = [sys.executable, "-W", "default", "-c"]
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "PYTHONWARNINGS")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "stdout": subprocess.PIPE}
    piped = subprocess.Popen(
        [*program, call.format(folder=str(tmp_path_factory.mktemp("piped")), ends=True)],
        **options,
        env=environment,
        stderr=subprocess.PIPE,
    )
    ours, theirs = pty.openpty()
    code = call.format(folder=str(tmp_path_factory.mktemp("terminal")), ends=False) + "; 1 / 0"
    on_terminal = subprocess.Popen([*program, code], **options, env=environment, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # Linux's way to say that the other side of a terminal is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    stdout, stderr = piped.communicate(timeout=120)
    stdout += on_terminal.communicate(timeout=120)[0]
    assert piped.returncode == 0, stderr.decode()
    assert on_terminal.returncode == 1
    return {"pipe": stderr.decode(), "terminal": shown.decode(), "stdout": stdout.decode()}


def test_in_a_pipe_each_logging_step_is_one_plain_line_and_nothing_else_is_said(processes: dict[str, str]) -> None:
    lines = processes["pipe"].splitlines()
    evaluations = [line for line in lines if EVALUATION_LINE.fullmatch(line)]
    steps = [line for line in lines if STEP_LINE.fullmatch(line)]
    assert len(evaluations) == TOTAL // EVALUATION
    assert len(steps) == TOTAL // LOGGING
    assert len(lines) == len(evaluations) + len(steps), "a warning, or a line cut in two"
    assert processes["stdout"] == ""


def test_on_a_terminal_a_bar_lives_under_the_lines(processes: dict[str, str]) -> None:
    shown = processes["terminal"]
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert "━" in plain
    assert re.search(r"\d+/200 +\d+%", plain)
    lines = [line for line in plain.replace("\r", "\n").splitlines() if STEP_LINE.fullmatch(line.strip())]
    assert len(lines) == TOTAL // LOGGING
    assert "━" not in processes["pipe"]


def test_after_an_error_the_terminal_has_its_cursor_and_the_traceback(processes: dict[str, str]) -> None:
    shown = processes["terminal"]
    assert "ZeroDivisionError" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_other_ranks_say_and_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    progress = report_run(tmp_path, 0, TOTAL, is_main=False)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert progress.samples_per_second > 0


def test_killed_and_resumed_the_csv_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    report_run(whole, 0, TOTAL)
    report_run(resumed, 0, 130, ends=False)
    with (resumed / METRICS_FILE).open("a") as file:
        file.write("14")  # of "140,35840,train,...": the kill came while it was written
    report_run(resumed, 100, 170)
    report_run(resumed, 150, TOTAL)
    assert numbers_of(resumed) == numbers_of(whole)
    assert [row["step"] for row in rows_of(whole) if row["split"] == "train"] == [str(n) for n in range(20, 201, 20)]
    seconds = [float(row["seconds"]) for row in rows_of(resumed)]
    assert seconds == sorted(seconds), "the clock goes on where the checkpoint was"
    assert sorted(path.name for path in resumed.iterdir()) == [METRICS_FILE, TENSORBOARD_FOLDER]


@pytest.mark.parametrize("damaged", [b"\0" * 40, b"\xff\xfe,1", b"60,15360,train,0.4,0.7,,,x1e-3,1,0.1,7.0", b"6\n0,,"])
def test_damaged_rows_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: bytes) -> None:
    report_run(tmp_path, 0, 100)
    lines = (tmp_path / METRICS_FILE).read_bytes().splitlines(keepends=True)
    lines[4] = damaged + b"\r\n"  # of step 60
    (tmp_path / METRICS_FILE).write_bytes(b"".join(lines))
    report_run(tmp_path, 100, TOTAL)
    dropped = 1 + damaged.count(b"\n")
    assert caplog.messages[0] == (
        f"{tmp_path / METRICS_FILE}: {dropped} of {6 + dropped} rows could not be read and are dropped"
    )
    steps = [row["step"] for row in rows_of(tmp_path)]
    assert steps[:6] == ["20", "40", "50", "80", "100", "100"]


def test_a_run_that_starts_anew_forgets_the_rows_of_the_last(tmp_path: Path) -> None:
    report_run(tmp_path, 0, 100)
    report_run(tmp_path, 0, 60)
    assert [row["step"] for row in rows_of(tmp_path)] == ["20", "40", "50", "60"]


def test_tensorboard_has_each_point_once_with_samples_seen_as_x(tmp_path: Path) -> None:
    report_run(tmp_path, 0, 130, ends=False)
    time.sleep(1.1)  # event files are named by the second, and read in the order of their names
    report_run(tmp_path, 100, TOTAL)
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER))
    events.Reload()
    for split, every, name in (("train", LOGGING, "loss"), ("train", LOGGING, "ne"), ("validation", EVALUATION, "auc")):
        points = events.Scalars(f"{split}/{name}")
        assert [point.step for point in points] == [ROWS * step for step in range(every, TOTAL + 1, every)]
        in_csv = [float(row[name]) for row in rows_of(tmp_path) if row["split"] == split]
        assert [point.value for point in points] == pytest.approx(in_csv, rel=1e-6)


def test_the_clock_stands_still_while_paused() -> None:
    watch = Stopwatch(before=10.0)
    time.sleep(0.05)
    with watch.paused():
        at_pause = watch.seconds
        with watch.paused():
            time.sleep(0.05)
        time.sleep(0.05)
        assert watch.seconds == at_pause
    assert 10.05 <= at_pause <= watch.seconds < at_pause + 0.05
    time.sleep(0.05)
    assert watch.seconds >= at_pause + 0.05


def test_the_clock_goes_on_after_an_error_within_a_pause() -> None:
    watch = Stopwatch()
    with pytest.raises(KeyError), watch.paused():
        raise KeyError
    before = watch.seconds
    time.sleep(0.02)
    assert watch.seconds > before


def test_samples_per_second_leave_out_evaluations(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    progress = ProgressReporter(tmp_path, TOTAL, CPU, is_main=True)
    for step in (1, 2):
        time.sleep(0.1)
        progress.advance(step, 1000)
        with progress.paused():
            time.sleep(0.6)
        progress.log_step(step, 1000 * step, 0.5, 0.9, 1e-3)
    progress.close()
    at_end = progress.samples_per_second
    time.sleep(0.05)
    assert progress.samples_per_second == at_end, "what comes after the last update isn't training"
    assert 2_500 < at_end <= 10_000, "with the pauses it would be 1,429"
    assert [float(row["samples_per_second"]) for row in rows_of(tmp_path)] == [
        pytest.approx(10_000, rel=0.75),
        pytest.approx(10_000, rel=0.75),
    ]


def test_lines_say_the_mfu_where_the_gpus_rate_is_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dhen")
    config = DhenConfig(**CONFIG)
    training = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=8)
    flops, rates = training_flops_per_sample(config), read_machine("h100").flops
    for name, dtype in (("zero0.json", "fp32"), ("zero0_bf16.json", "bf16"), ("zero2_bf16.json", "bf16")):
        ds_config = read_ds_config(ROOT / "ds_configs" / name, recipe(4, 8))
        assert peak_samples_per_second(config, ds_config, training, "h100") == pytest.approx(rates[dtype] / flops)
    tf32 = replace(ds_config, deepspeed={}, dhen=DhenSection(allow_tf32=True))
    assert peak_samples_per_second(config, tf32, training, "h100") == pytest.approx(rates["tf32"] / flops)

    progress = ProgressReporter(tmp_path, TOTAL, CPU, is_main=True, peak_samples_per_second=1e6)
    progress.advance(1, 10_000)
    time.sleep(0.05)
    progress.log_step(1, 10_000, 0.5, 0.9, 1e-3)
    progress.close()
    line = caplog.messages[-1]
    rate, mfu = re.search(r" \| ([\d,]+) samples/s \| mfu (\d+\.\d)% \| \d+\.\d/\d+\.\d GiB \| eta ", line).groups()
    assert float(mfu) == pytest.approx(int(rate.replace(",", "")) / 1e6 * 100, abs=0.06)


def test_a_metric_that_is_nan_is_written_and_drawn(tmp_path: Path) -> None:
    progress = ProgressReporter(tmp_path, TOTAL, CPU, is_main=True)
    values = MetricValues(auc=math.nan, ne=math.nan, logloss=0.1, calibration=math.nan, examples=3)
    progress.log_evaluation("validation", 1, 10, asdict(values))
    progress.close()
    assert rows_of(tmp_path)[0]["auc"] == "nan"
    assert draw_curves(tmp_path / METRICS_FILE).is_file()


def colored_pixels(path: Path) -> tuple[int, int, int]:
    """How many pixels are reddish, greenish, bluish: one color leads the others."""
    pixels = matplotlib.image.imread(path)[..., :3]
    leads = pixels == pixels.max(axis=2, keepdims=True)
    has_color = np.ptp(pixels, axis=2) > 0.15
    red, green, blue = ((leads[..., channel] & has_color).sum() for channel in range(3))
    return int(red), int(green), int(blue)


def test_curves_show_training_validation_and_the_best_possible_ne(tmp_path: Path) -> None:
    report_run(tmp_path, 0, TOTAL)
    validation, best, train = colored_pixels(draw_curves(tmp_path / METRICS_FILE, best_possible_ne=0.8))
    assert min(train, validation, best) > 300
    _, without_best, _ = colored_pixels(draw_curves(tmp_path / METRICS_FILE))
    assert without_best == 0


def test_curves_are_drawn_at_evaluations_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report_run(tmp_path, 0, TOTAL)
    assert not (tmp_path / CURVES_FILE).exists(), "a short run draws at its end only"
    monkeypatch.setattr(dhen.training.reporting.progress, "SECONDS_BETWEEN_CURVES", 0.0)
    report_run(tmp_path, TOTAL - EVALUATION, TOTAL)
    assert (tmp_path / CURVES_FILE).stat().st_size > 10_000


def test_the_summary_is_strict_json_and_written_whole(tmp_path: Path) -> None:
    test = MetricValues(auc=math.nan, ne=math.inf, logloss=0.4, calibration=1.0, examples=7)
    path = tmp_path / "summary.json"
    write_json(
        path, {"test": metrics_of(Evaluation(test, {}), best_possible_ne=0.79), "seconds": math.nan, "world_size": 2}
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} isn't JSON")

    summary = json.loads(path.read_text(), parse_constant=refuse)
    assert summary["test"] == {
        "auc": None, "ne": None, "logloss": 0.4, "calibration": 1.0, "examples": 7, "best_possible_ne": 0.79,
        "unseen": {},
    }  # fmt: skip
    assert summary["seconds"] is None
    before = path.read_bytes()
    with pytest.raises(ValueError, match="object"):
        write_json(path, {"test": {"auc": object()}})
    assert path.read_bytes() == before


def test_the_final_table_has_a_row_a_split(tmp_path: Path) -> None:
    values = Evaluation(MetricValues(auc=0.81234567, ne=0.8, logloss=0.4, calibration=1.0, examples=12_345), {})
    with (tmp_path / "table").open("w") as file:
        by_split = {"eval": metrics_of(values, 0.79), "test": metrics_of(values)}
        print_metrics(by_split, Console(file=file, width=100))
        print_metrics({}, Console(file=file, width=100))
    heading, evaluated, tested = (tmp_path / "table").read_text().splitlines()
    assert heading.split() == ["split", "auc", "ne", "best", "possible", "ne", "logloss", "calibration", "examples"]
    assert evaluated.split() == ["eval", "0.81235", "0.80000", "0.79000", "0.40000", "1.00000", "12,345"]
    assert tested.split() == ["test", "0.81235", "0.80000", "-", "0.40000", "1.00000", "12,345"]


def test_memory_of_this_process_and_machine_is_plausible(tmp_path: Path) -> None:
    report_run(tmp_path, 0, LOGGING)
    in_use = float(rows_of(tmp_path)[0]["memory_gib"])
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    assert 0.05 < in_use < machine


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (short, 1e-3, "1.0e-3"),
        (short, 0.0, "0.0e0"),
        (short, 25.0, "2.5e1"),
        (short, 3.14e-12, "3.1e-12"),
        (duration, 45, "45s"),
        (duration, 840, "14m"),
        (duration, 3 * 3600 + 300, "3h05m"),
    ],
)
def test_numbers_are_short(write: Callable[[float], str], value: float, text: str) -> None:
    assert write(value) == text


def test_columns_are_the_numbers_of_the_lines(tmp_path: Path) -> None:
    report_run(tmp_path, 0, TOTAL)
    rows = rows_of(tmp_path)
    assert tuple(rows[0]) == COLUMNS
    blank = {split: {name for row in rows if row["split"] == split for name in row if not row[name]}
             for split in ("train", "validation")}  # fmt: skip
    assert blank == {
        "train": {"auc", "calibration"},
        "validation": {"learning_rate", "samples_per_second", "memory_gib"},
    }
