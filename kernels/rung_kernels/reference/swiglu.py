"""SwiGLU, by definition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["swiglu"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, element by element. Shazeer 2020, "GLU Variants Improve Transformer", equation 6."""
    return F.silu(gate) * up
