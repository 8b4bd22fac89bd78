"""Tokens to the rows of their experts, and back.

Legend: N tokens, K experts of a token (its slots), M = N · K rows, X experts, D features.
"fp32" means promote(dtype, float32).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rung_kernels import reference
from rung_kernels.dispatch import uses_triton
from rung_kernels.op import make_op

__all__ = ["permute", "unpermute"]

_MAX_FEATURES, _MAX_SLOTS = 16384, 16  # of triton_kernels.permute, which is not imported before it is needed
_MAX_EXPERTS = 4096  # each program counts all of them


def permute(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(y [M, D], offsets [X] int32, row_of [N, K] int64) of tokens x [N, D] and their experts [N, K], integers.

    Rows of y: first the tokens of expert 0, by token, then by slot; then those of expert 1, and so on. ``offsets[e]``
    is where expert e's rows end, as ``grouped_mm`` wants it; ``row_of`` is the row of y that (token, slot) went to, as
    ``unpermute`` wants it. Shapes do not depend on what was chosen, and nothing waits for the device.

    An expert that is none of 0 … X - 1 is elsewhere, so that ``permute(x, experts - first, num_local)`` keeps what is
    for experts first, first + 1, …. Such a slot gets one of the rows from ``offsets[-1]`` on, which are zero, and ~row,
    which is negative, in ``row_of``.

    The gradient of a token is the sum over its copies in the order of its slots, in fp32, rounded once; what arrives
    for rows of experts elsewhere is ignored. Moves (K + 1)·N·D elements either way, and integers. ValueError for shapes
    that do not fit.
    """
    problems = []
    if x.ndim != 2 or experts.ndim != 2 or x.shape[0] != experts.shape[0]:
        problems.append(
            f"x {tuple(x.shape)} and experts {tuple(experts.shape)} must be [tokens, features], [tokens, K]"
        )
    elif experts.shape[1] < 1:
        problems.append(f"experts {tuple(experts.shape)} must have a slot for each token")
    if experts.is_floating_point() or experts.dtype == torch.bool:
        problems.append(f"experts must be integers, not {experts.dtype}")
    if num_experts < 1:
        problems.append(f"num_experts={num_experts} must be at least 1")
    if problems:
        raise ValueError("; ".join(problems))
    if num_experts > _MAX_EXPERTS or not _fits("permute", x.shape[1], experts, x):
        return reference.permute(x, experts, num_experts)
    y, offsets, row_of = _permute(x, experts, num_experts)
    return y, offsets, row_of


def unpermute(y: Tensor, row_of: Tensor, weights: Tensor | None = None) -> Tensor:
    """out[n] = Σ over slots k of weights[n, k] · y[row_of[n, k]], in fp32 slot by slot, rounded once to y's dtype.

    y [M, D], row_of [N, K] of ``permute``, weights [N, K], None: ones -> [N, D]. A slot with a negative row adds
    nothing, whatever lies there, and nothing reaches its weight or its row's gradient, which is zero.

    Moves (K + 1)·N·D elements forward, (2·K + 1)·N·D backward ((K + 1)·N·D without weights). ValueError for shapes that
    do not fit.
    """
    if y.ndim != 2 or row_of.ndim != 2 or row_of.numel() != y.shape[0]:
        raise ValueError(
            f"y {tuple(y.shape)} must be [rows, features] with a row for each element of row_of {tuple(row_of.shape)}"
        )
    if weights is not None and weights.shape != row_of.shape:
        raise ValueError(f"weights {tuple(weights.shape)} and row_of {tuple(row_of.shape)} must have the same shape")
    if not _fits("unpermute", y.shape[1], row_of, y, weights):
        return reference.unpermute(y, row_of, weights)
    out: Tensor = _unpermute(y, row_of, weights)
    return out


def _fits(op: str, num_features: int, slots: Tensor, *tensors: Tensor | None) -> bool:
    return uses_triton(op, *tensors) and 0 < num_features <= _MAX_FEATURES and 0 < slots.shape[1] <= _MAX_SLOTS


