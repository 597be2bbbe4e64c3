"""Wire formats of the all-to-all: embeddings and their gradients in fewer bytes per element (paper 3.2.1).

Rows are examples. A row consists of blocks of columns, one block per table shard. NaN stays NaN in every format.

fp16 saturates: a finite number out of range becomes the largest fp16 number. Infinity stays infinity, so that a
diverging run is noticed. Gradients of a mean over many examples can be too small for fp16, so they are multiplied by a
power of two before they are sent.

int8 has one scale for each row and block, the block's largest magnitude / 127, so that large values of one table do not
cost another table its precision. The scales are sent at the end of the row. A block that contains infinity arrives as
NaN.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from dhen.config.dhen_section import WireDtype

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SCALE_BYTES = 4
_LARGEST_INT = 127


class Wire:
    """Encodes rows for sending, and decodes them.

    >>> wire = Wire("int8")
    >>> sent = wire.encode(torch.tensor([[1.0, -2.0, 0.5, 0.25]]), widths=[4])
    >>> wire.decode(sent, widths=[4])
    tensor([[ 1.0079, -2.0000,  0.5039,  0.2520]])
    """

    def __init__(self, dtype: WireDtype) -> None:
        self.dtype = dtype
        self.torch_dtype = _FLOATS.get(dtype, torch.int8)

    def row_size(self, widths: Sequence[int]) -> int:
        """Elements sent for a row whose blocks have these widths."""
        return sum(widths) + (_SCALE_BYTES * len(widths) if self.dtype == "int8" else 0)

    def encode(self, rows: Tensor, widths: Sequence[int], scale: float = 1.0) -> Tensor:
        """Encode float32 (rows, sum of widths) as (rows, row_size). scale: a power of two, used by fp16 only."""
        if self.dtype == "int8":
            return _to_int8(rows, widths)
        return _to_fp16(rows * scale if scale != 1.0 else rows) if self.dtype == "fp16" else rows.to(self.torch_dtype)

    def decode(self, sent: Tensor, widths: Sequence[int], scale: float = 1.0) -> Tensor:
        """Decode what `encode` returned for the same `widths` and `scale`, as float32."""
        if self.dtype == "int8":
            return _from_int8(sent, widths)
        return sent.float().div_(scale) if self.dtype == "fp16" and scale != 1.0 else sent.float()


def _to_fp16(rows: Tensor) -> Tensor:
    sent = rows.to(torch.float16)
    largest = torch.finfo(torch.float16).max
    return torch.where(rows.isinf(), sent, sent.clamp(-largest, largest))


def _to_int8(rows: Tensor, widths: Sequence[int]) -> Tensor:
    width = sum(widths)
    sent = torch.empty(rows.shape[0], width + _SCALE_BYTES * len(widths), dtype=torch.int8, device=rows.device)
    if not widths or not len(rows):
        return sent
    scales = _largest(rows.abs(), widths).div_(_LARGEST_INT)
    per_column = _spread(torch.where(scales == 0, 1.0, scales), widths)
    values = torch.round(rows / per_column)
    sent[:, :width] = torch.nan_to_num(values, nan=0.0).clamp_(-_LARGEST_INT, _LARGEST_INT)
    sent[:, width:] = scales.contiguous().view(torch.int8)
    return sent


def _from_int8(sent: Tensor, widths: Sequence[int]) -> Tensor:
    width = sum(widths)
    if not widths or not len(sent):
        return torch.empty(sent.shape[0], width, device=sent.device)
    scales = sent[:, width:].contiguous().view(torch.float32)
    return sent[:, :width].float().mul_(_spread(scales, widths))


def _largest(magnitudes: Tensor, widths: Sequence[int]) -> Tensor:
    """The largest magnitude of each row and block: (rows, blocks)."""
    if len(set(widths)) == 1:
        return magnitudes.unflatten(1, (len(widths), -1)).amax(2)
    return torch.stack([block.amax(1) for block in magnitudes.split(list(widths), dim=1)], dim=1)


def _spread(scales: Tensor, widths: Sequence[int]) -> Tensor:
    """Repeat each block's scale for all of its columns: (rows, sum of widths)."""
    if len(set(widths)) == 1:
        return scales.repeat_interleave(widths[0], dim=1)
    return scales[:, _block_of_column(tuple(widths), scales.device)]


@functools.cache
def _block_of_column(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """Cached, because a copy to a GPU makes the host wait for all work queued there."""
    with torch.inference_mode(False):
        return torch.arange(len(widths)).repeat_interleave(torch.tensor(widths)).to(device)
