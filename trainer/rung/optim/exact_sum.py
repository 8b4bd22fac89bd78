"""Sums of squares that are the same bits in whatever order, and on however many ranks, they are added up.

Squares relative to a power of two become integers of 128 binary places, which integer addition sums exactly. A sum is
five limbs of 32 bits in int64, the largest first, so that many sums can be added before carries must be made.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["LIMBS", "carry", "exponent_above", "power_of_two", "square_limbs", "to_float"]

LIMBS = 5
"""One for whole numbers, and four of 32 binary places each."""
_BITS = 32


def exponent_above(values: Tensor) -> Tensor:
    """int64, of the shape of float64 ``values``: e where 2^(e-1) <= value < 2^e, 0 for 0, within what float64 has."""
    return torch.frexp(values).exponent.long().clamp(-1022, 1022)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exactly; exponents are int64 in [-1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)


def square_limbs(parts: Iterable[Tensor], scale: Tensor, device: torch.device) -> Tensor:
    """Σ (x·scale)² over all elements of all parts as limbs, int64 [LIMBS], at most 2^31 elements.

    ``scale``, float64 [], is a power of two that brings every |x| to 1 at most. Each square is rounded to float64 and
    cut off after 128 binary places.
    """
    total = torch.zeros(LIMBS, dtype=torch.int64, device=device)
    for part in parts:
        scaled = part.double() * scale
        rest = scaled * scaled
        for limb in range(1, LIMBS):
            rest = rest * 2.0**_BITS
            whole = rest.floor()
            total[limb] += whole.long().sum()
            rest = rest - whole
    return carry(total)


def carry(limbs: Tensor) -> Tensor:
    """The same sums, int64 [..., LIMBS], with every limb but the first below 2^32."""
    result = limbs.clone()
    for limb in range(LIMBS - 1, 0, -1):
        result[..., limb - 1] += result[..., limb] >> _BITS
        result[..., limb] &= (1 << _BITS) - 1
    return result


def to_float(limbs: Tensor) -> Tensor:
    """float64 [...], next to the sums [..., LIMBS]: a function of the sum alone, not of how limbs share it."""
    limbs = carry(limbs).double()
    result = limbs[..., LIMBS - 1]
    for limb in range(LIMBS - 2, -1, -1):
        result = result * 2.0**-_BITS + limbs[..., limb]
    return result
