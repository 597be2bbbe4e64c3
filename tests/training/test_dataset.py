"""Preparing data in a job of several ranks, and the arguments of a run that is resumed."""

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from dhen.config.arguments import DataArguments, parse_arguments
from dhen.data.formats.raw_rows import DataError
from dhen.runtime.topology import Topology
from dhen.training import dataset
from dhen.training.dataset import take_earlier_defaults
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


def write_run(folder: Path, **recorded: object) -> Path:
    """A run folder with a checkpoint and its arguments."""
    (folder / "checkpoint-4").mkdir(parents=True)
    (folder / "checkpoint-4/trainer_state.json").write_text("{}")
    (folder / "arguments.yaml").write_text(yaml.safe_dump(recorded))
    return folder


def test_a_resumed_run_of_an_earlier_version_keeps_its_defaults(tmp_path):
    earlier = {"id_encoding": "hash", "hash_size": 100_000, "min_count": 1, "num_train_epochs": 1}
    earlier |= {"per_device_train_batch_size": 2048, "lr_scheduler_type": "constant", "table_epsilon": 1e-8}
    flags = ["--dataset_name=a", "--resume_from_checkpoint=true", "--num_train_epochs=3"]
    run = write_run(tmp_path / "old", **earlier)
    arguments = parse_arguments([*flags, f"--output_dir={run}"])
    said = take_earlier_defaults(arguments)
    data, training = arguments.data, arguments.training
    assert (data.id_encoding, data.hash_size, data.vocabulary_keys) == ("hash", 100_000, "new")
    assert (training.lr_scheduler_type, training.table_epsilon) == ("constant", 1e-8)
    assert training.num_train_epochs == 3, "it was given"
    assert "lr_scheduler_type is constant, as in the run that is resumed" in said
    run = write_run(tmp_path / "now", **earlier, vocabulary_keys="union")
    arguments = parse_arguments([*flags, f"--output_dir={run}"])
    assert take_earlier_defaults(arguments) == []
    assert arguments.training.lr_scheduler_type == "cosine"
    assert take_earlier_defaults(parse_arguments(["--dataset_name=a", f"--output_dir={run}"])) == []
