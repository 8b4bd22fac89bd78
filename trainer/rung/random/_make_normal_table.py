"""Writes ``normal_table.npy``, the constants of the inverse normal distribution in ``normal.py``. Needs mpmath.

Entry e*64 + j holds the quadratic of the odd integers n in [2^e (1 + j/64), 2^e (1 + (j+1)/64)): with r in [0, 2^25)
the place of n in its segment, -Phi^-1(n / 2^33) is c0 + c1 x + c2 x^2 for x = r / 2^25, coefficients in units of 2^-40.
The quadratic meets the function at the three Chebyshev nodes, which is within a few per cent of the best possible.

Run ``python -m rung.random._make_normal_table`` to write the file again; it is the same on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
from numpy.typing import NDArray

NUM_SEGMENTS = 32 * 64
_DIGITS = 40  # n / 2^33 is as small as 1e-10, so 1 - 2p needs far more than a double has


def make_table(segments: Iterable[int]) -> NDArray[np.int64]:
    """Coefficients [3, segments] (c0, c1, c2) of the named segments, int64 in units of 2^-40."""
    with mpmath.workdps(_DIGITS):
        nodes = [(1 + mpmath.cos(mpmath.pi * (2 * k + 1) / 6)) / 2 for k in range(3)]
        return np.array([_quadratic(segment, nodes) for segment in segments], np.int64).T.copy()


def _quadratic(segment: int, nodes: list[Any]) -> list[int]:
    exponent, mantissa = divmod(segment, 64)
    a, b, c = nodes
    ya, yb, yc = (_magnitude(mpmath.ldexp(1 + (mantissa + node) / 64, exponent - 33)) for node in nodes)
    slope_ab, slope_bc = (yb - ya) / (b - a), (yc - yb) / (c - b)  # Newton's divided differences
    c2 = (slope_bc - slope_ab) / (c - a)
    c1 = slope_ab - c2 * (a + b)
    c0 = ya - c1 * a - c2 * a * a
    return [int(mpmath.nint(mpmath.ldexp(coefficient, 40))) for coefficient in (c0, c1, c2)]


def _magnitude(probability: Any) -> Any:
    return mpmath.sqrt(2) * mpmath.erfinv(1 - 2 * probability)


if __name__ == "__main__":
    path = Path(__file__).with_name("normal_table.npy")
    np.save(path, make_table(range(NUM_SEGMENTS)))
    sys.stdout.write(f"{path}\n")
