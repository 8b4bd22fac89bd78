"""Cross-entropy of a linear head.

Legend: N rows (tokens), D features, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from rung_kernels.reference.cross_entropy import cross_entropy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    ignore_index: int = -100,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
    first: int = 0,
    reduction: str = "none",
    chunk_size: int | None = None,
) -> Tensor:
    """``cross_entropy`` of x · weightᵀ, ``chunk_size`` rows at a time (None: all) -> losses_N, or their sum.

    Autograd keeps the logits of every chunk. With a group the gradient of x is this rank's summand.
    """
    size = max(1, x_ND.shape[0] if chunk_size is None else chunk_size)
    losses_N = torch.cat(
        [
            cross_entropy(
                F.linear(x_CD, weight_VD),
                labels_C,
                ignore_index,
                z_loss=z_loss,
                label_smoothing=label_smoothing,
                group=group,
                first=first,
            )
            for x_CD, labels_C in zip(x_ND.split(size), labels_N.split(size), strict=True)
        ]
    )
    return losses_N.sum() if reduction == "sum" else losses_N
