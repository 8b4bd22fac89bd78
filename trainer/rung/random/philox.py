"""Philox4x32-10: a random function from a 128-bit counter and a 64-bit key to four 32-bit words.

Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), tables 2 and 3.
Every word is an unsigned 32-bit value kept in 64 bits. numpy's own ``Philox`` is the 4x64 variant: another stream.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Key: TypeAlias = tuple[int, int]
Words: TypeAlias = NDArray[np.uint64]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF
BLOCK = 16384  # counters at a time: the six 128 KiB arrays of a round stay in a core's own cache


def rounds(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """The ten rounds, in plain operators: for Python ints, int64 tensors and any broadcastable mix of the two.

    A word times (multiplier - 2^32) fits int64, and adding the word to the high half makes up for the difference.
    The product with the multiplier itself overflows: harmless in eager torch, but inductor's C++ compiler takes signed
    overflow for impossible and drops the mask that would repair it (seen on 0-dim tensors).
    """
    for _ in range(_ROUNDS):
        product0, product2 = c0 * (_MULTIPLIERS[0] - 2**32), c2 * (_MULTIPLIERS[1] - 2**32)
        c0, c1, c2, c3 = (
            (c2 + (product2 >> 32)) ^ c1 ^ k0,
            product2 & _MASK,
            (c0 + (product0 >> 32)) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
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
    return rounds(c0 & _MASK, c1 & _MASK, c2 & _MASK, c3 & _MASK, k0 & _MASK, k1 & _MASK)


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
