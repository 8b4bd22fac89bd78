"""Attention over two sets of keys from attention over each, by definition.

Legend: E head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["merge_lse"]


def merge_lse(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """lse = log(exp lse_a + exp lse_b), out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b, both in fp32.

    out_a, out_b: [..., E]; lse_a, lse_b: [...] log-sum-exp of the scores, -inf where a query saw no key of the set. A
    query that saw none at all has out 0, lse -inf and gradients 0. Milakov & Gimelshein 2018, "Online normalizer
    calculation for softmax", equation 4, on whole sets.
    """
    fp32 = torch.float32
    for tensor in (out_a, lse_a, out_b, lse_b):
        fp32 = torch.promote_types(fp32, tensor.dtype)
    lse_a, lse_b = lse_a.to(fp32), lse_b.to(fp32)
    neither = (lse_a == -math.inf) & (lse_b == -math.inf)
    # Zeros in those rows: the gradient of logaddexp is NaN where both are -inf, and so is -inf - -inf.
    base = torch.logaddexp(lse_a.masked_fill(neither, 0.0), lse_b.masked_fill(neither, 0.0)).masked_fill(neither, 0.0)
    weight_a, weight_b = torch.exp(lse_a - base).unsqueeze(-1), torch.exp(lse_b - base).unsqueeze(-1)
    return out_a.to(fp32) * weight_a + out_b.to(fp32) * weight_b, base.masked_fill(neither, -math.inf)
