"""The logical digest: one number for a tensor's bits by logical place, whatever boxes they come in.

Each element's bits, as words of at most 32 bits, are multiplied by a weight of 64 bits that is a product over the
dimensions of odd pseudo-random numbers, one for each index along the dimension, and summed modulo 2**64. A sum does not
ask in which order or by whom its terms were added. Weights are odd, so that no change of a single word goes unseen; of
other changes both lanes together miss one in 2**64 or so, one in 2**46 where signs flip at all corners of a box. It
finds accidents, not forgers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rung.layout import Box

__all__ = ["Lanes", "box_lanes", "hex_digest"]

Lanes = tuple[int, int]
"""Two sums modulo 2**64, one for each of two sets of weights."""

_MASK = (1 << 64) - 1
_WORDS_AT_ONCE = 2**15
"""Few enough that they stay in the cache as 64-bit numbers."""


def box_lanes(values: Any, item_bytes: int, shape: Sequence[int], box: Box) -> Lanes:
    """What a box adds to the lanes of its tensor of ``shape``.

    values: a buffer (uint8, contiguous) of the box's elements of ``item_bytes`` each, row by row, little-endian.
    """
    width = min(item_bytes, 4)
    words = np.frombuffer(values, dtype=f"<u{width}")
    per_item = item_bytes // width
    *lead, last = box.sizes or (1,)
    *lead_offsets, last_offset = box.offsets or (0,)
    columns = words.reshape(-1, last * per_item) if last else words.reshape(0, 0)
    if columns.size == 0:
        return 0, 0
    dim = max(len(shape) - 1, 0)
    span = last_offset * per_item, (last_offset + last) * per_item
    rows = [_row_weights(lead, lead_offsets, lane) for lane in (0, 1)]
    totals = [0, 0]  # Python's: numpy warns when a sum of two scalars wraps
    step = max(1, _WORDS_AT_ONCE // columns.shape[1])
    for first_column in range(0, columns.shape[1], _WORDS_AT_ONCE):
        last_column = min(first_column + _WORDS_AT_ONCE, columns.shape[1])
        weights = [_weights(dim, lane, span[0] + first_column, span[0] + last_column) for lane in (0, 1)]
        for row in range(0, len(columns), step):
            wide = columns[row : row + step, first_column:last_column].astype(np.uint64)
            for lane in (0, 1):
                totals[lane] += int((wide @ weights[lane]) @ rows[lane][row : row + step])
    return totals[0] & _MASK, totals[1] & _MASK


def hex_digest(lanes: Lanes) -> str:
    """32 hex digits of summed lanes."""
    return f"{lanes[0] & _MASK:016x}{lanes[1] & _MASK:016x}"


def _row_weights(sizes: Sequence[int], offsets: Sequence[int], lane: int) -> NDArray[np.uint64]:
    """The product of the weights of every dimension but the last, for each row of a box."""
    rows = np.ones(1, np.uint64)
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        rows = np.multiply.outer(rows, _weights(dim, lane, offset, offset + size)).reshape(-1)
    return rows


@lru_cache(maxsize=64)
def _weights(dim: int, lane: int, first: int, last: int) -> NDArray[np.uint64]:
    """The odd numbers that belong to indices [first, last) of a dimension: splitmix64's finalizer of a counter."""
    key = np.uint64((2 * dim + lane + 1) * 0x9E3779B97F4A7C15 & _MASK)
    x = np.arange(first, last, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95) + key
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31) | np.uint64(1)
