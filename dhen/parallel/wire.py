"""What travels of a matrix of embeddings or their gradients: fewer bytes an element, for one all-to-all (paper 3.2.1).

Rows are examples; a row is several blocks of columns, each of one table shard. fp16 saturates where a value is beyond
what it can hold, and never becomes inf. int8 has one scale for each row and block, its largest magnitude over 127, so a
large table doesn't cost a small one its digits; the scales travel in the row, behind its values. NaN stays NaN.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

WireDtype = Literal["fp32", "fp16", "bf16", "int8"]

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SCALE_BYTES = 4
_LARGEST_INT = 127


class Wire:
    """Turns rows into what is sent, and back.

    >>> wire = Wire("int8")
    >>> sent = wire.encode(torch.tensor([[1.0, -2.0, 0.5, 0.25]]), widths=[4])
    >>> wire.decode(sent, widths=[4])
    tensor([[ 1.0079, -2.0000,  0.5039,  0.2520]])
    """

    def __init__(self, dtype: WireDtype) -> None:
        self.dtype = dtype
        self.torch_dtype = _FLOATS.get(dtype, torch.int8)

    def row_size(self, widths: Sequence[int]) -> int:
        """Elements that are sent of a row whose blocks have these widths."""
        return sum(widths) + (_SCALE_BYTES * len(widths) if self.dtype == "int8" else 0)

    def encode(self, rows: Tensor, widths: Sequence[int]) -> Tensor:
        """float32 (rows, sum of widths) -> what is sent: (rows, row_size)."""
        if self.dtype == "int8":
            return _to_int8(rows, widths)
        if self.dtype == "fp16":
            rows = rows.clamp(-_LARGEST_FP16, _LARGEST_FP16)
        return rows.to(self.torch_dtype)

    def decode(self, sent: Tensor, widths: Sequence[int]) -> Tensor:
        """The reverse, but for what the dtype can't hold."""
        return _from_int8(sent, widths) if self.dtype == "int8" else sent.float()


_LARGEST_FP16 = torch.finfo(torch.float16).max


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
    """The largest of each row and block: (rows, blocks)."""
    if len(set(widths)) == 1:
        return magnitudes.unflatten(1, (len(widths), -1)).amax(2)
    return torch.stack([block.amax(1) for block in magnitudes.split(list(widths), dim=1)], dim=1)


def _spread(scales: Tensor, widths: Sequence[int]) -> Tensor:
    """A block's scale for each of its columns: (rows, sum of widths)."""
    if len(set(widths)) == 1:
        return scales.repeat_interleave(widths[0], dim=1)
    return scales.repeat_interleave(torch.tensor(widths, device=scales.device), dim=1, output_size=sum(widths))
