"""Differences between checkpoints in numbers."""

from __future__ import annotations

import numpy as np
import torch

from rung.checkpoint.format import item_bytes
from rung.checkpoint.inspect import _compare, _values


def test_numbers_of_every_dtype() -> None:
    """Without torch; torch knows what they should be."""
    raw = np.frombuffer(np.random.default_rng(0).bytes(2**17), np.uint8)
    for dtype in ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int16", "complex64"):
        theirs = torch.frombuffer(bytearray(raw.tobytes()), dtype=getattr(torch, dtype))
        wide = torch.complex128 if theirs.is_complex() else torch.float64
        with np.errstate(invalid="ignore"):
            ours = _values(raw, dtype).astype(np.complex128 if theirs.is_complex() else np.float64)
        np.testing.assert_array_equal(ours, theirs.to(wide).numpy())
        other = raw.copy()
        other[: item_bytes(dtype)] ^= 1
        assert _compare(raw, dtype, other, dtype)[0] == 1 and _compare(raw, dtype, raw, dtype) == (0, 0)
    ends = np.array([-128, 127], np.int8).view(np.uint8)
    assert _compare(ends, "int8", ends[::-1].copy(), "int8") == (2, 255)
    zeros, signed = np.array([0.0], "<f4").view(np.uint8), np.array([-0.0], "<f4").view(np.uint8)
    assert _compare(zeros, "float32", signed, "float32") == (1, 0)
