"""Random words, normals and dropout masks as functions of a key and a counter, by definition.

Legend: B batch, T tokens, F features, Q quadruples of features, C counters, N numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rung_kernels.philox import philox_torch

__all__ = ["dropout_mask", "normals", "words"]

Key = tuple[Tensor | int, Tensor | int]
"""Two 32-bit words."""


def words(
    key: Key, start: int, count: int, c2: Tensor | int = 0, c3: Tensor | int = 0, device: torch.device | None = None
) -> Tensor:
    """Philox words of counters (low 32 bits of i, high 32 bits of i, c2, c3), i from ``start``: int64 [count, 4].

    i is counted modulo 2^64.
    """
    counters_C = torch.arange(count, device=device) + _signed(start)
    return torch.stack(philox_torch(counters_C, counters_C >> 32, c2, c3, *key), -1)


def normals(key: Key, start: int, count: int, table: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normals number ``start`` to ``start + count`` of the stream ``key`` -> [count] on the table's device.

    Normal i is made of word i % 4 of the counter (low and high 32 bits of i // 4, 0, 0): the last bit is its sign, and
    n = word | 1 its place in the inverse distribution, Phi^-1(n / 2^33). ``table``, int64 [3, 2048], holds c0, c1, c2
    of a quadratic for each exponent and six leading mantissa bits of n, in units of 2^-40.
    """
    skipped = start & 3
    words_N = words(key, start >> 2, (skipped + count + 3) // 4, device=table.device).view(-1)[skipped:][:count]
    c0, c1, c2 = table.unbind()
    bits = (words_N | 1).to(torch.float64).view(torch.int64)
    segment = (bits >> 46) - (1023 << 6)
    place = (bits >> 21) & ((1 << 25) - 1)
    scaled = (((((c2[segment] * place) >> 25) + c1[segment]) * place) >> 25) + c0[segment]
    return (torch.where((words_N & 1).bool(), -scaled, scaled).to(torch.float64) * 2.0**-40).to(dtype)


def dropout_mask(
    key: Key, sample_ids_B: Tensor, positions_BT: Tensor, features: int, first_feature: int, p: float
) -> Tensor:
    """What dropout with probability ``p`` keeps of features first_feature to first_feature + features: bool [B, T, F].

    Feature f is dropped where word f % 4 of the Philox counter (f // 4, position, low and high 32 bits of the sample
    id) is below floor(p 2^32). Ids and positions are int64, first_feature a multiple of 4.
    """
    ids_B11 = sample_ids_B[:, None, None]
    quadruples_Q = torch.arange(first_feature // 4, (first_feature + features + 3) // 4, device=sample_ids_B.device)
    drawn = philox_torch(quadruples_Q, positions_BT[:, :, None], ids_B11, ids_B11 >> 32, *key)
    threshold = int(p * 2**32)
    kept0, kept1, kept2, kept3 = ((word >= threshold).to(torch.int32) for word in drawn)
    # Four bytes of an int32 are four flags. torch.stack says the same, but compiles to code five times as slow; a view
    # as bool is what inductor of torch 2.11 cannot lower.
    four_kept_BTQ = kept0 | kept1 << 8 | kept2 << 16 | kept3 << 24
    return four_kept_BTQ.view(torch.uint8)[..., :features] != 0


def _signed(counter: int) -> int:
    """The int64 of the same 64 bits."""
    return (counter + 2**63) % 2**64 - 2**63
