"""Root-mean-square norm, alone or after the residual addition.

Legend: N rows (all leading dims), D features, G summands. "fp32" means promote(dtype, float32).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rung_kernels import reference
from rung_kernels.dispatch import uses_triton
from rung_kernels.op import is_plain, make_op

__all__ = ["add_rms_norm", "rms_norm"]

_MAX_FEATURES = 16384  # of triton_kernels.norm, which is not imported before it is needed


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32, rounded once to x's dtype.

    x [..., D], weight [D] -> [..., D]. Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    Moves 2·N·D elements forward, 3·N·D backward; the gradient of the weight is summed in fp32, in a fixed order.
    """
    if not _fits("rms_norm", x, weight):
        return reference.rms_norm(x, weight, eps)
    y: Tensor = _rms_norm(x, weight, eps)[0]
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(stream), stream) with stream = residual + x: a sublayer's output joins the residual stream, of which
    the next sublayer reads the norm.

    x [..., D] in the sublayer's dtype, residual [..., D] in its own (fp32 beside a bfloat16 x keeps small updates),
    weight [D] -> normed [..., D] in x's dtype, stream [..., D] in residual's dtype, rounded before the norm is taken.
    Both outputs may be used any number of times: nothing is overwritten. Moves 4·N·D elements forward, as many backward
    (5 where dtypes differ).
    """
    if x.shape != residual.shape:
        raise ValueError(f"x {tuple(x.shape)} and residual {tuple(residual.shape)} must have the same shape")
    if not _fits("add_rms_norm", x, residual, weight):
        return reference.add_rms_norm(x, residual, weight, eps)
    y, stream, _ = _add_rms_norm(x, residual, weight, eps)
    return y, stream


def _fits(op: str, x: Tensor, *others: Tensor) -> bool:
    return uses_triton(op, x, *others) and 0 < x.shape[-1] <= _MAX_FEATURES


def _rows(x: Tensor) -> Tensor:
    """[N, D] with contiguous features; a view where strides allow it."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 or x_ND.shape[1] == 1 else x_ND.contiguous()


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from rung_kernels.triton_kernels import norm

    x_ND, y = _rows(x), _empty(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    norm.forward(x_ND, None, weight.contiguous(), eps, y.view(x_ND.shape), None, rstd)
    return y, rstd


def _fake_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _empty(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _backward(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, _, grad_weight = _both_backward(grad_y, None, x, weight, rstd, x.dtype)
    return grad_x, grad_weight


def _both_backward(
    grad_y: Tensor,
    grad_stream: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    narrow: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    from rung_kernels.triton_kernels import norm

    x_ND = _rows(x)
    grad_x, grad_narrow = _empty(x), None if narrow == x.dtype else _empty(x, narrow)
    summands_GD = torch.empty(norm.num_programs(x_ND), x_ND.shape[1], dtype=torch.float32, device=x.device)
    norm.backward(
        _rows(grad_y),
        None if grad_stream is None else _rows(grad_stream),
        x_ND,
        weight.contiguous(),
        rstd,
        grad_x.view(x_ND.shape),
        None if grad_narrow is None else grad_narrow.view(x_ND.shape),
        summands_GD,
    )
    return grad_x, grad_narrow, summands_GD.sum(0).to(weight.dtype)


def _fake_backward(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(x), _empty(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _differentiate(ctx: Any, backward: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad_y is None:
        return None, None, None
    return *backward(grad_y, *ctx.saved_tensors), None


_rms_norm = make_op(
    "rms_norm",
    _forward,
    _backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    differentiate=_differentiate,
)


def _add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from rung_kernels.triton_kernels import norm

    x_ND, y, stream = _rows(x), _empty(x), _empty(residual)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    norm.forward(x_ND, _rows(residual), weight.contiguous(), eps, y.view(x_ND.shape), stream.view(x_ND.shape), rstd)
    return y, stream, rstd


def _fake_add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x), _empty(residual), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _add_backward(
    grad_y: Tensor, grad_stream: Tensor | None, stream: Tensor, weight: Tensor, rstd: Tensor, narrow: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the residual, of x (empty where it is the same) and of the weight."""
    grad, grad_narrow, grad_weight = _both_backward(grad_y, grad_stream, stream, weight, rstd, narrow)
    return grad, stream.new_empty(0, dtype=narrow) if grad_narrow is None else grad_narrow, grad_weight


def _fake_add_backward(
    grad_y: Tensor, grad_stream: Tensor | None, stream: Tensor, weight: Tensor, rstd: Tensor, narrow: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = stream.new_empty(0, dtype=narrow) if narrow == stream.dtype else _empty(stream, narrow)
    return _empty(stream), grad_x, _empty(weight)


def _add_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, weight, _ = inputs
    _, stream, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.narrow = x.dtype
    ctx.save_for_backward(stream, weight, rstd)


def _add_differentiate(
    ctx: Any, backward: Any, grad_y: Tensor | None, grad_stream: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    stream, weight, rstd = ctx.saved_tensors
    if grad_y is None:
        grad_x = None if grad_stream is None else grad_stream.to(ctx.narrow)
        return grad_x, grad_stream, None, None
    if grad_stream is None and not is_plain(grad_y):  # the operator's rules want a tensor to spread
        grad_stream = torch.zeros_like(stream)
    grad, grad_x, grad_weight = backward(grad_y, grad_stream, stream, weight, rstd, ctx.narrow)
    return (grad if ctx.narrow == stream.dtype else grad_x), grad, grad_weight, None


_add_rms_norm = make_op(
    "add_rms_norm",
    _add_forward,
    _add_backward,
    fake_forward=_fake_add_forward,
    fake_backward=_fake_add_backward,
    save=_add_save,
    differentiate=_add_differentiate,
)
