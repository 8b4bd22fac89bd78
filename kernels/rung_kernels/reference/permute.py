"""Tokens to the rows of their experts and back, by definition.

Legend: N tokens, K experts of a token (its slots), M = N · K rows, X experts, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["permute", "unpermute"]


class _CopyTokens(torch.autograd.Function):
    """y[order[m]'s token] for every row; the gradient sums a token's copies in the order of its slots, in fp32.

    Indexing's own gradient adds copy by copy in the tensor's dtype, rounding each time.
    """

    @staticmethod
    def forward(x_ND: Tensor, order_M: Tensor, here_M: Tensor, row_of_NK: Tensor) -> Tensor:
        return x_ND.index_select(0, order_M // row_of_NK.shape[1]).masked_fill(~here_M[:, None], 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        ctx.save_for_backward(inputs[3])

    @staticmethod
    def backward(ctx: Any, grad_y_MD: Tensor) -> tuple[Tensor, None, None, None]:
        (row_of_NK,) = ctx.saved_tensors
        return unpermute(grad_y_MD, row_of_NK), None, None, None


class _Reorder(torch.autograd.Function):
    """y[row_M], every row once: its gradient is the inverse, where indexing's own would add to zeros."""

    @staticmethod
    def forward(y_MD: Tensor, row_M: Tensor) -> Tensor:
        return y_MD.index_select(0, row_M)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:
        (row_M,) = ctx.saved_tensors
        return grad_MD.index_select(0, row_M.argsort()), None


def permute(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(y [M, D], offsets [X] int32, row_of [N, K] int64) of x [N, D] and experts [N, K].

    Rows of y: first the tokens of expert 0, by token, then by slot; then those of expert 1, and so on to row
    ``offsets[-1]``; ``offsets[e]`` is where expert e's rows end. Then a row of zeros for each slot whose expert is none
    of 0 … X - 1. ``row_of`` is the row of y that (token, slot) went to, or, of those zeros, ~row, which is negative.
    """
    entries_M = experts.reshape(-1)
    group_M = entries_M.long().masked_fill((entries_M < 0) | (entries_M >= num_experts), num_experts)
    groups_M, order_M = group_M.sort(stable=True)
    counts = group_M.new_zeros(num_experts + 1).scatter_add(0, group_M, torch.ones_like(group_M))
    offsets_X = counts[:-1].cumsum(0).to(torch.int32)
    row_M = order_M.argsort()
    row_of_NK = torch.where(group_M < num_experts, row_M, ~row_M).view(experts.shape)
    y_MD: Tensor = _CopyTokens.apply(x, order_M, groups_M < num_experts, row_of_NK)
    return y_MD, offsets_X, row_of_NK


def unpermute(y: Tensor, row_of: Tensor, weights: Tensor | None = None) -> Tensor:
    """out[n] = Σ over slots k of weights[n, k] · y[row_of[n, k]], in fp32, rounded once to y's dtype.

    y [M, D], row_of [N, K], weights [N, K], None: ones -> [N, D]. A slot with a negative row adds nothing.
    """
    fp32 = torch.promote_types(y.dtype, torch.float32)
    rows_NKD = _of_slots(y, row_of).to(fp32)
    if weights is not None:
        rows_NKD = rows_NKD * weights.to(fp32)[..., None]
    return rows_NKD.sum(1).to(y.dtype)


def _of_slots(y_MD: Tensor, row_of_NK: Tensor) -> Tensor:
    """[N, K, D]; zeros where the row is negative, whatever lies in y."""
    row_M = torch.where(row_of_NK < 0, ~row_of_NK, row_of_NK).reshape(-1)
    rows_MD: Tensor = _Reorder.apply(y_MD, row_M)
    return rows_MD.view(*row_of_NK.shape, y_MD.shape[1]).masked_fill((row_of_NK < 0)[..., None], 0)
