"""Rows for fine-tuning: an earlier part that a model is trained on, and a later part with what changed since.

Files of a data set: earlier_train.csv, earlier_validation.csv, later_train_1.csv, _10 and _100 (percent of the later
training rows, drawn once), later_validation.csv, later_test.csv. In the later part one column is blank, because its
feature is gone, and the schema names another that the earlier model did not have. Later rows have unseen ids.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from dhen.data.synthetic import PLANTED, QUICKSTART, ClickModel, Rows
from dhen.model.names import check_names
from tools.experiments import ROOT, ROWS_VERSION
from tools.histories import write_histories

SHARES = (1, 10, 100)
_DATA = ROOT.parent / "shared/data"
_EARLIER, _LATER = (0.9, 0.1), (0.7, 0.1, 0.2)
"""Shares of train and validation, and of train, validation and test: in this order in time."""
_PLANTED_ROWS, _DRIFT, _DAY_ROWS = 300_000, 0.2, 50_000
"""Rows of each part; the other factors' share of the variance later; rows of each of 20 days."""


def write_later_rows(data: str, folder: Path) -> None:
    """Write the files of a data set, unless they are there; of histories and in_time_order, their own ones. Raises
    ValueError for an unknown one, and FileNotFoundError without its source.
    """
    check_names("data set in rows", [data], [*SOURCES, *OTHERS])
    version = folder / f"version_{ROWS_VERSION}"
    if version.is_file():
        return
    if data in OTHERS:
        OTHERS[data](folder)
    else:
        _write_earlier_and_later(folder, *SOURCES[data]())
    version.touch()


