"""Rotary position embedding, by definition.

Legend: B batch, T tokens, H heads, K key/value heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rope"]


def _rotate(x_BTHE: Tensor, cos_BT1E: Tensor, sin_BT1E: Tensor) -> Tensor:
    first, second = x_BTHE.chunk(2, dim=-1)
    turned = x_BTHE * cos_BT1E + torch.cat((-second, first), dim=-1) * sin_BT1E
    return turned.to(x_BTHE.dtype)


def rope(q_BTHE: Tensor, k_BTKE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the feature pairs (e, e + E/2) of every head by the angle of its position.

    cos_BTE and sin_BTE hold E/2 angles twice, batch 1 allowed; in float32 for narrower q and k, so that the product is
    rounded once. Su et al. 2021, "RoFormer", equation 34, with Hugging Face's pairing of halves.
    """
    cos_BT1E, sin_BT1E = cos_BTE.unsqueeze(-2), sin_BTE.unsqueeze(-2)
    return _rotate(q_BTHE, cos_BT1E, sin_BT1E), _rotate(k_BTKE, cos_BT1E, sin_BT1E)
