"""What preparing a log costs: CPU time per row and peak memory, beside a plain polars pipeline; and large vocabularies.

    python tools/bench/preparation.py
    python tools/bench/preparation.py --rows 1000000 --workers 1 2 --rounds 1
    python tools/bench/preparation.py --keys 50000000

The log is generated in Criteo's format, with the hash. polars scans it, hashes, and writes Parquet, all in one thread;
it checks neither labels nor ids. With --keys, one feature has so many different keys and half as many repetitions. Each
measurement has a process of its own, and those of a round take turns.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools

import argparse
import gzip
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import numpy as np
import polars as pl

from dhen.data.formats.criteo import CATEGORIES, INTEGERS
from dhen.data.preparation.encoding.key_counts import KeyCounts
from dhen.data.preparation.encoding.vocabulary import KeyIds, build_vocabulary, save_key_ids
from dhen.data.preparation.preprocessing import prepare
from dhen.data.preparation.running.runners import LocalProcesses
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import LABEL
from dhen.data.synthetic import generate_click_log
from tools.markdown import head, row

HASH_SIZE = 100_000
KEYS_AT_ONCE = 65_536


def by_project(log: Path, folder: Path, workers: int) -> None:
    """Prepare a log."""
    settings = PreparationSettings(str(log), dataset_format="criteo", hash_size=HASH_SIZE)
    prepare(settings, folder / "prepared", runner=LocalProcesses(workers), progress=lambda _: None)
    shutil.rmtree(folder / "prepared")


def by_polars(log: Path, folder: Path) -> None:
    """The same columns by a pipeline of polars."""
    kinds = dict.fromkeys((LABEL, *INTEGERS), pl.Int64) | dict.fromkeys(CATEGORIES, pl.String)
    scan = pl.scan_csv(
        log, separator="\t", has_header=False, new_columns=list(kinds), quote_char=None, schema_overrides=kinds
    )
    numbers = pl.col(INTEGERS).cast(pl.Float64)
    columns = (
        pl.col(LABEL).cast(pl.Float32),
        (numbers.sign() * numbers.abs().log1p()).fill_null(0).cast(pl.Float32),
        *(
            (pl.col(name).hash(i) % (HASH_SIZE - 1) + 1).cast(pl.Int32).fill_null(0)
            for i, name in enumerate(CATEGORIES)
        ),
    )
    path = folder / "polars.parquet"
    scan.select(columns).sink_parquet(path, compression="zstd", compression_level=1, row_group_size=32_768)
    path.unlink()


def vocabulary(num_keys: int, folder: Path) -> None:
    """Count so many keys, write their vocabulary, and look some up."""
    counts, generator = KeyCounts(folder / "runs"), np.random.default_rng(0)
    for first in range(0, num_keys, KEYS_AT_ONCE):
        new = np.arange(first, min(first + KEYS_AT_ONCE, num_keys))
        keys = np.concatenate([new, generator.integers(0, num_keys, len(new) // 2)])
        counts.add(_texts(keys))
    counts.save()
    rows = build_vocabulary(sorted((folder / "runs").iterdir()), folder, "key", min_count=1)
    save_key_ids(folder, "key")
    ids = KeyIds.load(folder, "key").ids(_texts(generator.integers(0, num_keys, KEYS_AT_ONCE)))
    assert rows == num_keys + 1
    assert 0 < ids.min() <= ids.max() <= num_keys


def _texts(numbers: np.ndarray) -> object:
    return (pl.Series(numbers).cast(pl.String) + "-key").to_arrow(compat_level=pl.CompatLevel.oldest()).cast("string")


def measure(work: Callable[[Path], None], parent: Path) -> tuple[float, float, float]:
    """Run the work in a new process, with a folder of its own in `parent`.

    Returns CPU seconds, the peak MiB of the largest process, and how much of that was there before the work.
    """
    os.environ["POLARS_MAX_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (work, parent))


def _measured(work: Callable[[Path], None], parent: Path) -> tuple[float, float, float]:
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        work(Path(folder))
    workers, own = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
    seconds = time.process_time() - start + workers.ru_utime + workers.ru_stime
    return seconds, max(own.ru_maxrss, workers.ru_maxrss) / 1024, before / 1024


def _write_log(rows: int, parent: Path) -> Path:
    log = parent / f"{rows}.tsv"
    generate_click_log(parent / f"{rows}", {"train": rows})
    with gzip.open(parent / f"{rows}/train.tsv.gz") as packed, log.open("wb") as file:
        shutil.copyfileobj(packed, file)
    return log


def parse_arguments() -> Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", nargs="+", type=int, default=[300_000, 1_000_000, 4_000_000], help="sizes of the log")
    add("--workers", nargs="+", type=int, default=[1, 4], help="numbers of processes")
    add("--rounds", type=int, default=3, help="measurements of each (default: %(default)s)")
    add("--keys", type=int, help="measure a vocabulary of so many keys instead")
    add("--folder", type=Path, help="for temporary files (default: that of the system)")
    return parser.parse_args()


def measure_rows(arguments: Namespace, parent: Path) -> None:
    """Print a table over rows and workers."""
    print("\n".join(head(["rows", "by", "CPU µs per row", "of polars's", "peak MiB of a process"])))
    for rows in arguments.rows:
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process inherits the peak of its parent
            log = pool.apply(_write_log, (rows, parent))
        works = {"polars": partial(by_polars, log)}
        works |= {f"{count} workers": partial(by_project, log, workers=count) for count in arguments.workers}
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in works}
        for _ in range(arguments.rounds):
            for name, work in works.items():
                found[name].append(measure(work, parent))
        base = statistics.median(seconds for seconds, *_ in found["polars"])
        for name, each in found.items():
            times = sorted(seconds for seconds, *_ in each)
            share = f"{statistics.median(times) / base:.2f} ({times[0] / base:.2f}-{times[-1] / base:.2f})"
            cells = (f"{rows:,}", name, f"{statistics.median(times) / rows * 1e6:.2f}", share)
            print(row([*cells, f"{max(peak for _, peak, _ in each):,.0f}"]), flush=True)


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        if arguments.keys is None:
            measure_rows(arguments, Path(name))
            return
        seconds, peak, before = measure(partial(vocabulary, arguments.keys), Path(name))
        per_key = f"{seconds / arguments.keys * 1e6:.2f} CPU µs per key"
        print(f"{arguments.keys:,} keys: {per_key}, peak {peak:,.0f} MiB ({before:,.0f} of them imports)")


if __name__ == "__main__":
    main()
