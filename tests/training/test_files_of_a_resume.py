"""A resume opens few files: each rank its own, or those with what it needs; no rank opens those of all ranks."""

import sys
from pathlib import Path
from typing import Any

import pytest

from dhen.runtime.topology import Topology
from dhen.tables import storage
from dhen.tables.placement.plan import TableShard
from dhen.training.saved.checkpoint import TrainerState, load_checkpoint, start_save
from tests.ranks import run_ranks
from tests.tiny_training import train

SET_UPS = {"zero0": frozenset(), "zero1": frozenset(), "zero3": frozenset({"layers.0"})}


def save(topology: Topology, folder: Path) -> dict[str, tuple[TableShard, ...]]:
    shards = {}
    for name, frozen in SET_UPS.items():
        _, model = train(topology, name, steps=1, global_batch=24, frozen=frozen)
        start_save(model, folder / name, TrainerState(step=1)).finish(topology)
        shards[name] = model.placement.shards
    return shards


def files_opened(topology: Topology, folder: Path) -> dict[str, tuple[set[str], tuple[TableShard, ...]]]:
    """By set-up: the names of the files of the checkpoint that this rank opens to load it, and its shards."""
    opened, found = set(), {}

    def add(path: Any) -> None:
        path = Path(path) if isinstance(path, str | Path) else Path()
        if path.parent.name == "checkpoint-1":
            opened.add(path.name)

    def watched(path: Path, **options: Any) -> Any:
        add(path)
        return safe_open(path, **options)

    safe_open, storage.safe_open = storage.safe_open, watched  # opens files outside Python
    sys.addaudithook(lambda event, values: add(values[0]) if event == "open" else None)
    for name, frozen in SET_UPS.items():
        _, model = train(topology, name, steps=1, global_batch=24, frozen=frozen)
        opened.clear()
        load_checkpoint(model, folder / name / "checkpoint-1")
        found[name] = set(opened), model.tables.shards
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, tuple[TableShard, ...]]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(3, save, folder)[0]


def test_on_the_same_ranks_each_opens_its_own(saved):
    folder, _ = saved
    of_deepspeed = {
        "zero0": lambda rank: {"mp_rank_00_model_states.pt"},
        "zero1": lambda rank: {"mp_rank_00_model_states.pt", f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"},
        "zero3": lambda rank: {f"zero_pp_rank_{rank}_mp_rank_00_{it}_states.pt" for it in ("model", "optim")},
    }
    for rank, by_set_up in enumerate(run_ranks(3, files_opened, folder)):
        own = {"trainer_state.json", f"tables-{rank:05d}.safetensors", f"rank-{rank:05d}.pt"}
        for name, (opened, _) in by_set_up.items():
            assert opened == own | of_deepspeed[name](rank), (rank, name)


def test_on_other_ranks_each_opens_those_with_its_columns(saved):
    folder, before = saved
    for rank, by_set_up in enumerate(run_ranks(2, files_opened, folder)):
        for name, (opened, shards) in by_set_up.items():
            needed = {
                f"tables-{old.rank:05d}.safetensors"
                for old in before[name]
                for new in shards
                if old.name == new.name and old.first_column < new.last_column and old.last_column > new.first_column
            }
            looked_into = {f"tables-{number:05d}.safetensors" for number in range(rank, 3, 2)}
            assert {file for file in opened if file.startswith("tables")} == needed | looked_into, (rank, name)
            # Of the frozen weights that ZeRO-3 shards, the first rank writes the whole.
            expected = 3 if (name, rank) == ("zero3", 0) else 1
            assert len([file for file in opened if file.endswith("model_states.pt")]) == expected, (rank, name)
            assert not [file for file in opened if file.endswith("optim_states.pt") or file.startswith("rank-")]
