"""Trackers have the numbers of TensorBoard and the run's arguments, and a resumed run continues theirs."""

import json
import logging
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dhen.config.arguments import parse_arguments, trackers_of
from dhen.config.command_line import ArgumentError
from dhen.training.reporting.trackers import TENSORBOARD_FOLDER, TRACKERS_FILE, Trackers
from tests.training.reported_run import ROWS, report_run

ARGUMENTS = {"seed": 7, "freeze": None} | {f"argument_{number}": number for number in range(200)}


def points_of_tensorboard(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / TENSORBOARD_FOLDER))
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def run_and_resume(folder, name: str) -> str:
    """A run that stops at step 100, and goes on from step 50. Returns the id of the tracker's run."""
    ids = []
    for first, last in ((0, 100), (50, 150)):
        report_run(folder, first, last, report_to=[name, "tensorboard", name], arguments=ARGUMENTS)
        ids.append(json.loads((folder / TRACKERS_FILE).read_text())[name])
    assert ids[0] == ids[1]
    return ids[0]


def test_mlflow_has_the_numbers_of_tensorboard(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is an extra: pip install 'dhen[trackers]'")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = run_and_resume(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    assert len(client.search_runs([client.get_run(run_id).info.experiment_id])) == 1
    found = client.get_run(run_id)
    assert found.info.run_name == "run"
    assert found.data.params == {name: str(value) for name, value in ARGUMENTS.items()}
    for tag, points in points_of_tensorboard(tmp_path / "run").items():
        latest = {point.step: point.value for point in client.get_metric_history(run_id, tag)}
        assert latest == pytest.approx(dict(points), rel=1e-6), tag


def records(log: bytes) -> Iterator[bytes]:
    """Those of a log in LevelDB's format: blocks of 32 KiB, whose chunks have a checksum, a length and a type."""
    place, parts = 7, b""
    while place < len(log):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", log[place : place + 7])
        parts, place = parts + log[place + 7 : place + 7 + length], place + 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def test_wandb_has_the_numbers_of_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is an extra: pip install 'dhen[trackers]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_id = run_and_resume(tmp_path / "run", "wandb")
    files = sorted((tmp_path / "run/wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2
    config, points = wandb_run(files)
    assert ARGUMENTS.items() <= config.items()
    for tag, expected in points_of_tensorboard(tmp_path / "run").items():
        assert points[tag] == pytest.approx(dict(expected), rel=1e-6), tag


def wandb_run(files: Sequence[Path]) -> tuple[dict[str, Any], dict[str, dict[int, float]]]:
    """The arguments, and the numbers by name and samples seen, of a run of Weights & Biases that was offline."""
    from wandb.proto import wandb_internal_pb2

    config, points = {}, {}
    for file in files:
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for tag in row.keys() - {"samples_seen"}:
                points.setdefault(tag, {})[row.get("samples_seen")] = row[tag]
    return config, points


def test_no_tracker_leaves_no_file(tmp_path):
    report_run(tmp_path, 0, 20, report_to=[])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_tracker_that_fails_is_left_out(tmp_path, caplog):
    trackers = Trackers(["tensorboard"], tmp_path, {}, 0)
    with caplog.at_level(logging.WARNING):
        trackers.log({"train/loss": "no number"}, ROWS)
        trackers.log({"train/loss": "no number"}, ROWS)
    assert caplog.text.count("report_to: tensorboard fails") == 1
    trackers.close()


def test_a_tracker_that_cannot_start_is_one_line(tmp_path):
    (tmp_path / TENSORBOARD_FOLDER).write_text("a file")
    with pytest.raises(ArgumentError, match=r"^report_to: tensorboard cannot start \(.*\)\. Log in, .*$"):
        Trackers(["tensorboard"], tmp_path, {}, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["wandbb"],
            "report_to: unknown tracker 'wandbb'. Did you mean 'wandb'? Allowed: mlflow, none, tensorboard, wan",
        ),
        (["none", "wandb"], "report_to is none, wandb. Use none alone"),
    ],
)
def test_a_wrong_name_is_one_line(words, message):
    with pytest.raises(ArgumentError, match=message.replace("?", r"\?")):
        parse_arguments(["--dataset_name=rows.csv", "--report_to", *words])


def test_a_run_reports_to_tensorboard_unless_it_says_otherwise():
    for words, trackers in (([], ("tensorboard",)), (["--report_to", "none"], ())):
        assert trackers_of(parse_arguments(["--dataset_name=rows.csv", *words]).training) == trackers


def test_a_missing_package_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr("dhen.config.arguments.find_spec", lambda name: None)
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
        with pytest.raises(ArgumentError, match=f"report_to: {name} is not installed. Run: pip install {package}$"):
            parse_arguments(["--dataset_name=rows.csv", f"--report_to={name}"])
    parse_arguments(["--dataset_name=rows.csv", "--report_to", "tensorboard"])
