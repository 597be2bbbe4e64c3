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
import math
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
        self.scale_size = _SCALE_BYTES if dtype == "int8" else 0

    def row_size(self, widths: Sequence[int]) -> int:
        """Elements sent for a row whose blocks have these widths."""
        return sum(widths) + self.scale_size * len(widths)

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
    if not widths or not len(rows):
        return rows.new_empty(len(rows), sum(widths) + _SCALE_BYTES * len(widths), dtype=torch.int8)
    scales = _largest(rows.abs(), widths).div_(_LARGEST_INT)
    per_column = _spread(torch.where(scales == 0, 1.0, scales), widths)
    values = torch.round(rows / per_column).nan_to_num_(nan=0.0).clamp_(-_LARGEST_INT, _LARGEST_INT)
    return torch.cat([values.to(torch.int8), scales.view(torch.int8)], dim=1)


def _from_int8(sent: Tensor, widths: Sequence[int]) -> Tensor:
    width = sum(widths)
    if not widths or not len(sent):
        return torch.empty(sent.shape[0], width, device=sent.device)
    scales = sent[:, width:].contiguous().view(torch.float32)
    return sent[:, :width].float().mul_(_spread(scales, widths))


def _largest(magnitudes: Tensor, widths: Sequence[int]) -> Tensor:
    """The largest magnitude of each row and block: (rows, blocks). The same operations for any number of blocks."""
    unit = math.gcd(*widths)
    largest = magnitudes.unflatten(1, (-1, unit)).amax(2)
    if largest.shape[1] == len(widths):
        return largest
    units = _units_of_blocks(tuple(width // unit for width in widths), magnitudes.device)
    return largest.index_select(1, units).unflatten(1, (len(widths), -1)).amax(2)


def _spread(scales: Tensor, widths: Sequence[int]) -> Tensor:
    """Repeat each block's scale for all of its columns: (rows, sum of widths)."""
    if len(set(widths)) == 1:
        return scales.repeat_interleave(widths[0], dim=1)
    return scales.index_select(1, _block_of_column(tuple(widths), scales.device))


# The indices are cached, because a copy to a GPU makes the host wait for all work queued there.


@functools.cache
def _block_of_column(widths: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([block for block, width in enumerate(widths) for _ in range(width)]).to(device)


@functools.cache
def _units_of_blocks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """The units of each block, all blocks as long as the longest: the last unit of a shorter one is repeated."""
    with torch.inference_mode(False):
        sizes_B1 = torch.tensor(sizes)[:, None]
        return (sizes_B1.cumsum(0) - sizes_B1 + torch.arange(max(sizes)).minimum(sizes_B1 - 1)).flatten().to(device)
