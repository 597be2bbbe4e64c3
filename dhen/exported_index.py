"""The index of an exported model: which file has which weight, and the version of their format."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dhen.data.format_version import check_format_version

INDEX_FILE = "model.safetensors.index.json"
FORMAT_VERSION = 2
"""Version of the exported model. Raise it when models that were exported before can no longer be read as they are. That
of a model with gates is one more: their weights had another meaning.
"""
COPY_AGAIN = "Copy or export the model again."
_OF_GATES = re.compile(r"layers\.\d+\.gate\.")


def version_of(weights: Iterable[str]) -> int:
    """The version of an exported model with weights of these names."""
    return FORMAT_VERSION + any(_OF_GATES.search(name) is not None for name in weights)


def read_index(folder: Path) -> dict[str, Any]:
    """The contents of the index in `folder`. Opens the files of weights that it names.

    Raises ValueError or FileNotFoundError naming the file, if one is missing, damaged or of another format.
    """
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version, files = version_of(index["weight_map"]), set(index["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}. {COPY_AGAIN}") from error
    check_format_version(path, index.get("metadata", {}), version, "train the model again")
    for name in sorted(files):
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder / name}: no such file, but {INDEX_FILE} names it. {COPY_AGAIN}"
            ) from error
        except SafetensorError as error:
            raise ValueError(f"{folder / name}: damaged: {error}. {COPY_AGAIN}") from error
    return index
