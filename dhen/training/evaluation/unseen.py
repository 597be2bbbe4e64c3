"""Values that training never saw: how many of them an evaluation met, by feature.

With a vocabulary, such a value is not a key, or it is one that no training step used. With hashed ids, it is a value
whose row no training step used. Two values may share a row, so some unseen values are not recognized there, and the
count is a lower bound.
"""

import csv
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dhen.data.loading.batches import BatchLoader
from dhen.data.schema import Schema
from dhen.training.parallel_model import ScoringDhen

UNSEEN_FILE = "unseen.csv"
MANY = 0.5
_LINE = 6

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnseenValues:
    """The values of one feature in one split. values: all, with blanks. unseen: those that training never saw."""

    values: int
    unseen: int

    @property
    def share(self) -> float:
        """unseen / values; 0 without values."""
        return self.unseen / max(self.values, 1)


def unseen_values(model: ScoringDhen, loader: BatchLoader) -> dict[str, UnseenValues]:
    """The unseen values of the loader's split, which the model has just scored. Communicates; all ranks call it."""
    ids, unknown_keys = model.unseen_ids(), loader.schema.splits[loader.split].unknown_keys
    found = {}
    for column in loader.schema.sparse:
        values, unused, unused_zeros = ids[column.name]
        if column.encoding == "vocabulary":
            # Unknown keys have id 0. If training never used row 0, they are among its unused ids, with the blanks.
            unused += max(unknown_keys[column.name] - unused_zeros, 0)
        found[column.name] = UnseenValues(values, unused)
    return found


def report_unseen(split: str, unseen: Mapping[str, UnseenValues], schema: Schema) -> None:
    """Log the shares, the largest first, and warn of features with more than half."""
    shares = sorted(((values.share, name) for name, values in unseen.items()), reverse=True)
    shown = [f"{name} {share:.1%}" for share, name in shares[:_LINE] if share]
    more = sum(share > 0 for share, _ in shares[_LINE:])
    if shown:
        is_hashed = any(column.encoding == "hash" for column in schema.sparse)
        logger.info(
            "%s: values that training never saw: %s%s%s",
            split,
            ", ".join(shown),
            f", and {more} more features" if more else "",
            " (at least: hashed values may share a row)" if is_hashed else "",
        )
    if many := [f"{name} ({share:.1%})" for share, name in shares if share > MANY]:
        logger.warning(
            "%s: training never saw more than half of the values of %s, so the model knows little about them. Check "
            "that these rows are written like the training rows (case, units, column order), or train on newer rows.",
            split,
            ", ".join(many),
        )


def write_unseen(path: Path, by_split: Mapping[str, Mapping[str, UnseenValues]]) -> None:
    """Write one row per split and feature: split, feature, values, unseen, share."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "feature", "values", "unseen", "share"])
        for split, unseen in by_split.items():
            writer.writerows([split, name, v.values, v.unseen, f"{v.share:.6f}"] for name, v in unseen.items())
