"""Attention over two sets of keys from attention over each.

Legend: B, T, H leading dims, E head size, N queries times heads. "fp32" means promote(dtype, float32).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rung_kernels import reference
from rung_kernels.dispatch import uses_triton
from rung_kernels.op import make_op

__all__ = ["merge_lse"]

_MAX_FEATURES = 4096  # of triton_kernels.merge_lse, which is not imported before it is needed


def merge_lse(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each -> (out [..., E], lse [...]), both in fp32.

    out_a, out_b: [..., E]; lse_a, lse_b: [...] log-sum-exp of their scores, -inf where a query saw no key of the set;
    one that saw none at all has out 0, lse -inf and gradients 0. Any dtypes, any strides: views are read in place.
    Rounding to a narrower dtype is left to the caller, once, after the last merge. Liu et al. 2023, "Ring Attention
    with Blockwise Transformers", section 3. Moves 3·N·E elements forward, 5·N·E backward. Raises ValueError for shapes
    that do not fit.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or out_a.shape[:-1] != lse_a.shape:
        raise ValueError(
            f"out_a {tuple(out_a.shape)} and out_b {tuple(out_b.shape)} must have one shape [..., E], and lse_a "
            f"{tuple(lse_a.shape)} and lse_b {tuple(lse_b.shape)} be [...]"
        )
    tensors = (out_a, lse_a, out_b, lse_b)
    if not uses_triton("merge_lse", *tensors) or out_a.shape[-1] > _MAX_FEATURES:
        return reference.merge_lse(*tensors)
    merged: tuple[Tensor, Tensor] = _merge_lse(*tensors)
    return merged


def _leading(x: Tensor, num_leading: int) -> Tensor:
    """With three leading dims; a view unless there are more and strides do not let them be one."""
    if num_leading > 3:
        return x.flatten(0, num_leading - 3)
    return x[(None,) * (3 - num_leading)]


def _forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    from rung_kernels.triton_kernels import merge_lse as kernels

    out, lse = _fake_forward(out_a, lse_a, out_b, lse_b)
    kernels.forward(*(_leading(x, lse.ndim) for x in (out_a, lse_a, out_b, lse_b, out, lse)))
    return out, lse


def _fake_forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape, dtype=torch.float32), lse_a.new_empty(lse_a.shape, dtype=torch.float32)


def _backward(
    grad_out: Tensor, grad_lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from rung_kernels.triton_kernels import merge_lse as kernels

    inputs = grad_out, grad_lse, out_a, lse_a, out_b, lse_b
    grads = _fake_backward(*inputs)
    kernels.backward(*(_leading(x, lse_a.ndim) for x in (*inputs, *grads)))
    return grads


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d = (x.new_empty(x.shape) for x in (out_a, lse_a, out_b, lse_b))
    return a, b, c, d


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, backward: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None and grad_lse is None:
        return None, None, None, None
    out_a, lse_a, _, _ = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out_a)
    if grad_lse is None:
        grad_lse = torch.zeros_like(lse_a)
    return tuple(backward(grad_out, grad_lse, *ctx.saved_tensors))


_merge_lse = make_op(
    "merge_lse",
    _forward,
    _backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    differentiate=_differentiate,
)
