"""Counts the bytes of live tensors, in a real run or in a run on fake tensors, which needs no memory."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Counts every storage that this thread's operations create, until the last tensor that uses it is freed.

    bytes: live now. peak: largest number of live bytes since the start or the last `reset_peak`. Memory that an
    operation allocates and frees internally is not counted.

    >>> with LiveMemory() as memory:
    ...     x = torch.ones(1000)
    ...     del x
    >>> memory.bytes, memory.peak
    (0, 4000)
    """

    def __init__(self, external: Iterable[Tensor] = ()) -> None:
        """external: existing tensors that are not counted."""
        super().__init__()
        self.bytes = self.peak = 0
        self._known: dict[int, weakref.finalize | None] = {tensor.untyped_storage()._cdata: None for tensor in external}

    def reset_peak(self) -> None:
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return result

    def count(self, tensor: Tensor) -> None:
        """Count the tensor's storage, unless it is already counted or has no memory, as on the meta device."""
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
