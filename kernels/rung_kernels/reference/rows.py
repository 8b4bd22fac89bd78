"""Rows in chunks, so that little of a large tensor is ever alive in a wider dtype.

Legend: N rows (tokens), V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["row_chunks"]

CHUNK_ELEMENTS = {"cpu": 2**21}  # about the last-level cache
CHUNK_ELEMENTS_ELSEWHERE = 2**25  # 128 MiB of float32: few launches, little memory


def row_chunks(logits_NV: Tensor) -> list[slice]:
    """Slices of rows; the answer does not depend on their size, because every row stands alone."""
    elements = CHUNK_ELEMENTS.get(logits_NV.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    num_rows, num_columns = logits_NV.shape
    step = max(1, elements // max(1, num_columns))
    return [slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]
