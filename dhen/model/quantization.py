"""Tables in 8 or 4 bits per value, row by row: a value is scale * q + bias, with a scale and a bias for each row.

Shapes: R rows, D embedding dimension. With int4, a byte holds the values 2 j (its low bits) and 2 j + 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Quantized(NamedTuple):
    """Rows as they are stored. values: uint8, (R, D), or (R, D / 2) with int4. scale_bias: (R, 2)."""

    values: Tensor
    scale_bias: Tensor


SCALE_DTYPES = {"int8": torch.float32, "int4": torch.float16}
"""Of the scale and the bias, by the dtype of the table."""


def quantize(rows_RD: Tensor, dtype: str) -> Quantized:
    """Round rows to int8 or int4: q is 0 for the smallest value of a row, and 255 or 15 for the largest.

    >>> quantize(torch.tensor([[-1.0, 4.1]]), "int8").values
    tensor([[  0, 255]], dtype=torch.uint8)
    """
    rows_RD, levels = rows_RD.float(), 255 if dtype == "int8" else 15
    low_R1, high_R1 = rows_RD.amin(1, keepdim=True), rows_RD.amax(1, keepdim=True)
    scale_bias = torch.cat([(high_R1 - low_R1) / levels, low_R1], dim=1).to(SCALE_DTYPES[dtype])
    scale_R1, bias_R1 = scale_bias.float().split(1, dim=1)
    tiny = torch.finfo(torch.float32).tiny
    values = ((rows_RD - bias_R1) / scale_R1.clamp(min=tiny)).round().clamp(0, levels).to(torch.uint8)
    return Quantized(values if dtype == "int8" else values[:, ::2] | values[:, 1::2] << 4, scale_bias)


def dequantize(stored: Quantized, dtype: str) -> Tensor:
    """The rows in float32, (…, D). Both tensors of `stored` may have more axes in front.

    >>> dequantize(quantize(torch.tensor([[-5.0, 2.1, 10.0, 3.0]]), "int4"), "int4")
    tensor([[-5.,  2., 10.,  3.]])
    """
    values, scale_bias = stored.values, stored.scale_bias.float()
    if dtype == "int4":
        high = (values / 16).floor()  # in float32: exports to ONNX lose the type of a shifted uint8
        values = torch.stack([values - 16 * high, high], dim=-1).flatten(-2)
    return values.float() * scale_bias[..., :1] + scale_bias[..., 1:]
