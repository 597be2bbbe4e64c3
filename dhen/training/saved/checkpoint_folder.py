"""The checkpoints of a run as folders: which there are, which is the newest, and whether their files are as saved.

trainer_state.json is written when all ranks are done: a checkpoint is complete if it has this file. It holds the size
and the digest of every other file, and a digest of itself.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import pickle
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import SafetensorError

from dhen.data.format_version import check_format_version
from dhen.paths import sync, write_atomically
from dhen.runtime.collectives import from_all, rank_zeros
from dhen.runtime.topology import Topology

FileFacts = dict[str, tuple[int, str]]
"""Name -> bytes and digest of a file of a checkpoint."""
logger = logging.getLogger(__name__)

LATEST, AUTO = "latest", "auto"
NEWEST = ("true", LATEST, AUTO)
"""The values of --resume_from_checkpoint that mean the newest checkpoint in output_dir."""
STATE_FILE = "trainer_state.json"
FORMAT_VERSION = 3
"""Version of the checkpoint. Raise it when checkpoints that were written before can no longer be resumed."""
FILES = "files"
"""The key of the state under which the facts of the other files stand."""
_OF_STATE, _NUMBER, _PREFIX, _DAMAGED = "digest", "number", "checkpoint-", "damaged-"
_THREADS = 4
_INCOMPLETE = f"not a complete checkpoint, because it has no {STATE_FILE}. Resume from another one."
_OF_DEEPSPEED = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
"""What DeepSpeed pickles beside tensors and plain values."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed. The message names the folder and says what to do."""


class DamagedStateError(CheckpointError):
    """trainer_state.json is not there or not as it was saved. The message does not name the folder."""


def choose_checkpoint(
    wanted: str | None, output_dir: Path, topology: Topology, *, sets_aside: bool = False
) -> Path | None:
    """The folder that --resume_from_checkpoint means, whose files are as they were saved; None to start anew.

    A path means this folder. "true", "latest" and "auto" mean the newest sound checkpoint in output_dir, and "auto"
    none if output_dir has none. sets_aside: rename damaged ones that it passes over, so that they do not count as
    checkpoints. Communicates; all ranks call it. Raises CheckpointError, which names what is damaged.
    """
    if wanted is None:
        return None
    found = rank_zeros(topology, lambda: candidates(wanted, output_dir))
    faults: dict[Path, str] = {}
    for folder in found:
        fault = damage(folder, topology)
        if fault is None:
            for damaged, known in faults.items() if topology.is_main else ():
                logger.warning("%s. Resuming from %s, the newest one whose files are as they were saved", known, folder)
                if sets_aside:
                    _set_aside(damaged)
            return folder
        faults[folder] = f"{folder}: {fault}"
    if faults:
        raise CheckpointError(
            f"{'; '.join(faults.values())}. There is no other checkpoint to resume from. Restore the file from a copy, "
            "or start a new run with --overwrite_output_dir."
        )
    logger.info("%s has no checkpoint yet: the run starts at step 0", output_dir)
    return None


def _set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint. Its step may have been damaged before: then the new name has a number too."""
    names = itertools.chain([f"{_DAMAGED}{folder.name}"], (f"{_DAMAGED}{folder.name}-{n}" for n in itertools.count(2)))
    folder.rename(next(path for path in map(folder.with_name, names) if not path.exists()))


def candidates(wanted: str, output_dir: Path) -> list[Path]:
    """The folders to try, in this order. Raises CheckpointError without one, unless `wanted` is "auto"."""
    if wanted.lower() not in NEWEST:
        folder = Path(wanted)
        if not is_whole(folder):
            names = ", ".join(folder.name for folder in checkpoints(output_dir))
            raise CheckpointError(f"{folder}: {_INCOMPLETE}{f' {output_dir} has {names}.' if names else ''}")
        return [folder]
    named, found = _named_by_latest(output_dir), checkpoints(output_dir)[::-1]
    if not found and wanted.lower() != AUTO:
        raise CheckpointError(
            f"{output_dir}: there is no complete checkpoint to resume from. Remove --resume_from_checkpoint, or set it "
            f"to {AUTO}."
        )
    return sorted(found, key=lambda folder: folder != named)


def _named_by_latest(output_dir: Path) -> Path | None:
    file = output_dir / LATEST
    if not file.is_file():
        return None
    folder = output_dir / file.read_text(encoding="utf-8", errors="replace").strip()
    return folder if folder.parent == output_dir and is_whole(folder) else None


def point_latest_at(folder: Path, output_dir: Path) -> None:
    """Make `folder` the checkpoint that --resume_from_checkpoint true uses, if it is in output_dir.

    Rank 0 calls it after a save, and after a resume, because later checkpoints are not part of the resumed run.
    """
    if folder.resolve().parent == output_dir.resolve():
        write_atomically(output_dir / LATEST, folder.name + "\n")


def checkpoint_of(output_dir: Path, step: int) -> Path:
    return output_dir / f"{_PREFIX}{step}"


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, in the order they were saved. After a resume, this may not be step order."""
    return sorted((folder for folder in output_dir.glob(f"{_PREFIX}*") if is_whole(folder)), key=_number)


