"""Data prepared in pieces, by any number of processes and machines, is the same as prepared at once."""

import gzip
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import polars as pl
import pytest

from dhen.data.formats.raw_rows import DataError
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.reading import pieces as cutting
from dhen.data.preparation.reading.pieces import Piece
from dhen.data.preparation.running import runners, unfinished
from dhen.data.preparation.running.runners import TRIES, DaskCluster, LocalProcesses, nobody
from dhen.data.preparation.running.unfinished import Shard
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import Schema
from tests.data.preparation import reference_preparation as reference

SCHEMA = """
label: click
dense:
  - price
  - {name: age, transform: identity, scale: standard, missing_indicator: true}
sparse:
  - user
  - {name: age_bin, column: age, bins: 7}
  - {name: item, encoding: vocabulary, min_count: 2}
"""
COLUMNS = ["click", "price", "age", "user", "item"]


def rows_of(seed: int, count: int) -> list[list[str]]:
    draw = random.Random(seed)
    return [
        [
            str(draw.randint(0, 1)),
            f"{draw.uniform(0, 100):.2f}",
            draw.choice(["", str(draw.randint(1, 90))]),
            f"u{draw.randint(0, 300)}",
            f"i{int(draw.paretovariate(1))}",
        ]
        for _ in range(count)
    ]


def write_csv(path: Path, rows: list[list[str]]) -> str:
    text = "\n".join(map(",".join, [COLUMNS, *rows])).encode()  # the last line has no line break
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


@pytest.fixture
def data(tmp_path) -> PreparationSettings:
    """Three files of 2,000, 30 and 700 rows."""
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    files = [write_csv(tmp_path / f"{i}.csv", rows_of(i, count)) for i, count in enumerate((2000, 30, 700))]
    return PreparationSettings(tuple(files), dataset_schema=tmp_path / "schema.yaml")


