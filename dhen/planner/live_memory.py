"""Bytes of tensors that are alive: of a real run, or of one on fake tensors that takes no memory at all."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Within it, every storage that an operation of this thread makes counts until the last tensor in it is gone.

    bytes: alive now. peak: the most at once since the start, or since `reset_peak`. What an operation takes and gives
    back inside itself isn't seen.

    >>> with LiveMemory() as memory:
    ...     x = torch.ones(1000)
    ...     del x
    >>> memory.bytes, memory.peak
    (0, 4000)
    """

    def __init__(self, external: Iterable[Tensor] = ()) -> None:
        """external: tensors that are there already and don't count."""
        super().__init__()
        self.bytes = self.peak = 0
        self._known: dict[int, weakref.finalize | None] = {tensor.untyped_storage()._cdata: None for tensor in external}

    def reset_peak(self) -> None:
        """Forget all moments but this one."""
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return result

    def count(self, tensor: Tensor) -> None:
        """Count the tensor's storage, unless it is known, or none as on the meta device."""
        if tensor.device.type == "meta" and not isinstance(tensor, FakeTensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._free, key, size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _free(self, key: int, size: int) -> None:
        del self._known[key]
        self.bytes -= size
