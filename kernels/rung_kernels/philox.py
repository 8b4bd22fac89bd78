"""Philox4x32-10 on tensors: a random function from a 128-bit counter and a 64-bit key to four 32-bit words.

Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), tables 2 and 3.
Every word is an unsigned 32-bit value kept in 64 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["MASK", "MULTIPLIERS", "ROUNDS", "WEYL", "philox_torch", "rounds"]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK = 0xFFFFFFFF


def rounds(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """The ten rounds, in plain operators: for Python ints, int64 tensors and any broadcastable mix of the two.

    A word times (multiplier - 2^32) fits int64, and adding the word to the high half makes up for the difference.
    The product with the multiplier itself overflows: harmless in eager torch, but inductor's C++ compiler takes signed
    overflow for impossible and drops the mask that would repair it (seen on 0-dim tensors).
    """
    for _ in range(ROUNDS):
        product0, product2 = c0 * (MULTIPLIERS[0] - 2**32), c2 * (MULTIPLIERS[1] - 2**32)
        c0, c1, c2, c3 = (
            (c2 + (product2 >> 32)) ^ c1 ^ k0,
            product2 & MASK,
            (c0 + (product0 >> 32)) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def philox_torch(
    c0: Tensor, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int, k0: Tensor | int, k1: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four int64 tensors of words from the low 32 bits of four int64 counters (they broadcast) and of a key.

    Integer arithmetic on the device of ``c0``: traceable by torch.compile, no host synchronisation.
    """
    if torch.compiler.is_compiling():  # a symbolic int that only enters arithmetic comes out of inductor as a float
        k0, k1 = (
            key if isinstance(key, Tensor) else torch.full((), key, dtype=torch.int64, device=c0.device)
            for key in (k0, k1)
        )
    # Not only a courtesy: inductor folds arange * multiplier into an index with a 32-bit step, which overflows. The
    # mask keeps counters out of index arithmetic.
    return rounds(c0 & MASK, c1 & MASK, c2 & MASK, c3 & MASK, k0 & MASK, k1 & MASK)
