"""Deltas: what a fine-tuned model changed of the model that it started from. Base and delta make the full export.

delta/ holds the small files of the exported model that differ from the base's (vocabularies, say), the dense weights,
and the rows of the tables that changed, in delta.safetensors: `<table>/rows` (int64) and `<table>/values`. Rows that
training never used hold the mean of their table, which every step changes, so it is there once: `<table>/unused`.
delta.json has digests of the base, the result and the delta, so that nothing else than the full export is ever made.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from dhen.data.format_version import VERSION_KEY, check_format_version
from dhen.data.schema import Schema
from dhen.paths import copy_file, drafted, write_atomically
from dhen.tables.storage import InPieces, rows_at_once, write_in_pieces
from dhen.training.saved.checkpoint_folder import size_and_digest
from dhen.training.saved.fine_tuning import StartingPoint, start_from
from dhen.training.saved.trained_model import METADATA, TrainedModel

DELTA_FOLDER, DELTA_FILE = "delta", "delta.json"
FORMAT_VERSION = 2
_TENSORS, _CARD = "delta.safetensors", "README.md"


def digest_of_model(folder: Path) -> str:
    """A digest of all files of an exported model or a delta but delta.json and the card, which people edit."""
    files = {name: size_and_digest(folder / name) for name in _files(folder) if name not in (_CARD, DELTA_FILE)}
    return xxhash.xxh3_128_hexdigest(json.dumps(files).encode())


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write_delta(base: TrainedModel, new: TrainedModel, folder: Path) -> dict[str, int]:
    """Write what `new`, which was fine-tuned from `base`, changed, to a new folder. Returns each table's changed rows.

    Keeps the changed rows in host memory.
    """
    folder.mkdir(parents=True)
    small = [name for name in _files(new.folder) if not name.endswith(".safetensors")]
    same = [name for name in small if _are_equal(base.folder / name, new.folder / name)]
    for name in set(small).difference(same):
        copy_file(new.folder / name, folder / name)
    start, tensors, changed = start_from(base, new.folder, new.schema), new.dense_weights(), {}
    for match in start.tables:
        of_table = _changes(start, new, match.table)
        tensors |= {f"{match.table}/{what}": tensor for what, tensor in of_table.items()}
        changed[match.table] = len(of_table["rows"])
    save_file(tensors, folder / _TENSORS)
    facts = {VERSION_KEY: FORMAT_VERSION, "base": digest_of_model(base.folder), "result": digest_of_model(new.folder)}
    facts |= {"from_base": same, "uses": {name: path.name for name, path in new.uses_files.items()}}
    facts |= {"delta": digest_of_model(folder)}
    write_atomically(folder / DELTA_FILE, json.dumps(facts, indent=2) + "\n")
    return changed


def _are_equal(one: Path, other: Path) -> bool:
    return one.is_file() and size_and_digest(one) == size_and_digest(other)


def read_delta(folder: Path) -> dict[str, Any]:
    """The contents of delta.json. Raises FileNotFoundError, or ValueError for another format or a damaged file."""
    path = folder / DELTA_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Use a folder that train.py wrote with --write_delta true.")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Copy the delta again.") from error
    check_format_version(path, facts, FORMAT_VERSION, "write it again")
    if facts["delta"] != digest_of_model(folder):
        raise ValueError(f"{folder} is damaged: its files are not as they were written. Copy it again.")
    return facts


def apply_deltas(base: TrainedModel, deltas: Sequence[Path], output: Path) -> None:
    """Write the model that the last of the deltas was made of to `output`, which appears only when it is complete.

    Raises ValueError if one was made from another model than `base` with those before it, or is damaged.
    """
    facts = [read_delta(delta) for delta in deltas]
    digest, before = digest_of_model(base.folder), base.folder
    for delta, of_delta in zip(deltas, facts, strict=True):
        if of_delta["base"] != digest:
            raise ValueError(
                f"{delta} was not made from the model of {before}: it needs digest {of_delta['base']}, not {digest}. "
                "Use the base that its run started from, and name all deltas since, in the order of their runs."
            )
        digest, before = of_delta["result"], delta
    with drafted(output) as draft:
        for number, (delta, of_delta) in enumerate(zip(deltas, facts, strict=True)):
            model = draft.with_name(str(number))
            _apply(base, delta, of_delta, model)
            if number:
                shutil.rmtree(base.folder)
            base = TrainedModel(model)
        model.replace(draft)


def _apply(base: TrainedModel, delta: Path, facts: Mapping[str, Any], draft: Path) -> None:
    small = {name: delta / name for name in _files(delta) if name not in (DELTA_FILE, _TENSORS)}
    for name, path in (small | {name: base.folder / name for name in facts["from_base"]}).items():
        copy_file(path, draft / name)
    start = start_from(base, draft, Schema.load(draft))
    changes = load_file(delta / _TENSORS)
    of_files: dict[str, dict[str, InPieces]] = {}
    for name, file in TrainedModel(draft).weight_map.items():
        tensor = InPieces.of(changes[name]) if name in changes else _whole(start, _table_of(name), changes)
        of_files.setdefault(file, {})[name] = tensor
    for name, file in facts["uses"].items():
        of_files.setdefault(file, {})[name] = InPieces.of(_whole_uses(start, name, changes))
    for file, tensors in of_files.items():
        write_in_pieces(draft / file, tensors, {} if file in facts["uses"].values() else METADATA)
    if digest_of_model(draft) != facts["result"]:
        raise ValueError(f"{delta} does not give the model that it was made of. Use the code that wrote it.")


def _table_of(tensor: str) -> str:
    """The table that a tensor of an exported model is."""
    return tensor.removeprefix("tables.").removesuffix(".weight")


def _changes(start: StartingPoint, new: TrainedModel, name: str) -> dict[str, Tensor]:
    """What differs in a table from what base and unused row let one guess: by "rows", "values" and the like."""
    old, uses, like = _old_rows(start, name), new.uses(name), new.table(name, slice(0))
    used_otherwise = _differing(uses, _from_base(start, name, old, uses[:0]))
    unused = (uses == 0).nonzero()[:1, 0].tolist()
    unused = new.table(name, slice(unused[0], unused[0] + 1)) if unused else like
    rows, values = [], []
    for part in _parts(len(old), like):
        found = new.table(name, part)
        differs = _differing(found, _guess(start, name, old[part], uses[part], unused))
        rows.append(part.start + differs)
        values.append(found[differs])
    of_uses = {"uses/rows": used_otherwise, "uses/values": uses[used_otherwise]}
    return of_uses | {"rows": torch.cat(rows), "values": torch.cat(values), "unused": unused}


def _whole(start: StartingPoint, name: str, changes: Mapping[str, Tensor]) -> InPieces:
    """A table of the full export, made piece by piece."""
    old, uses = _old_rows(start, name), _whole_uses(start, name, changes)
    rows, values, unused = (changes[f"{name}/{what}"] for what in ("rows", "values", "unused"))

    def pieces() -> Iterator[Tensor]:
        for part in _parts(len(old), values):
            piece = _guess(start, name, old[part], uses[part], unused)
            here = (rows >= part.start) & (rows < part.stop)
            piece[rows[here] - part.start] = values[here]
            yield piece

    return InPieces(values.dtype, (len(old), *values.shape[1:]), pieces())


def _whole_uses(start: StartingPoint, name: str, changes: Mapping[str, Tensor]) -> Tensor:
    rows, values = (changes[f"{name}/uses/{what}"] for what in ("rows", "values"))
    uses = _from_base(start, name, _old_rows(start, name), values)
    uses[rows] = values
    return uses


def _guess(start: StartingPoint, name: str, old: Tensor, uses: Tensor, unused: Tensor) -> Tensor:
    """Rows of a table as they are if training changed none of them, given those that it never used."""
    rows = _from_base(start, name, old, unused)
    if len(unused):
        rows[uses == 0] = unused
    return rows


def _from_base(start: StartingPoint, name: str, old: Tensor, like: Tensor) -> Tensor:
    """The rows `old` of the base's table or, if `like` has one dimension, how often they were used; 0 for new ones."""
    rows, is_known = like.new_zeros(len(old), *like.shape[1:]), old >= 0
    if is_known.any():
        first, read = int(old[is_known].min()), start.trained.uses if like.dim() == 1 else start.trained.table
        found = read(name, slice(first, int(old[is_known].max()) + 1))
        rows[is_known] = found[old[is_known] - first].to(rows)
    return rows


def _old_rows(start: StartingPoint, name: str) -> Tensor:
    """For each row of a table, its row in the base; -1 for a new one."""
    old = torch.full((next(match.rows for match in start.tables if match.table == name),), -1)
    for was, now in start.kept_rows(name):
        old[now] = was
    return old


def _parts(rows: int, like: Tensor) -> Iterator[slice]:
    step = rows_at_once(like.shape, like.itemsize)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _differing(one: Tensor, other: Tensor) -> Tensor:
    """The numbers of the rows that differ in a bit."""
    bits, others = (tensor.contiguous().view(torch.uint8).reshape(len(tensor), -1) for tensor in (one, other))
    return (bits != others).any(1).nonzero()[:, 0]
