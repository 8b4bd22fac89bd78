"""SwiGLU.

Legend: N rows (all leading dims), F features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rung_kernels import reference
from rung_kernels.dispatch import uses_triton
from rung_kernels.op import make_op

__all__ = ["swiglu"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, element by element. Shazeer 2020, "GLU Variants Improve Transformer", equation 6.

    gate and up [..., F] -> [..., F], contiguous; where dtypes differ, in what they promote to. The kernel computes in
    fp32 and rounds once; the reference rounds silu(gate) first. Moves 3·N·F elements forward, 5·N·F backward, which
    computes silu again. gate and up may be halves of one [..., 2F]: they are read where they lie, if features are
    contiguous and leading dims merge. Raises ValueError for different shapes.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have the same shape")
    if not uses_triton("swiglu", gate, up):
        return reference.swiglu(gate, up)
    y: Tensor = _swiglu(gate, up)
    return y


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Each as [N, F] with contiguous features; as one row where nothing lies apart, so that tiles need not end there.

    Views where strides allow it.
    """
    if tensors[0].numel() == 0 or all(t.is_contiguous() for t in tensors):
        return [t.reshape(1, t.numel()) for t in tensors]
    rows = (t.reshape(-1, t.shape[-1]) for t in tensors)
    return [t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous() for t in rows]


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    from rung_kernels.triton_kernels import swiglu

    y = _fake_forward(gate, up)
    gate_NF, up_NF = _rows(gate, up)
    swiglu.forward(gate_NF, up_NF, y.view(gate_NF.shape))
    return y


def _fake_forward(gate: Tensor, up: Tensor) -> Tensor:
    return _empty(gate, torch.promote_types(gate.dtype, up.dtype))


def _backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    from rung_kernels.triton_kernels import swiglu

    grad_gate, grad_up = _empty(gate), _empty(up)
    grad_y_NF, gate_NF, up_NF = _rows(grad_y, gate, up)
    shape = gate_NF.shape
    swiglu.backward(grad_y_NF, gate_NF, up_NF, grad_gate.view(shape), grad_up.view(shape))
    return grad_gate, grad_up


def _fake_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(gate), _empty(up)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, backward: Any, grad_y: Tensor | None) -> tuple[Any, ...]:
    if grad_y is None:
        return None, None
    grads: tuple[Tensor, Tensor] = backward(grad_y, *ctx.saved_tensors)
    return grads


_swiglu = make_op(
    "swiglu",
    _forward,
    _backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    differentiate=_differentiate,
)
