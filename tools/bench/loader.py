"""What loading costs one rank: CPU time per row that it trains on, and memory, over the number of ranks.

    python tools/bench/loader.py
    python tools/bench/loader.py --ranks 1 16 --parts 4

The data has Criteo's columns: 13 dense and 26 sparse. One file is written and linked as many parts. Each rank trains on
2,048 rows per step. A measurement is a whole epoch of one rank, in a process of its own; --rounds take turns.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import contextlib
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from argparse import Namespace

import numpy as np
import pyarrow as pa

from dhen.data.loading.batches import BatchLoader
from dhen.data.preparation.writing import ROW_GROUP_ROWS, ROW_GROUPS_PER_PART, SplitWriter
from dhen.data.schema import LABEL, DenseColumn, Schema, SparseColumn, SplitCounts
from tools.bench.launch import argument_parser
from tools.markdown import head, row

BATCH, KEYS = 2048, 100_000
PART_ROWS = ROW_GROUP_ROWS * ROW_GROUPS_PER_PART
DENSE = tuple(DenseColumn(f"I{index}") for index in range(13))
SPARSE = tuple(SparseColumn(f"C{index}", KEYS) for index in range(26))


def write(folder: Path, parts: int) -> None:
    """A prepared folder of `parts` times PART_ROWS rows."""
    writer, generator = SplitWriter(folder / "train"), np.random.default_rng(0)
    for _ in range(ROW_GROUPS_PER_PART):
        columns = {LABEL: (generator.random(ROW_GROUP_ROWS) < 0.25).astype(np.float32)}
        for dense in DENSE:
            columns[dense.name] = np.log1p(generator.integers(0, 1000, ROW_GROUP_ROWS)).astype(np.float32)
        for sparse in SPARSE:
            columns[sparse.name] = np.minimum(generator.zipf(1.3, ROW_GROUP_ROWS), KEYS - 1).astype(np.int32)
        writer.write(pa.table(columns))
    writer.close()
    (first,) = (folder / "train").iterdir()
    for part in range(1, parts):
        os.link(first, first.with_name(f"part-{part:05d}.parquet"))
    Schema(DENSE, SPARSE, {"train": SplitCounts(PART_ROWS * parts, writer.clicks * parts)}).save(folder)


def measure(folder: Path, ranks: int) -> tuple[int, float, float]:
    """Lanes, CPU microseconds per row of the rank in the middle, and the MiB by which its peak memory grew."""
    options = {"batch_size": BATCH, "world_size": ranks, "rank": ranks // 2, "shuffle": True}
    loader = BatchLoader(folder, "train", **options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.closing(loader.epoch(1)) as warm_up:
        next(warm_up)
    start = time.process_time()
    rows = sum(len(batch.labels_B) for batch in loader.epoch(0))
    seconds = time.process_time() - start
    return loader.lanes, seconds / rows * 1e6, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def parse_arguments() -> Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 16, 64, 256], help="numbers of ranks")
    parser.add_argument("--parts", type=int, default=16, help=f"files of {PART_ROWS:,} rows (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Measure and print a table."""
    arguments = parse_arguments()
    results = {ranks: [] for ranks in arguments.ranks}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, arguments.parts)
        for _ in range(arguments.rounds):
            for ranks in arguments.ranks:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    results[ranks].append(pool.apply(measure, (folder, ranks)))
    print(f"{PART_ROWS * arguments.parts:,} rows; medians of {arguments.rounds} rounds, and the range\n")
    print("\n".join(head(["ranks", "lanes", "CPU per row, of the first line's", "MiB"])))
    base = statistics.median(each[1] for each in results[arguments.ranks[0]])
    for ranks, measured in results.items():
        times = sorted(each[1] / base for each in measured)
        text = f"{statistics.median(times):.2f} ({times[0]:.2f}-{times[-1]:.2f})"
        print(row([str(ranks), str(measured[0][0]), text, f"{max(each[2] for each in measured):,.0f}"]))


if __name__ == "__main__":
    main()
