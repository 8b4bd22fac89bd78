"""Rotary position embedding.

Legend: B batch, T tokens, H query heads, K key/value heads, E head size, A batch of the tables (1 or B).
"fp32" means promote(dtype, float32).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rung_kernels import reference
from rung_kernels.dispatch import uses_triton
from rung_kernels.op import make_op

__all__ = ["rope"]

_MAX_HEAD_SIZE = 8192  # of triton_kernels.rope, which is not imported before it is needed


def rope(q_BTHE: Tensor, k_BTKE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the feature pairs (e, e + E/2) of every head by the angle of its token: a block of a rotation matrix,
    whose backward pass is the rotation by the negative angle.

    q [B, T, H, E], k [B, T, K, E] -> the same, contiguous. cos_BTE and sin_BTE [B or 1, T, E] hold E/2 angles twice;
    float32 beside narrower q and k, so that the product is rounded once. Su et al. 2021, "RoFormer", equation 34, with
    Hugging Face's pairing of halves. Moves 2·T·(H+K)·E elements per sequence and direction, in one launch, and reads
    the first halves of the tables. Queries and keys may be views of one projection: they are read where they lie, if
    features are contiguous. Tables that require a gradient run the reference. Raises ValueError for other shapes.
    """
    _check_shapes(q_BTHE, k_BTKE, cos_BTE, sin_BTE)
    learned = torch.is_grad_enabled() and (cos_BTE.requires_grad or sin_BTE.requires_grad)
    if learned or q_BTHE.shape[-1] > _MAX_HEAD_SIZE or not uses_triton("rope", q_BTHE, k_BTKE, cos_BTE, sin_BTE):
        return reference.rope(q_BTHE, k_BTKE, cos_BTE, sin_BTE)
    q_out, k_out = _rope(q_BTHE, k_BTKE, cos_BTE, sin_BTE)
    return q_out, k_out


def _check_shapes(q_BTHE: Tensor, k_BTKE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> None:
    q, k, cos, sin = (tuple(t.shape) for t in (q_BTHE, k_BTKE, cos_BTE, sin_BTE))
    fits = len(q) == len(k) == 4 and (*q[:2], q[3]) == (*k[:2], k[3]) and q[3] % 2 == 0
    if not fits or cos != sin or len(cos) != 3 or cos[1:] != (q[1], q[3]) or cos[0] not in (1, q[0]):
        raise ValueError(
            f"rope takes q [B, T, H, E], k [B, T, K, E] with an even E, and cos and sin [B or 1, T, E]; "
            f"these are q {q}, k {k}, cos {cos}, sin {sin}"
        )


def _features(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    from rung_kernels.triton_kernels import rope

    q_out, k_out = _empty(q), _empty(k)
    rope.turn(_features(q), _features(k), _features(cos), _features(sin), q_out, k_out, back=back)
    return q_out, k_out


def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turn(q, k, cos, sin, back=False)


def _backward(grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turn(grad_q, grad_k, cos, sin, back=True)


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(q), _empty(k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[2:])


def _differentiate(ctx: Any, backward: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Any, ...]:
    # The operator takes both: what nobody asked for becomes a tensor of no heads.
    if grad_q is None and grad_k is None:
        return None, None, None, None
    q = _headless(grad_k) if grad_q is None and grad_k is not None else grad_q
    k = _headless(grad_q) if grad_k is None and grad_q is not None else grad_k
    turned_q, turned_k = backward(q, k, *ctx.saved_tensors)
    return None if grad_q is None else turned_q, None if grad_k is None else turned_k, None, None


def _headless(grad: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:2], 0, grad.shape[3])


_rope = make_op(
    "rope",
    _forward,
    _backward,
    fake_forward=_fake,
    fake_backward=_fake,
    save=_save,
    differentiate=_differentiate,
)
