"""CUDA's rules of autocast on a CPU's tensors: without a GPU, autograd has no backward pass for tensors of one."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_IN_FLOAT32 = [
    "acos", "asin", "cosh", "cumprod", "cumsum", "erfinv", "exp", "expm1", "group_norm", "layer_norm", "log", "log10",
    "log1p", "log2", "log_softmax.int", "logsumexp", "norm.Scalar", "norm.ScalarOpt_dim", "pow.Scalar",
    "pow.Tensor_Scalar", "pow.Tensor_Tensor", "reciprocal", "rms_norm", "rsqrt", "sinh", "softmax.int", "softplus",
    "sum", "sum.dim_IntList", "tan",
]  # fmt: skip
"""Computed in float32 under autocast on CUDA, but not on a CPU: torch's documentation of torch.amp."""
_IN_WIDEST = ["addcdiv", "addcmul"]
"""Computed in the widest dtype of their inputs."""


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """Let torch.autocast of a CPU follow CUDA's rules inside this context, in all threads."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in (*_IN_FLOAT32, *_IN_WIDEST):
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, functools.partial(_cast, operator, name in _IN_WIDEST), "AutocastCPU")
        yield


def _cast(operator: Any, takes_widest: bool, *args: Any, **kwargs: Any) -> Any:
    is_wide = any(isinstance(each, Tensor) and each.dtype == torch.float32 for each in args)
    if is_wide or not takes_widest:
        args = tree_map_only(Tensor, lambda x: x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, args)
    with torch.autocast("cpu", enabled=False):
        return operator(*args, **kwargs)