def contents(folder: Path) -> dict[str, object]:
    """All that a prepared folder says, without what may depend on the pieces: digests and the last bits of scales."""
    schema = Schema.load(folder)
    rows = {
        split: pl.read_parquet(sorted((folder / split).glob("*.parquet"))).with_columns(pl.col(pl.Float32).round(5))
        for split in schema.splits
    }
    return {
        "rows": {split: frame.to_dicts() for split, frame in rows.items()},
        "keys": {path.name: pl.read_parquet(path).to_dicts() for path in sorted(folder.glob("vocabulary/*"))},
        "bad": (folder / "bad_rows.csv").read_text() if (folder / "bad_rows.csv").exists() else "",
        "counts": {split: replace(count, digest="") for split, count in schema.splits.items()},
        "sparse": schema.sparse,
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


HERE = LocalProcesses(1)


class Counting(LocalProcesses):
    """Notes how many pieces each stage has to do."""

    def __init__(self, workers: int = 1) -> None:
        super().__init__(workers)
        self.pieces: list[int] = []

    def __call__(self, task, pieces, report):
        self.pieces.append(len(pieces))
        super().__call__(task, pieces, report)


def check_pieces(monkeypatch, folder: Path, settings: PreparationSettings, sizes: dict[int, int]) -> None:
    """Prepare the data at once, and in pieces of so many bytes, of which so many are expected."""
    prepare(settings, folder / "whole", runner=HERE)
    whole = contents(folder / "whole")
    for size, count in sizes.items():
        monkeypatch.setattr(cutting, "PIECE_BYTES", size)
        runner = Counting()
        prepare(settings, folder / f"{size}", runner=runner)
        assert runner.pieces[-1] == count
        assert contents(folder / f"{size}") == whole


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_text_in_pieces(tmp_path, monkeypatch, data, order):
    check_pieces(monkeypatch, tmp_path, replace(data, split_order=order), {3_000: 15, 9_000: 4, 20_000: 2})


def test_files_per_split(tmp_path, monkeypatch, data):
    files = {"train_file": data.dataset_name[:2], "test_file": data.dataset_name[2:]}
    check_pieces(monkeypatch, tmp_path, replace(data, dataset_name=None, **files), {3_000: 16})


def test_gzip_and_quotes_are_not_cut(tmp_path, monkeypatch, data):
    zipped = write_csv(tmp_path / "a.csv.gz", rows_of(5, 900))
    quoted = write_csv(tmp_path / "b.csv", [*rows_of(6, 500), ["1", "2", "3", '"a\nb"', "c"], *rows_of(7, 400)])
    # The gzip makes a piece with what is before it, if that is small.
    check_pieces(monkeypatch, tmp_path, replace(data, dataset_name=(zipped, quoted)), {3_000: 2})


def test_many_small_files_share_a_piece(tmp_path, monkeypatch, data):
    files = tuple(write_csv(tmp_path / f"part-{i:02d}.csv", rows_of(i, 20)) for i in range(40))
    size = sum(os.path.getsize(file) for file in files)
    check_pieces(monkeypatch, tmp_path, replace(data, dataset_name=files), {size // 4: 4})


def test_rows_to_predict_keep_their_line_numbers(tmp_path, monkeypatch, data):
    monkeypatch.setattr(cutting, "PIECE_BYTES", 3_000)
    prepare(data, tmp_path / "trained", runner=HERE)
    wanted = PreparationSettings(
        test_file=data.dataset_name,
        dataset_schema=data.dataset_schema,
        schema_from=tmp_path / "trained",
        is_label_required=False,
    )
    prepare(wanted, tmp_path / "out", runner=HERE)
    rows = pl.read_parquet(sorted((tmp_path / "out/test").glob("*.parquet")))
    expected = [
        (file, row)
        for file, count in zip(data.dataset_name, (2000, 30, 700), strict=True)
        for row in range(2, count + 2)
    ]
    assert rows.select(":file", ":row").rows() == expected


def test_criteo_with_bad_rows(tmp_path, monkeypatch):
    lines = reference.criteo_lines(1000)
    for i in (0, 17, 500, 998):
        lines[i] = "9" + lines[i][1:]
    lines[300] = ""
    (tmp_path / "raw.txt").write_text("\n".join(lines))
    settings = PreparationSettings(str(tmp_path / "raw.txt"), dataset_format="criteo", bad_rows="skip")
    check_pieces(monkeypatch, tmp_path, settings, {10_000: (tmp_path / "raw.txt").stat().st_size // 10_000})


def test_libsvm(tmp_path, monkeypatch):
    draw = random.Random(0)
    lines = [f"{draw.randint(0, 1)} {draw.randint(1, 9)}:1 {draw.randint(1, 500)}:1" for _ in range(2000)]
    (tmp_path / "raw.libsvm").write_text("\r\n".join(lines) + "\r\n")
    settings = PreparationSettings(str(tmp_path / "raw.libsvm"))
    check_pieces(monkeypatch, tmp_path, settings, {1_000: (tmp_path / "raw.libsvm").stat().st_size // 1_000})


def test_parquet(tmp_path, monkeypatch, data):
    rows = rows_of(3, 3000)
    frame = pl.DataFrame(rows, schema=COLUMNS, orient="row").with_columns(
        pl.col("click").cast(pl.Int8), pl.col("price").cast(pl.Float64), pl.col("age").cast(pl.Float64, strict=False)
    )
    frame.write_parquet(tmp_path / "raw.parquet", row_group_size=100)
    settings = replace(data, dataset_name=str(tmp_path / "raw.parquet"))
    check_pieces(monkeypatch, tmp_path, settings, {1: 30})


def test_processes_write_the_same_files(tmp_path, monkeypatch, data):
    monkeypatch.setattr(cutting, "PIECE_BYTES", 8_000)
    states = []
    prepare(data, tmp_path / "alone", runner=HERE)
    prepare(data, tmp_path / "together", runner=LocalProcesses(3), progress=states.append)
    assert files_of(tmp_path / "together") == files_of(tmp_path / "alone")
    last = [state for state in states if state.is_done]
    assert [state.stage for state in last] == ["counting rows", "counting keys", "writing"]
    assert last[-1].rows == 2730
    assert last[-1].bytes_read == last[-1].bytes_total == sum(map(os.path.getsize, data.dataset_name))


def dies_once(mark: Path, times: int, task, piece, report) -> None:
    """Kill this process in the middle of piece 2, the first times."""
    if piece.index == 2 and len(list(mark.iterdir())) < times:
        (mark / str(os.getpid())).touch()
        report(10, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    task(piece, report)


class Dying:
    """Wraps a runner whose workers die."""

    def __init__(self, runner, mark: Path, times: int) -> None:
        mark.mkdir()
        self._runner, self._mark, self._times = runner, mark, times

    def __call__(self, task, pieces, report) -> None:
        self._runner(partial(dies_once, self._mark, self._times, task), pieces, report)


def test_a_worker_that_is_killed_is_replaced(tmp_path, monkeypatch, data):
    monkeypatch.setattr(cutting, "PIECE_BYTES", 8_000)
    prepare(data, tmp_path / "alone", runner=HERE)
    states = []
    runner = Dying(LocalProcesses(2), tmp_path / "mark", TRIES - 1)
    prepare(data, tmp_path / "out", runner=runner, progress=states.append)
    assert len(list((tmp_path / "mark").iterdir())) == TRIES - 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")
    assert states[-1].rows == 2730, "rows that a killed worker reported count twice"


def test_a_worker_that_ends_between_two_pieces_is_replaced(tmp_path, monkeypatch, data):
    monkeypatch.setattr(cutting, "PIECE_BYTES", 8_000)
    done_by, killed = runners._is_done_by, []

    def kill_once(worker, task, piece, report):
        if piece.index == 3 and not killed:
            killed.append(worker)
            worker.kill()
            worker.wait()
        return done_by(worker, task, piece, report)

    monkeypatch.setattr(runners, "_is_done_by", kill_once)
    prepare(data, tmp_path / "out", runner=LocalProcesses(2))
    assert killed


def test_workers_import_nothing_from_the_current_folder(tmp_path, monkeypatch, data):
    (tmp_path / "signal.py").write_text("raise ImportError('a module of the user')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cutting, "PIECE_BYTES", 8_000)
    prepare(data, tmp_path / "out", runner=LocalProcesses(2))
    assert sum(count.rows for count in Schema.load(tmp_path / "out").splits.values()) == 2730


def test_a_piece_that_kills_every_worker_is_an_error(tmp_path, monkeypatch, data):
    monkeypatch.setattr(cutting, "PIECE_BYTES", 8_000)
    runner = Dying(LocalProcesses(2), tmp_path / "mark", 99)
    with pytest.raises(ChildProcessError, match=rf"0\.csv: {TRIES} workers ended .* Use fewer --workers"):
        prepare(data, tmp_path / "out", runner=runner)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_row_is_named_with_its_line(tmp_path, monkeypatch, data, workers):
    rows = rows_of(0, 2000)
    rows[1500][0] = rows[1900][0] = "7"
    file = write_csv(tmp_path / "bad.csv", rows)
    monkeypatch.setattr(cutting, "PIECE_BYTES", 3_000)
    wanted = replace(data, dataset_name=file)
    with pytest.raises(DataError, match=rf"{re.escape(file)}: row 1502: .*'7'.*--bad_rows skip"):
        prepare(wanted, tmp_path / "out", runner=LocalProcesses(workers))
    assert not list(tmp_path.glob(".out*")), "nothing of data that must change is kept"


def test_a_killed_preparation_goes_on_with_the_missing_pieces(tmp_path, monkeypatch, data):
    monkeypatch.setattr(cutting, "PIECE_BYTES", 3_000)
    prepare(data, tmp_path / "whole", runner=HERE)
    for kill_at in (1, 12, 25, 30):

        def stop(state, kill_at=kill_at, seen=[]):  # noqa: B006 (a counter per kill)
            seen.append(state)
            if len(seen) == kill_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(data, tmp_path / "out", progress=stop, runner=HERE)
    (left,) = tmp_path.glob(".out.unfinished-*")
    done = {path: path.stat().st_mtime_ns for path in left.glob("*/*/result.json")}
    assert len(done) > 20
    runner = Counting()
    prepare(data, tmp_path / "out", runner=runner)
    assert sum(runner.pieces) + len(done) == 14 + 15 + 15
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_pieces_of_other_files_or_settings_are_not_used(tmp_path, monkeypatch, data):
    monkeypatch.setattr(cutting, "PIECE_BYTES", 3_000)

    def stop(state):
        if state.stage == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(data, tmp_path / "out", progress=stop, runner=HERE)
    runner = Counting()
    prepare(replace(data, split_seed=1), tmp_path / "out", runner=runner)
    assert runner.pieces == [14, 15, 15]


def test_shards(tmp_path, monkeypatch, data):
    monkeypatch.setattr(cutting, "PIECE_BYTES", 3_000)
    monkeypatch.setattr(unfinished, "_POLL_SECONDS", 0.01)
    prepare(data, tmp_path / "alone", runner=HERE)
    with pytest.raises(FileNotFoundError, match=r"14 pieces are missing.*0\.csv.*leave out --merge"):
        prepare(data, tmp_path / "out", runner=nobody)
    counts = [Counting() for _ in range(3)]
    shards = [
        threading.Thread(
            target=prepare, args=(data, tmp_path / "out"), kwargs={"shard": Shard(i, 3), "runner": counts[i]}
        )
        for i in range(3)
    ]
    for thread in shards:
        thread.start()
        time.sleep(0.05)
    for thread in shards:
        thread.join()
    assert [count.pieces for count in counts] == [[5, 5, 5], [5, 5, 5], [4, 5, 5]]
    assert not (tmp_path / "out").exists()
    prepare(data, tmp_path / "out", runner=nobody)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")


def test_a_shard_that_does_not_come_is_named(tmp_path, monkeypatch, data):
    monkeypatch.setattr(cutting, "PIECE_BYTES", 3_000)
    monkeypatch.setattr(unfinished, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(unfinished, "_PATIENCE_SECONDS", 0.2)
    with pytest.raises(TimeoutError, match=r"nothing came from shard 0, 2\. Start it"):
        prepare(data, tmp_path / "out", shard=Shard(1, 3))


def test_a_shard_that_fails_stops_those_that_wait_for_it(tmp_path, monkeypatch, data):
    rows = rows_of(0, 2000)
    rows[1500][0] = "7"
    bad = write_csv(tmp_path / "bad.csv", rows)
    monkeypatch.setattr(cutting, "PIECE_BYTES", 3_000)
    monkeypatch.setattr(unfinished, "_POLL_SECONDS", 0.01)
    wanted, errors = replace(data, dataset_name=bad), {}

    def run(index: int) -> None:
        try:
            prepare(wanted, tmp_path / "out", shard=Shard(index, 2), runner=HERE)
        except ValueError as error:
            errors[index] = str(error)

    for _ in range(2):  # what a shard wrote when it failed does not stop those that start later
        shards = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in shards:
            thread.start()
        for thread in shards:
            thread.join(60)
        first, second = sorted(errors.values(), key=len)
        assert re.match(rf"{re.escape(bad)}: row 1502: .*--bad_rows skip", first)
        assert re.match(rf"shard [01] failed: {re.escape(first)} Run it, and this one, again", second)


def test_a_kill_while_the_unfinished_folder_is_removed_spoils_nothing(tmp_path, monkeypatch, data):
    monkeypatch.setattr(cutting, "PIECE_BYTES", 3_000)

    def killed(path, remove=shutil.rmtree, **options):
        if ".unfinished-" in Path(path).name:
            raise KeyboardInterrupt
        remove(path, **options)

    monkeypatch.setattr(unfinished.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, tmp_path / "out", runner=HERE)
    monkeypatch.undo()
    first = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    prepare(data, tmp_path / "out", runner=HERE)
    assert contents(tmp_path / "out") == first


def test_a_model_in_the_place_of_another_is_noticed(tmp_path, data):
    """Within one process, although a rename keeps size and time."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name, keys in (("a", "xy"), ("b", "zx")):
        rows = [["1", "1.0", "20", "u", key] for key in (*keys[:1] * 3, *keys[1:] * 2) * 20]
        train = write_csv(tmp_path / f"{name}/train.csv", rows)
        settings = PreparationSettings(train_file=train, dataset_schema=data.dataset_schema)
        prepare(settings, tmp_path / name / "model")
        for file in sorted((tmp_path / name / "model").rglob("*")):
            os.utime(file, ns=(0, 0))
    wanted = PreparationSettings(
        test_file=write_csv(tmp_path / "test.csv", [["1", "1.0", "20", "u", "x"]]),
        dataset_schema=data.dataset_schema,
        schema_from=tmp_path / "model",
    )
    found = []
    for name in "ab":
        (tmp_path / name / "model").rename(tmp_path / "model")
        prepare(wanted, tmp_path / "out")
        found += contents(tmp_path / "out")["rows"]["test"]
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "model")
    assert [row["item"] for row in found] == [1, 2]


def test_a_file_that_changes_meanwhile_is_an_error(tmp_path, data):
    def append(state):
        with open(data.dataset_name[0], "a") as file:
            file.write("\n1,2,3,u,i\n")

    with pytest.raises(DataError, match="a file has changed while it was prepared"):
        prepare(data, tmp_path / "out", runner=HERE, progress=append)


@pytest.mark.parametrize("text", ["3/3", "-1/3", "1", "a/b", "1/", "/3", "1/2/3", ""])
def test_a_wrong_shard(text):
    with pytest.raises(ValueError, match=r"--shard is .* such as 0/8"):
        Shard.parse(text)


def test_a_dask_cluster_with_a_worker_that_is_killed(tmp_path, monkeypatch, data):
    distributed = pytest.importorskip("distributed", reason="Dask is an extra: pip install 'dhen[dask]'")
    monkeypatch.setattr(cutting, "PIECE_BYTES", 8_000)
    prepare(data, tmp_path / "alone", runner=HERE)
    with distributed.LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None) as cluster:
        runner = Dying(DaskCluster(cluster.scheduler_address), tmp_path / "mark", 1)
        prepare(data, tmp_path / "out", runner=runner)
    assert len(list((tmp_path / "mark").iterdir())) == 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")


def sleeps(mark: Path, piece: Piece, report) -> None:
    (mark / str(os.getpid())).touch()
    time.sleep(600)


def test_workers_end_with_the_process_that_started_them(tmp_path):
    """Also in the middle of a piece."""
    program = (
        "import functools, os, pathlib, sys, threading, time\n"
        "from dhen.data.preparation.reading import pieces\n"
        "from dhen.data.preparation.running import runners\n"
        "from tests.data.preparation.running.test_pieces import sleeps\n"
        "mark = pathlib.Path(sys.argv[1])\n"
        "def end():\n"
        "    while len(list(mark.iterdir())) < 2: time.sleep(0.05)\n"
        "    os._exit(9)\n"
        "threading.Thread(target=end, daemon=True).start()\n"
        "some = [pieces.Piece(i, 0, ('train',), ()) for i in range(2)]\n"
        "runners.LocalProcesses(2)(functools.partial(sleeps, mark), some, print)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the workers import this file
    with open(tmp_path.with_suffix(".txt"), "w+") as output:
        command = [sys.executable, "-c", program, str(tmp_path)]
        status = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode
        output.seek(0)
        assert status == 9, output.read()
    workers = [int(mark.name) for mark in tmp_path.iterdir()]
    assert len(workers) == 2
    wait_until(lambda: not any(map(is_alive, workers)))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("still running after a minute")
