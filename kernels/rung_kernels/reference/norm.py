"""Root-mean-square norm, by definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32, rounded once to x's dtype.

    x [..., D], weight [D] -> [..., D]. Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(stream) in x's dtype, stream in residual's dtype), stream = residual + x rounded before the norm.

    x, residual [..., D], weight [D].
    """
    stream = (residual + x).to(residual.dtype)
    if stream.dtype == x.dtype == weight.dtype:
        return rms_norm(stream, weight, eps), stream
    fp32 = torch.promote_types(stream.dtype, torch.float32)
    return F.rms_norm(stream.to(fp32), (x.shape[-1],), weight.to(fp32), eps).to(x.dtype), stream