def _rows(x: Tensor) -> Tensor:
    """With contiguous features."""
    return x if x.stride(1) == 1 else x.contiguous()


def _forward(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    from rung_kernels.triton_kernels import permute

    outputs = y, offsets, row_of = _fake_forward(x, experts, num_experts)
    experts = experts.contiguous()
    blocks = permute.num_blocks(experts.numel())
    counts_XG = torch.empty(num_experts + 1, blocks, dtype=torch.int32, device=x.device)
    permute.count(experts, counts_XG)
    ends_XG = counts_XG.view(-1).cumsum(0, dtype=torch.int32).view(counts_XG.shape)
    permute.place(experts, ends_XG, offsets, row_of)
    permute.copy(_rows(x), row_of, None, None, y, None)
    return outputs


def _fake_forward(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(experts.shape[0] * experts.shape[1], x.shape[1]),
        x.new_empty(num_experts, dtype=torch.int32),
        x.new_empty(experts.shape, dtype=torch.int64),
    )


def _backward(grad_y: Tensor, row_of: Tensor) -> Tensor:
    return _unpermute_forward(grad_y, row_of, None)


def _fake_backward(grad_y: Tensor, row_of: Tensor) -> Tensor:
    return grad_y.new_empty(row_of.shape[0], grad_y.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, offsets, row_of = output
    ctx.mark_non_differentiable(offsets, row_of)
    ctx.save_for_backward(row_of)


def _differentiate(ctx: Any, backward: Any, grad_y: Tensor | None, _: None, __: None) -> tuple[Any, ...]:
    return None if grad_y is None else backward(grad_y, *ctx.saved_tensors), None, None


def _unpermute_forward(y: Tensor, row_of: Tensor, weights: Tensor | None) -> Tensor:
    from rung_kernels.triton_kernels import permute

    out = _fake_unpermute_forward(y, row_of, weights)
    permute.combine(_rows(y), row_of.contiguous(), None if weights is None else weights.contiguous(), out)
    return out


def _fake_unpermute_forward(y: Tensor, row_of: Tensor, weights: Tensor | None) -> Tensor:
    return y.new_empty(row_of.shape[0], y.shape[1])


def _unpermute_backward(
    grad_out: Tensor, y: Tensor | None, row_of: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the weights (empty where there are none)."""
    from rung_kernels.triton_kernels import permute

    grad_y, grad_weights = _fake_unpermute_backward(grad_out, y, row_of, weights)
    if weights is None or y is None:
        permute.copy(_rows(grad_out), row_of.contiguous(), None, None, grad_y, None)
    else:
        sums = torch.empty(weights.shape, dtype=torch.float32, device=weights.device)
        permute.copy(_rows(grad_out), row_of.contiguous(), weights.contiguous(), _rows(y), grad_y, sums)
        grad_weights = sums.to(weights.dtype)
    return grad_y, grad_weights


def _fake_unpermute_backward(
    grad_out: Tensor, y: Tensor | None, row_of: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    grad_y = grad_out.new_empty(row_of.numel(), grad_out.shape[1])
    return grad_y, grad_out.new_empty(0) if weights is None else weights.new_empty(weights.shape)


def _unpermute_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, row_of, weights = inputs
    ctx.save_for_backward(None if weights is None else y, row_of, weights)


def _unpermute_differentiate(ctx: Any, backward: Any, grad_out: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None:
        return None, None, None
    y, row_of, weights = ctx.saved_tensors
    grad_y, grad_weights = backward(grad_out, y, row_of, weights)
    return grad_y, None, None if weights is None else grad_weights


_permute = make_op(
    "permute",
    _forward,
    _backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    differentiate=_differentiate,
)
_unpermute = make_op(
    "unpermute",
    _unpermute_forward,
    _unpermute_backward,
    fake_forward=_fake_unpermute_forward,
    fake_backward=_fake_unpermute_backward,
    save=_unpermute_save,
    differentiate=_unpermute_differentiate,
)
