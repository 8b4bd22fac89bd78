"""Root-mean-square norm, with or without the residual addition before it.

Legend: N rows, D features, G programs of the backward pass. Rows in tiles, so that narrow ones (heads) fill a program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rung_kernels.triton_kernels.launch import launch, num_multiprocessors

__all__ = ["MAX_FEATURES", "backward", "forward", "num_programs"]

MAX_FEATURES = 16384  # a row and its sums are held in registers
_TILE = 4096  # elements of a tile, where rows are narrower


@triton.jit
def _rms_norm_forward(
    x,
    residual,
    weight,
    y,
    total,
    rstd,
    num_rows,
    num_features,
    x_stride,
    residual_stride,
    eps,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    columns = tl.arange(0, FEATURES)
    here = (rows < num_rows)[:, None] & (columns < num_features)[None, :]
    at = rows[:, None] * num_features + columns[None, :]
    values = tl.load(x + rows[:, None] * x_stride + columns[None, :], here, 0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + rows[:, None] * residual_stride + columns[None, :], here, 0.0).to(tl.float32)
        # The norm is that of the stream as it is stored, so that the backward pass sees the same numbers.
        values = values.to(total.dtype.element_ty)
        tl.store(total + at, values, here)
        values = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / num_features + eps)
    tl.store(rstd + rows, scale, rows < num_rows)
    weights = tl.load(weight + columns, columns < num_features, 0.0).to(tl.float32)
    tl.store(y + at, (values * scale[:, None] * weights[None, :]).to(y.dtype.element_ty), here)


@triton.jit
def _rms_norm_backward(
    grad_y,
    grad_stream,
    x,
    weight,
    rstd,
    grad_x,
    grad_narrow,
    grad_weights,
    num_rows,
    num_features,
    grad_y_stride,
    grad_stream_stride,
    x_stride,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    columns = tl.arange(0, FEATURES)
    inside = columns < num_features
    weights = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    grad_weight = tl.zeros([FEATURES], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        here = (rows < num_rows)[:, None] & inside[None, :]
        at = rows[:, None] * num_features + columns[None, :]
        values = tl.load(x + rows[:, None] * x_stride + columns[None, :], here, 0.0).to(tl.float32)
        grads = tl.load(grad_y + rows[:, None] * grad_y_stride + columns[None, :], here, 0.0).to(tl.float32)
        scale = tl.load(rstd + rows, rows < num_rows, 0.0)[:, None]
        normed = values * scale
        grad_weight += tl.sum(grads * normed, 0)
        grads *= weights[None, :]
        dot = tl.sum(grads * normed, 1)[:, None] / num_features
        out = (grads - normed * dot) * scale
        if grad_stream is not None:
            out += tl.load(grad_stream + rows[:, None] * grad_stream_stride + columns[None, :], here, 0.0).to(
                tl.float32
            )
        tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), here)
        if grad_narrow is not None:
            tl.store(grad_narrow + at, out.to(grad_narrow.dtype.element_ty), here)
    tl.store(grad_weights + tl.program_id(0).to(tl.int64) * num_features + columns, grad_weight, inside)


def forward(
    x_ND: Tensor,
    residual_ND: Tensor | None,
    weight_D: Tensor,
    eps: float,
    y_ND: Tensor,
    stream_ND: Tensor | None,
    rstd_N: Tensor,
) -> None:
    """Fill y, rstd (fp32) and, with a residual, the stream. The last dim of every tensor is contiguous."""
    num_rows, num_features = x_ND.shape
    features = triton.next_power_of_2(num_features)
    rows = max(1, _TILE // 4 // features)
    launch(
        _rms_norm_forward,
        (triton.cdiv(num_rows, rows),),
        x=x_ND,
        residual=residual_ND,
        weight=weight_D,
        y=y_ND,
        total=stream_ND,  # `stream` is a word of Triton's own
        rstd=rstd_N,
        num_rows=num_rows,
        num_features=num_features,
        x_stride=x_ND.stride(0),
        residual_stride=0 if residual_ND is None else residual_ND.stride(0),
        eps=eps,
        ROWS=rows,
        FEATURES=features,
        num_warps=_num_warps(rows * features),
    )


def num_programs(x_ND: Tensor) -> int:
    """Programs of the backward pass, each of which leaves one row of summands of the weight's gradient."""
    rows = _backward_rows(x_ND.shape[1])
    return min(triton.cdiv(x_ND.shape[0], rows), 4 * num_multiprocessors(x_ND.device))


def backward(
    grad_y_ND: Tensor,
    grad_stream_ND: Tensor | None,
    x_ND: Tensor,
    weight_D: Tensor,
    rstd_N: Tensor,
    grad_x_ND: Tensor,
    grad_narrow_ND: Tensor | None,
    grad_weights_GD: Tensor,
) -> None:
    """Fill the gradient of x, once more in another dtype where ``grad_narrow`` is given, and summands of the weight's.

    G = ``num_programs(x_ND)``.
    """
    num_rows, num_features = x_ND.shape
    features, rows = triton.next_power_of_2(num_features), _backward_rows(num_features)
    launch(
        _rms_norm_backward,
        (grad_weights_GD.shape[0],),
        grad_y=grad_y_ND,
        grad_stream=grad_stream_ND,
        x=x_ND,
        weight=weight_D,
        rstd=rstd_N,
        grad_x=grad_x_ND,
        grad_narrow=grad_narrow_ND,
        grad_weights=grad_weights_GD,
        num_rows=num_rows,
        num_features=num_features,
        grad_y_stride=grad_y_ND.stride(0),
        grad_stream_stride=0 if grad_stream_ND is None else grad_stream_ND.stride(0),
        x_stride=x_ND.stride(0),
        ROWS=rows,
        FEATURES=features,
        num_warps=_num_warps(rows * features),
    )


def _backward_rows(num_features: int) -> int:
    return max(1, _TILE // 4 // triton.next_power_of_2(num_features))


def _num_warps(elements: int) -> int:
    """About 16 elements a thread."""
    return min(16, max(4, elements // 512))
