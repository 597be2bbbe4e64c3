"""Writes a rank's files of a checkpoint: at once, or from a copy in host memory while training goes on.

torch.distributed.checkpoint also saves from a copy. It is not used here: it writes the model's tensors in a format of
its own, while ZeRO's shards, the tables' shards and the random states must come back on the same ranks to the bit.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_map

from dhen.paths import sync
from dhen.tables.storage import InPieces, write_in_pieces
from dhen.training.saved.checkpoint_folder import FileFacts, naming_the_disk, size_and_digest

_Write = Callable[[Path], None]


class CheckpointFiles:
    """The files that this rank writes into `folder`. is_staged: keep copies, which `write` brings to the disk later."""

    def __init__(self, folder: Path, *, is_staged: bool) -> None:
        self.folder, self.is_staged = folder, is_staged
        self._staged: dict[str, _Write] = {}
        self._written: FileFacts = {}
        umask = os.umask(0o77)
        os.umask(umask)
        self._mode = 0o666 & ~umask

    def add_pickle(self, name: str, value: Any) -> None:
        value = on_host(value) if self.is_staged else value
        self._add(name, lambda path: torch.save(value, path))

    def add_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """A safetensors file of small tensors."""
        tensors = on_host(dict(tensors)) if self.is_staged else tensors
        self._add(name, lambda path: save_file(tensors, path))

    def add_pieces(self, name: str, tensors: Mapping[str, InPieces], metadata: Mapping[str, str]) -> None:
        """A safetensors file of tensors that may be too large for host memory. Staged, they are copied all the same."""
        if self.is_staged:
            tensors = {key: in_pieces.on_host() for key, in_pieces in tensors.items()}
        self._add(name, lambda path: write_in_pieces(path, tensors, metadata))

    def write(self) -> FileFacts:
        """Write what is staged, and return size and digest of each file when all are on the disk. May take long.

        Raises CheckpointError if the disk does not take it.
        """
        while self._staged:  # the copies are freed one after another
            name, write = self._staged.popitem()
            self._write(name, write)
        return self._written

    def _add(self, name: str, write: _Write) -> None:
        if self.is_staged:
            self._staged[name] = write
        else:
            self._write(name, write)

    def _write(self, name: str, write: _Write) -> None:
        path = self.folder / name
        with naming_the_disk(self.folder):
            write(path)
            path.chmod(self._mode)  # safetensors lets nobody else read its files
            sync(path)
            self._written[name] = size_and_digest(path)


class _IntoFiles(TorchCheckpointEngine):
    """DeepSpeed's way to save, which hands on what it would write."""

    def __init__(self, files: CheckpointFiles) -> None:
        self.name, self._files = type(self).__name__, files

    def save(self, state_dict: Any, path: str) -> None:
        self._files.add_pickle(Path(path).name, state_dict)


@contextlib.contextmanager
def saving_into(files: CheckpointFiles, engine: DeepSpeedEngine) -> Iterator[None]:
    """Let `engine.save_checkpoint` add its files to `files`."""
    before, engine.checkpoint_engine = engine.checkpoint_engine, _IntoFiles(files)
    try:
        yield
    finally:
        engine.checkpoint_engine = before


def on_host(value: Any) -> Any:
    """A copy that no later step changes, with its tensors in host memory."""
    return tree_map(
        lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else copy.deepcopy(leaf), value
    )
