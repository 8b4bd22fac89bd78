"""Standard normals as a function of integers: the same bits in numpy, in torch and under torch.compile.

A 32-bit word is a sign (its last bit) and an odd integer n = word | 1; its normal is ±Phi^-1(n / 2^33). The inverse
distribution is a table of integer quadratics, found by the exponent and the six leading mantissa bits of n, so nothing
at run time depends on how a library rounds log or sin. Values are multiples of 2^-40 in ±6.34, each within 2e-8 of the
true quantile; the table is written by ``_make_normal_table.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rung.layout.boxes import Box
from rung.random.philox import BLOCK, Key, philox_block

_TABLE: NDArray[np.int64] = np.load(Path(__file__).with_name("normal_table.npy"))  # [3, 2048]: c0, c1, c2
_TABLE_TORCH = torch.from_numpy(_TABLE)
_FIRST_SEGMENT = 1023 << 6  # exponent and six mantissa bits of n = 1
_PLACE_BITS = 25  # of n within its segment
_PLACE_MASK = (1 << _PLACE_BITS) - 1
_LONGEST_RUN = 4 * (BLOCK - 2)  # a block of counters covers it wherever it starts


def normal_from_bits_torch(words: torch.Tensor) -> torch.Tensor:
    """float64 standard normals from an int64 tensor of 32-bit words, any shape, on the words' device."""
    c0, c1, c2 = _TABLE_TORCH.to(words.device).unbind()
    bits = (words | 1).to(torch.float64).view(torch.int64)
    segment = (bits >> 46) - _FIRST_SEGMENT
    place = (bits >> 21) & _PLACE_MASK
    scaled = (((((c2[segment] * place) >> _PLACE_BITS) + c1[segment]) * place) >> _PLACE_BITS) + c0[segment]
    return torch.where((words & 1).bool(), -scaled, scaled).to(torch.float64) * 2.0**-40


def normal_from_bits_numpy(words: NDArray[Any]) -> NDArray[np.float64]:
    """float64 standard normals from an integer array of 32-bit words, any shape; same bits as in torch."""
    values = np.array(words, np.int64, order="C")
    flat = values.reshape(-1)
    scratch = np.empty((4, BLOCK), np.int64)
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK]
        _normals_block(block, scratch[:, : block.size])
    return values.view(np.float64)


def normals_numpy(key: Key, start: int, count: int) -> NDArray[np.float64]:
    """Normals number ``start`` to ``start + count`` of the stream ``key``, float64 [count].

    Normal i is made of word i % 4 of the Philox counter (low 32 bits of i // 4, high 32 bits of i // 4, 0, 0).
    """
    return _normals_of_runs(key, np.array([start], np.int64), count).reshape(count)


def normals_box(key: Key, shape: Sequence[int], box: Box) -> NDArray[np.float64]:
    """The normals of ``box``, float64 [box.sizes]: element i of the whole ``shape``, row-major, is normal i of ``key``.

    So a tensor cut into boxes in any way holds the normals that it would hold whole. Costs what the box's own elements
    cost, rounded up to whole counters for each contiguous run of them.
    """
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first_run_dim = max((dim for dim in range(len(shape)) if box.sizes[dim] != shape[dim]), default=0)
    starts = np.zeros(1, np.int64)
    for dim in range(len(shape)):
        size = box.sizes[dim] if dim < first_run_dim else 1
        starts = np.add.outer(starts, (box.offsets[dim] + np.arange(size)) * strides[dim]).reshape(-1)
    return _normals_of_runs(key, starts, prod(box.sizes[first_run_dim:])).reshape(box.sizes)


def _normals_of_runs(key: Key, starts: NDArray[np.int64], length: int) -> NDArray[np.float64]:
    """[runs, length] normals: row r holds normals starts[r] to starts[r] + length. Many short runs share a block."""
    out = np.empty((len(starts), length), np.float64)
    width = min(length, _LONGEST_RUN)
    counters_per_run = (width + 6) // 4  # enough for a run that begins with the last word of a counter
    height = BLOCK // counters_per_run
    workspace = np.empty((12, BLOCK), np.int64)  # made once: fresh pages for every block would double the time
    for top in range(0, len(starts), height):
        for left in range(0, length, max(width, 1)):
            part = out[top : top + height, left : left + width]
            _fill(part, key, starts[top : top + height] + left, workspace)
    return out


def _fill(out: NDArray[np.float64], key: Key, starts: NDArray[np.int64], workspace: NDArray[np.int64]) -> None:
    """One block: draw whole counters for every run, lay their words in order, copy the runs out of them."""
    runs, length = out.shape
    counters = np.add.outer(starts >> 2, np.arange((length + 6) // 4))
    words, scratch = workspace[:4, : counters.size], workspace[4:8, : counters.size]
    np.bitwise_and(counters.reshape(-1), 0xFFFFFFFF, out=words[0])
    np.right_shift(counters.reshape(-1), 32, out=words[1])
    words[2:] = 0
    philox_block(words.view(np.uint64), scratch.view(np.uint64), key)
    for row in words:
        _normals_block(row, scratch)
    in_order = workspace[8:].view(np.float64).reshape(-1)[: 4 * counters.size].reshape(*counters.shape, 4)
    in_order[:] = words.view(np.float64).reshape(4, *counters.shape).transpose(1, 2, 0)
    in_order = in_order.reshape(runs, -1)
    first_word = starts & 3
    for first in np.unique(first_word):
        np.copyto(out, in_order[:, first : first + length], where=(first_word == first)[:, None])


def _normals_block(words: NDArray[np.int64], scratch: NDArray[np.int64]) -> None:
    """Replace words [N] by the bits of their normals; scratch [4, N].

    Integers become floats, exactly, by setting the exponent bits: numpy's own conversion takes several times as long.
    """
    segment, place, scaled, coefficient = scratch
    np.bitwise_or(words, 1 | 0x433 << 52, out=place)  # the bits of 2^52 + n
    place.view(np.float64)[:] -= 2.0**52
    np.right_shift(place, 46, out=segment)
    segment -= _FIRST_SEGMENT
    place >>= 21
    place &= _PLACE_MASK
    _TABLE[2].take(segment, out=scaled, mode="clip")  # no index is outside; "clip" spares numpy a copy of the output
    for c in (_TABLE[1], _TABLE[0]):
        scaled *= place
        scaled >>= _PLACE_BITS
        c.take(segment, out=coefficient, mode="clip")
        scaled += coefficient
    scaled |= 0x40B << 52  # positive and below 2^43 for every n: the bits of 2^12 + value
    scaled.view(np.float64)[:] -= 2.0**12
    words <<= 63  # the sign bit
    words |= scaled
