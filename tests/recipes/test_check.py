"""train.py --check says what the run then says, refuses what the run would, and neither trains nor writes."""

import os
import random
import re
from pathlib import Path

import pytest
import torch

from dhen.data.preparation import caching
from dhen.training import check, dataset, session
from tests.recipes.launch import TINY, Finished, run_script, summary

SCHEMA = 'label: click\ndense: [age]\nsparse: [user, {name: tags, multi_valued: true, separator: "|"}]\n'


def lines_of(done: Finished) -> list[str]:
    """The set-up that a run prints before its first step."""
    assert done.status == 0, done.output
    kinds = ("chosen for ", "arguments: ", "data: ", "model: ", "tables:", "rank  shards", "the slowest", "memory: ")
    return [line for line in done.output.splitlines() if line.startswith(kinds) or re.match(r" +\d+ +\d+ +\d", line)]


def everything(folder: Path) -> dict[Path, bytes]:
    """Every file, and every folder, below a folder."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def quickly() -> None:
    """A patch: time only as long as it takes to see that it works; say whether that changed a weight."""
    check._MOST_SECONDS = 0.1
    measure = check._samples_per_second

    def watched(trainer):
        before = weights(trainer.model)
        measured = measure(trainer)
        after = weights(trainer.model)
        if all(torch.equal(old, new) for old, new in zip(before, after, strict=True)):
            print(f"rank {os.environ['RANK']}: {len(before)} tensors as they were")
        return measured

    check._samples_per_second = watched


def weights(model) -> list[torch.Tensor]:
    of_shards = [tensors["weight"] for _, tensors in model.tables.shard_tensors()]
    return [tensor.clone() for tensor in (*model.dense_state_dict().values(), *of_shards)]


def short_heads() -> None:
    """A patch: as for data of millions of rows."""
    quickly()
    dataset.HEAD_ROWS, caching._HEAD_BLOCK = 300, 1 << 10


def write_log(folder: Path, rows: int) -> list[str]:
    """A CSV in which each user occurs once, and there are 20 tags; as flags."""
    numbers = random.Random(0)
    lines = [f"{number % 2},{number % 50},u{number:05},{numbers.randrange(20)}|{number % 3}" for number in range(rows)]
    (folder / "log.csv").write_text("\n".join(["click,age,user,tags", *lines]) + "\n")
    (folder / "schema.yaml").write_text(SCHEMA)
    named = [f"--dataset_name={folder / 'log.csv'}", f"--dataset_schema={folder / 'schema.yaml'}"]
    return [*named, f"--output_dir={folder / 'runs' / 'log'}", *TINY, "--ds_config=ds_configs/zero3.json"]


def test_it_says_what_the_run_says_and_leaves_no_trace(tmp_path):
    flags = write_log(tmp_path, 700)
    before = everything(tmp_path)
    first = run_script("train.py", *flags, "--check", ranks=2, patch=quickly)
    assert everything(tmp_path) == before, first.output
    run = run_script("train.py", *flags, ranks=2)
    assert lines_of(first) == lines_of(run), first.output
    assert len(lines_of(run)) >= 9
    assert f"check: {summary(tmp_path / 'runs/log')['steps']} steps of " in first.output
    assert all(f"rank {rank}: " in first.output for rank in (0, 1)), f"a weight has changed: {first.output}"
    for column in ("label: 0 or 1", "age: number, log1p", "tags: multi-valued category, vocabulary, 21 table rows"):
        assert f"\n  {column}\n" in first.output
    assert re.search(r"Expected time: \d+s to prepare the data, then \d+s with 1 evaluations", first.output)

    before = everything(tmp_path)
    resumed = run_script("train.py", *flags, "--check", "--resume_from_checkpoint=true", ranks=2, patch=quickly)
    assert lines_of(resumed) == lines_of(run), resumed.output
    assert "There is nothing left to train" in resumed.output
    assert "the data is prepared in" in resumed.output
    elsewhere = (f"--cache_dir={tmp_path / 'other'}", "--per_device_train_batch_size=64", "--check")
    other = run_script("train.py", *flags, *elsewhere, "--resume_from_checkpoint=true", patch=short_heads)
    assert "other does not have the data, which check compares with the checkpoint's" in other.output
    there = run_script("train.py", *flags, "--check")
    assert "already holds a run" in there.output
    assert (there.status, other.status) == (1, 1)
    assert everything(tmp_path) == before


def test_of_large_data_it_reads_the_head_and_estimates_the_whole(tmp_path):
    flags = write_log(tmp_path, 20_000)
    before = everything(tmp_path)
    done = run_script("train.py", *flags, "--check", "--per_device_train_batch_size=16", patch=short_heads)
    assert done.status == 0, done.output
    rows = int(re.search(r"data: .* train ([\d,]+) ", done.output)[1].replace(",", ""))
    assert rows == pytest.approx(16_000, rel=0.1)
    users = int(re.search(r"user: category, vocabulary, ([\d,]+) ", done.output)[1].replace(",", ""))
    assert users == rows + 1
    assert "  tags: multi-valued category, vocabulary, 21 table rows" in done.output
    assert re.search(r"2\d\d training rows were read, 1\.\d\d% of them; counts of rows", done.output), done.output
    assert f"check: {-(-rows // 16):,} steps of 16 rows" in done.output
    assert everything(tmp_path) == before


def test_the_quickstart_is_checked_before_it_is_generated(tmp_path):
    done = run_script("train.py", f"--output_dir={tmp_path / 'runs/q'}", "--check", patch=quickly)
    assert done.status == 0, done.output
    assert "train 1,000,000 (22." in done.output
    assert "check: 1,954 steps of 1,024 rows" in done.output
    assert everything(tmp_path) == {}


def has_next_to_nothing() -> None:
    session.rank_memory_bytes = lambda topology: 600_000


def test_it_refuses_what_the_run_would(tmp_path):
    flags = write_log(tmp_path, 700)
    (tmp_path / "schema.yaml").write_text(SCHEMA.replace("[age]", "[aged]"))
    before = everything(tmp_path)
    checked = run_script("train.py", *flags, "--check")
    assert checked.status == 1
    assert "'aged'" in checked.output
    assert everything(tmp_path) == before
    assert run_script("train.py", *flags) == checked, "the error of the run"
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    too_large = run_script("train.py", *flags, "--check", patch=has_next_to_nothing)
    assert too_large.status == 1
    assert "memory: a rank is expected to need at most" in too_large.output
    assert too_large.output.splitlines()[-1].startswith("error: check did not build the model")


def test_it_is_no_argument_of_a_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("check: true\n")
    done = run_script("train.py", f"--config={tmp_path / 'recipe.yaml'}")
    assert done.status == 1
    assert "recipe.yaml: unknown argument 'check'" in done.output
