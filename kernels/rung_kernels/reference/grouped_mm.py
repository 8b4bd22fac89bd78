"""A matrix product per group of rows, by definition.

Legend: M rows, X groups (experts), D features in, F features out.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["grouped_mm", "grouped_mm_backward"]


def grouped_mm(x_MD: Tensor, weights_XDF: Tensor, offsets_X: Tensor) -> Tensor:
    """y[m] = x[m] @ weights[group of m] -> [M, F]; group g is the rows offsets[g-1] .. offsets[g], rows after the last
    offset are 0. A loop over the groups; asks the device for the offsets, once.
    """
    ys = [x @ weight for x, weight in zip(_pieces(x_MD, offsets_X), weights_XDF.unbind(0), strict=True)]
    left = x_MD.shape[0] - sum(y.shape[0] for y in ys)
    return torch.cat([*ys, x_MD.new_zeros(left, weights_XDF.shape[2])])


def grouped_mm_backward(grad_MF: Tensor, x_MD: Tensor, weights_XDF: Tensor, offsets_X: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weights: 0 in rows after the last offset, and for groups that are empty."""
    pieces = list(zip(_pieces(x_MD, offsets_X), _pieces(grad_MF, offsets_X), strict=True))
    dxs = [grad @ weight.T for (_, grad), weight in zip(pieces, weights_XDF.unbind(0), strict=True)]
    left = x_MD.shape[0] - sum(dx.shape[0] for dx in dxs)
    dweights = torch.empty_like(weights_XDF)
    for dweight, (x, grad) in zip(dweights.unbind(0), pieces, strict=True):
        torch.mm(x.T, grad, out=dweight)
    return torch.cat([*dxs, torch.zeros_like(x_MD[:left])]), dweights


def _pieces(x: Tensor, offsets_X: Tensor) -> list[Tensor]:
    ends = offsets_X.tolist()
    return [x[start:end] for start, end in zip([0, *ends], ends, strict=False)]
