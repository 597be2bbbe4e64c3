"""Preparing data in a job of several ranks, and what is refused before a run."""

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from dhen.config.arguments import parse_arguments
from dhen.config.command_line import ArgumentError
from dhen.config.data_arguments import DataArguments
from dhen.data.formats.raw_rows import DataError
from dhen.data.loading.batches import BatchLoader
from dhen.data.schema import Schema, SplitCounts
from dhen.runtime.topology import Topology
from dhen.training import dataset
from tests.data.prepared_folders import write_prepared
from tests.ranks import run_ranks

FOLDER = Path("prepared")


def prepare_slowly(topology: Topology, heartbeat_seconds: float) -> Path:
    """Preparation of 5 s in a process group that gives up after 2 s of silence."""
    dataset.HEARTBEAT_SECONDS = heartbeat_seconds
    dataset._prepare = lambda *_, **__: time.sleep(5) or FOLDER
    impatient = replace(topology, world=dist.new_group(timeout=timedelta(seconds=2)))
    return dataset.prepare_dataset(DataArguments(), Path("cache"), impatient)


def test_ranks_wait_longer_for_the_data_than_their_process_group_would():
    assert run_ranks(2, prepare_slowly, 0.2) == [FOLDER, FOLDER]
    with pytest.raises(AssertionError, match=r"rank \d of 2"):  # negative control: no word meanwhile
        run_ranks(2, prepare_slowly, 60.0)


def prepare_nothing(topology: Topology, folder: Path) -> str:
    (folder / "rows.tsv").write_text("no row of Criteo's\n")
    named = DataArguments(dataset_name=str(folder / "rows.tsv"), dataset_format="criteo")
    with pytest.raises(DataError) as error:
        dataset.prepare_dataset(named, folder / "cache", topology)
    return str(error.value)


def test_what_goes_wrong_in_the_background_is_raised(tmp_path):
    (message,) = run_ranks(1, prepare_nothing, tmp_path)
    assert "rows.tsv: row 1" in message


@pytest.mark.parametrize(
    ("splits", "words"),
    [({}, "calibrate needs a validation split"), ({"validation": SplitCounts(10, 10)}, "calibrate needs both labels")],
)
def test_a_calibration_that_nothing_could_fit_is_refused(splits, words):
    schema = Schema((), (), {"train": SplitCounts(100, 20)} | splits)
    with pytest.raises(ArgumentError, match=words):
        dataset._check_splits(parse_arguments(["--dataset_name=a", "--calibrate"]), schema)
    dataset._check_splits(parse_arguments(["--dataset_name=a"]), schema)


def test_ranks_that_read_more_than_their_rows_are_told(tmp_path, monkeypatch, caplog):
    prepared = write_prepared(tmp_path / "p", 160, group_rows=10)
    monkeypatch.setattr(dataset, "MANY_ROWS", 100)
    caplog.set_level("INFO")

    def said(shuffle: bool = True, **options) -> str:
        caplog.clear()
        train = BatchLoader(prepared.folder, "train", batch_size=5, shuffle=shuffle, **options)
        dataset._say_lanes(train, options["world_size"])
        return caplog.text

    assert "read in 2 lanes, which the ranks share out" in said(world_size=2)
    assert said(world_size=1) == ""
    assert "each of 8 ranks reads 4 times its own training rows: the lanes are fewer than the ranks: 2." in said(
        world_size=8
    )
    assert "each of 9 ranks reads 9 times its own training rows: the lanes are fewer than the ranks: 1." in said(
        world_size=9
    )
    assert "the global batch, 45," in said(world_size=9)
    assert "each of 8 ranks reads 8 times its own training rows: shuffle is none" in said(shuffle=False, world_size=8)


def rows_in_order(topology: Topology, folder: Path, shuffle: str) -> tuple[int, list[int]]:
    arguments = parse_arguments([f"--dataset_name={folder}", f"--shuffle={shuffle}"])
    arguments.training.per_device_train_batch_size = 16
    train = dataset._open_splits(arguments, topology, folder, Schema.load(folder))["train"]
    return train.lanes, [row for batch in train.epoch(0) for row in batch.rows_B.tolist()]


def test_rows_come_in_the_order_of_the_files_if_they_are_not_shuffled(tmp_path):
    prepared = write_prepared(tmp_path / "p", 160, group_rows=10)
    assert run_ranks(1, rows_in_order, prepared.folder, "none") == [(1, list(range(160)))]
    ((lanes, rows),) = run_ranks(1, rows_in_order, prepared.folder, "window")
    assert lanes == 2
    assert rows != sorted(rows) == list(range(160))
