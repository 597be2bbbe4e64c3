"""Stochastic rounding of float32 numbers to FP16 tables (paper 3.2.1).

Rounding to nearest loses every update that is smaller than half the distance between two FP16 numbers. Stochastic
rounding rounds up with a probability equal to the fraction that would be lost, so the update is kept on average.
"""

import torch
from torch import Tensor

_LARGEST = torch.finfo(torch.float16).max
_LEAST_NORMAL = torch.finfo(torch.float16).smallest_normal
_DROPPED_BITS = 13
"""Mantissa bits of float32 that float16 does not have."""


def round_stochastically(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round float32 to one of the two neighboring float16 numbers, so that the mean is x. Saturates out of range."""
    x = x.clamp(-_LARGEST, _LARGEST)
    # Subnormal float16 numbers are evenly spaced, as far apart as the smallest normal ones. Shifted into that range,
    # they round like all other numbers.
    shift = torch.copysign((x.abs() < _LEAST_NORMAL).float().mul_(_LEAST_NORMAL), x)
    bits = x.add_(shift).view(torch.int32)
    # One 64-bit draw serves as four 16-bit draws, of which 13 bits each are used.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(generator=generator)
    draws = draws.view(torch.int16)[: x.numel()].view(x.shape).bitwise_and_((1 << _DROPPED_BITS) - 1)
    bits.add_(draws).bitwise_and_(-1 << _DROPPED_BITS)
    return x.sub_(shift).half()