def _number(folder: Path) -> int:
    """Of the save, counted in output_dir. 0 if the state cannot be read: any other checkpoint is tried before."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        return int(json.loads((folder / STATE_FILE).read_text("utf-8")).get(_NUMBER, 0))
    return 0


def is_whole(folder: Path) -> bool:
    return (folder / STATE_FILE).is_file()


def start_folder(folder: Path) -> None:
    """Create an empty folder for a checkpoint, in place of an earlier one of the same step. Rank 0 calls it."""
    _remove(folder)
    folder.mkdir(parents=True)


def finish_folder(folder: Path, state: dict[str, Any], files: FileFacts, topology: Topology) -> None:
    """Write the state, when all ranks have written their `files`. Communicates; all ranks call it."""
    everyones = from_all(files, topology)
    if topology.is_main:
        with naming_the_disk(folder):
            sync(folder)
            number = 1 + max(map(_number, checkpoints(folder.parent)), default=0)
            state |= {_NUMBER: number, FILES: {name: of for part in everyones for name, of in part.items()}}
            write_atomically(folder / STATE_FILE, json.dumps(sealed(state), indent=2) + "\n")
            point_latest_at(folder, folder.parent)
    topology.barrier()


def damage(folder: Path, topology: Topology) -> str | None:
    """The first file that is not as it was saved, and how it differs; None if all are. All ranks call it, and share the
    work. Logs the rate. Raises ValueError if the checkpoint is in another format.
    """
    began = time.monotonic()
    try:
        files = rank_zeros(topology, lambda: read_state(folder)[FILES])
    except DamagedStateError as error:
        return str(error)
    mine = sorted(files)[topology.rank :: topology.world_size]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _difference(folder / name, *files[name]), mine)
        mine_are = next((f"{name} {what}" for name, what in zip(mine, found, strict=True) if what), None)
    fault = next((one for one in from_all(mine_are, topology) if one), None)
    if fault is None:
        gigabytes, seconds = sum(size for size, _ in files.values()) / 1e9, time.monotonic() - began
        rate = f"{gigabytes:.3g} GB in {seconds:.1f} s"
        logger.info("%s: all %d files are as they were saved (%s)", folder, len(files), rate)
    return fault


def _difference(path: Path, size: int, digest: str) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        if (found := path.stat().st_size) != size:
            return f"has {found:,} bytes, and {size:,} were saved"
        return None if size_and_digest(path)[1] == digest else f"has other bytes than the {size:,} that were saved"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def size_and_digest(path: Path) -> tuple[int, str]:
    """Bytes of a file, and a digest of its content."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        return file.tell(), digest


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """The state with a digest of it, in place of an earlier one."""
    state = {key: value for key, value in state.items() if key != _OF_STATE}
    return state | {_OF_STATE: _digest_of(state)}


def _digest_of(state: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(state, sort_keys=True).encode())


def read_state(folder: Path) -> dict[str, Any]:
    """The contents of trainer_state.json. Raises DamagedStateError, or ValueError if it is in another format.

    arguments, ds_config: of the run that wrote it. table_cuts: number of column shards per table, 0 if replicated.
    """
    try:
        values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        digest = values.pop(_OF_STATE, None) if isinstance(values, dict) else None
    except (OSError, ValueError) as error:
        raise DamagedStateError(f"{STATE_FILE} cannot be read: {error!s:.100}") from error
    if isinstance(values, dict):  # first: the digest of another format may be another one
        check_format_version(folder / STATE_FILE, values, FORMAT_VERSION, "start a new run, without a resume")
    if digest != _digest_of(values):
        raise DamagedStateError(f"{STATE_FILE} has other values than were saved")
    return values


def delete_old_checkpoints(output_dir: Path, limit: int, best_step: int | None) -> None:
    """Delete all checkpoints but the `limit` newest, the best one and the one that `latest` names, and the remains of
    interrupted saves. Rank 0 calls it after a save.
    """
    for folder in output_dir.glob(f"{_PREFIX}*"):
        if not is_whole(folder):
            _remove(folder)
    kept = {_named_by_latest(output_dir)} | ({checkpoint_of(output_dir, best_step)} if best_step is not None else set())
    for folder in checkpoints(output_dir)[:-limit]:
        if folder not in kept:
            _remove(folder)


@contextlib.contextmanager
def no_code_from(folder: Path) -> Iterator[None]:
    """Unpickle tensors, plain values and DeepSpeed's few classes only, also where DeepSpeed asks torch for more, and in
    the processes that it starts. Raises CheckpointError for a file that needs more.
    """
    forced = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(forced)
    os.environ[forced] = "1"
    try:
        with torch.serialization.safe_globals(_OF_DEEPSPEED):
            yield
    except pickle.UnpicklingError as error:
        what = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), str(error))
        raise CheckpointError(f"{folder}: a file asks for code, which no checkpoint has: {what:.200}") from error
    finally:
        if before is None:
            del os.environ[forced]
        else:
            os.environ[forced] = before


@contextlib.contextmanager
def naming_the_disk(folder: Path) -> Iterator[None]:
    """While a checkpoint is written: raise CheckpointError, in one line, if the disk does not take it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        what = str(error).partition("\n")[0]
        if isinstance(error, RuntimeError) and not re.search(r"writ|inline_container", what, re.IGNORECASE):
            raise
        free = shutil.disk_usage(folder.parent).free / 2**30
        raise CheckpointError(
            f"{folder}: this checkpoint cannot be written: {what:.150} ({free:.3g} GiB are free on that disk). The "
            "ones before it stay. Make room, then go on with --resume_from_checkpoint auto."
        ) from error


def _remove(folder: Path) -> None:
    """Delete a checkpoint, starting with the file that marks it as complete."""
    (folder / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