def _write_earlier_and_later(folder: Path, earlier: pl.DataFrame, later: pl.DataFrame, gone: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    later = later.with_columns(pl.lit(None).alias(gone)).select(earlier.columns)
    for frame, name in zip(_cut(earlier, _EARLIER), ("train", "validation"), strict=True):
        frame.write_csv(folder / f"earlier_{name}.csv")
    train, validation, test = _cut(later, _LATER)
    drawn = _shuffled(train, 0)
    for share in SHARES:
        drawn.head(max(1, len(drawn) * share // 100)).write_csv(folder / f"later_train_{share}.csv")
    validation.write_csv(folder / "later_validation.csv")
    test.write_csv(folder / "later_test.csv")


def _cut(frame: pl.DataFrame, shares: tuple[float, ...]) -> list[pl.DataFrame]:
    ends = [0, *(round(len(frame) * end) for end in np.cumsum(shares))]
    return [frame[first:last] for first, last in itertools.pairwise(ends)]


def _flights() -> tuple[pl.DataFrame, pl.DataFrame, str]:
    """Departures until June, and after."""
    parts = [pl.read_csv(_DATA / "flights" / f"{split}.csv.gz") for split in ("train", "valid", "test")]
    whole = pl.concat(parts).sort("month", "day", "sched_dep_time", "flight", "origin")
    is_earlier = whole["month"] <= 6
    return whole.filter(is_earlier), whole.filter(~is_earlier), "tailnum"


def _flights_mixed() -> tuple[pl.DataFrame, pl.DataFrame, str]:
    """The same, but the later rows are in an order drawn once: their splits have the same months."""
    earlier, later, gone = _flights()
    return earlier, _shuffled(later, 1), gone


def _criteo() -> tuple[pl.DataFrame, pl.DataFrame, str]:
    """The first half of the sample in time order, and the second."""
    names = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
    file = _DATA / "criteo/kaggle_first_10000.txt.gz"
    whole = pl.read_csv(file, separator="\t", has_header=False, new_columns=names, infer_schema=False)
    return whole[: len(whole) // 2], whole[len(whole) // 2 :], "C17"


def _planted() -> tuple[pl.DataFrame, pl.DataFrame, str]:
    """The generated log. Later, other factors have a share of the variance, and C2 has a value that was not there."""
    model, other = ClickModel(0, PLANTED), ClickModel(1, PLANTED)
    earlier, later = (model.draw(_PLANTED_ROWS, 9, part) for part in range(2))
    labels = _drifted_labels(later, other, _DRIFT, np.random.default_rng(0))
    is_known = earlier.categories[:, 1] < PLANTED.cardinalities[1] - 1  # C2, which interacts with others
    known = _frame(earlier.labels, earlier.integers, earlier.categories).filter(is_known)
    return known, _frame(labels, later.integers, later.categories), "C3"


def _drifted_labels(
    rows: Rows, other: ClickModel, share: float, rng: np.random.Generator, *, keeps_rate: bool = False
) -> np.ndarray:
    """Labels of rows of one model. share: of the variance that comes from the factors of `other`."""
    z = [np.log(p / (1 - p)) for p in (rows.probabilities, other.probabilities_of(rows.integers, rows.categories))]
    of_rate = (1 - (1 - share) ** 0.5) * z[0].mean() if keeps_rate else 0.0
    drifted = 1 / (1 + np.exp(-((1 - share) ** 0.5 * z[0] + share**0.5 * (z[1] - z[1].mean()) + of_rate)))
    return (rng.random(len(drifted)) < drifted).astype(np.int8)


def write_days(folder: Path, days: int, rows: int) -> list[Path]:
    """Write day_01.csv and so on, unless they are there: a generated log whose factors turn, from one model's on the
    first day to another's on the last. Half of the values of C23 to C26 are there at first; the others come day by day.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"day_{day + 1:02d}.csv" for day in range(days)]
    model, other = ClickModel(0, QUICKSTART), ClickModel(1, QUICKSTART)
    most = np.array(QUICKSTART.cardinalities[22:])
    for day, path in enumerate(paths):
        if path.is_file():
            continue
        passed = day / max(1, days - 1)
        drawn, rng = model.draw(3 * rows, 10, day), np.random.default_rng(day)
        labels = _drifted_labels(drawn, other, np.sin(passed * np.pi / 2) ** 2, rng, keeps_rate=True)
        is_there = (drawn.categories[:, 22:] < most * (1 + passed) / 2).all(1)
        draft = path.with_suffix(".draft")
        _frame(labels, drawn.integers, drawn.categories).filter(is_there).head(rows).write_csv(draft)
        draft.replace(path)
    return paths


def _frame(labels: np.ndarray, integers: np.ndarray, categories: np.ndarray) -> pl.DataFrame:
    columns = {"label": labels} | {f"I{i + 1}": integers[:, i] for i in range(integers.shape[1])}
    columns |= {f"C{f + 1}": categories[:, f] for f in range(categories.shape[1])}
    return pl.DataFrame(columns).with_columns(
        pl.col("^I.*$").fill_nan(None).cast(pl.Int64), pl.col("^C.*$").replace(-1, None)
    )


def _write_in_time_order(folder: Path) -> None:
    """train_in_order.csv, 20 days of a log that drifts, one after the other; train_shuffled.csv, the same rows in an
    order drawn once; validation.csv and test.csv, from all days.
    """
    days = enumerate(write_days(folder / "days", 20, _DAY_ROWS))
    parts = [_cut(_shuffled(pl.read_csv(path, infer_schema=False), day), (0.8, 0.1, 0.1)) for day, path in days]
    train, validation, test = (pl.concat(of_days) for of_days in zip(*parts, strict=True))
    frames = {"train_in_order": train, "train_shuffled": _shuffled(train, 20), "validation": validation, "test": test}
    for name, frame in frames.items():
        frame.write_csv(folder / f"{name}.csv")


def _shuffled(frame: pl.DataFrame, seed: int) -> pl.DataFrame:
    return frame.sample(fraction=1.0, shuffle=True, seed=seed)


SOURCES: dict[str, Callable[[], tuple[pl.DataFrame, pl.DataFrame, str]]] = {
    "criteo": _criteo, "flights": _flights, "flights_mixed": _flights_mixed, "planted": _planted,
}  # fmt: skip
"""Earlier rows, later rows, and the column of the feature that is gone."""
OTHERS = {"histories": write_histories, "in_time_order": _write_in_time_order}
