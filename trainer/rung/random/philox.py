"""Philox4x32-10: a random function from a 128-bit counter and a 64-bit key to four 32-bit words.

Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), tables 2 and 3.
Every word is an unsigned 32-bit value kept in 64 bits. numpy's own ``Philox`` is the 4x64 variant: another stream.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rung_kernels.philox import MASK as _MASK
from rung_kernels.philox import MULTIPLIERS as _MULTIPLIERS
from rung_kernels.philox import ROUNDS as _ROUNDS
from rung_kernels.philox import WEYL as _WEYL
from rung_kernels.philox import philox_torch, rounds

__all__ = ["BLOCK", "Key", "Words", "philox_block", "philox_numpy", "philox_torch", "rounds"]

Key: TypeAlias = tuple[int, int]
Words: TypeAlias = NDArray[np.uint64]

BLOCK = 16384  # counters at a time: the six 128 KiB arrays of a round stay in a core's own cache


def philox_numpy(
    c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike, key: Key
) -> tuple[Words, Words, Words, Words]:
    """Four uint64 arrays of words from the low 32 bits of four integer counters (they broadcast) and a key."""
    counters = np.broadcast_arrays(*(np.asarray(counter, np.uint64) for counter in (c0, c1, c2, c3)))
    words = np.stack([counter.reshape(-1) for counter in counters]) & np.uint64(_MASK)
    scratch = np.empty((2, BLOCK), np.uint64)
    for start in range(0, words.shape[1], BLOCK):
        philox_block(words[:, start : start + BLOCK], scratch, key)
    out0, out1, out2, out3 = words.reshape(4, *counters[0].shape)
    return out0, out1, out2, out3


def philox_block(words: Words, scratch: Words, key: Key) -> None:
    """Turn counters ``words`` [4, N] into random words where they lie; ``scratch`` holds at least [2, N].

    The same as ``rounds`` without a temporary. Fast while both arrays fit a core's own cache, N = ``BLOCK`` at most.
    """
    c0, c1, c2, c3 = words
    product0, product2 = scratch[:2, : words.shape[1]]
    k0, k1 = key
    half, mask = np.uint64(32), np.uint64(_MASK)
    multiplier0, multiplier2 = (np.uint64(multiplier) for multiplier in _MULTIPLIERS)
    for _ in range(_ROUNDS):
        np.multiply(c0, multiplier0, out=product0)
        np.multiply(c2, multiplier2, out=product2)
        np.right_shift(product2, half, out=c0)
        c0 ^= c1
        c0 ^= np.uint64(k0)
        np.bitwise_and(product2, mask, out=c1)
        np.right_shift(product0, half, out=c2)
        c2 ^= c3
        c2 ^= np.uint64(k1)
        np.bitwise_and(product0, mask, out=c3)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
