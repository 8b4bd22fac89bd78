"""A matrix product per group of rows: what a layer of experts does with tokens that are sorted by expert.

Legend: M rows, X groups (experts), D features in, F features out. "fp32" means promote(dtype, float32).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rung_kernels import reference
from rung_kernels.dispatch import backend, uses_triton
from rung_kernels.op import is_plain, make_op
from rung_kernels.reference.grouped_mm import grouped_mm_backward

__all__ = ["grouped_mm", "grouped_mm_engine"]

_cutlass: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_CUTLASS_GROUPS = 1024  # the kernel that prepares the products has a thread for each, in one block


def grouped_mm(x_MD: Tensor, weights_XDF: Tensor, offsets_X: Tensor) -> Tensor:
    """y[m] = x[m] @ weights[group of m], sums in fp32, rounded once -> [M, F] in x's dtype.

    offsets_X: int32 or int64, where each group ends, never decreasing, at most M: group g is the rows offsets[g-1] ..
    offsets[g] (Gale et al. 2022, "MegaBlocks", section 4, with as many rows as there are). Groups may be empty: the
    gradient of their weights is 0. Rows after the last offset are 0, and so is their gradient. x and weights have one
    dtype and any strides (``stored.mT`` costs nothing).

    Moves (M·D + X·D·F + M·F) elements and takes 2·M·D·F operations; backward twice that. ``grouped_mm_engine`` says
    which code runs; all but the loop leave the host unaware of the offsets. Raises ValueError for tensors that do not
    fit together.
    """
    if (
        x_MD.ndim != 2
        or weights_XDF.ndim != 3
        or x_MD.shape[1] != weights_XDF.shape[1]
        or offsets_X.shape != weights_XDF.shape[:1]
    ):
        raise ValueError(
            f"x {tuple(x_MD.shape)}, weights {tuple(weights_XDF.shape)} and offsets {tuple(offsets_X.shape)} must be "
            "[M, D], [X, D, F] and [X]"
        )
    if x_MD.dtype != weights_XDF.dtype or offsets_X.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"x ({x_MD.dtype}) and weights ({weights_XDF.dtype}) must have the same dtype, and offsets "
            f"({offsets_X.dtype}) be int32 or int64"
        )
    tensors = (x_MD, weights_XDF, offsets_X)
    if is_plain(*tensors) and grouped_mm_engine(*tensors) == "loop":
        return reference.grouped_mm(*tensors)
    # The loop, too, is an operator where something traces: its lengths are known only when it runs.
    y_MF: Tensor = _grouped_mm(*tensors)
    return y_MF


def grouped_mm_engine(x_MD: Tensor, weights_XDF: Tensor, offsets_X: Tensor) -> str:
    """What computes this: triton; cutlass (torch's kernel for Hopper and datacentre Blackwell, bfloat16 rows of a
    multiple of 16 bytes); or loop, one product after the other, for which the host reads the offsets."""
    if uses_triton("grouped_mm", x_MD, weights_XDF):
        return "triton"
    num_groups, num_inner, num_columns = weights_XDF.shape
    if (
        _cutlass is not None
        and x_MD.device.type == "cuda"
        and torch.version.hip is None
        and x_MD.dtype == torch.bfloat16
        and num_inner % 8 == num_columns % 8 == 0
        and 0 < num_groups <= _CUTLASS_GROUPS
        and 0 not in (x_MD.shape[0], num_inner, num_columns)
        and torch.cuda.get_device_capability(x_MD.device)[0] in (9, 10)
    ):
        return "cutlass"
    return "loop"


def _forward(x_MD: Tensor, weights_XDF: Tensor, offsets_X: Tensor) -> Tensor:
    engine = grouped_mm_engine(x_MD, weights_XDF, offsets_X)
    if engine == "loop":
        return reference.grouped_mm(x_MD, weights_XDF, offsets_X)
    if engine == "cutlass":
        return _cutlass_rows(x_MD, weights_XDF, offsets_X)
    return _triton_rows(x_MD, weights_XDF, offsets_X)


def _triton_rows(x_MD: Tensor, weights_XDF: Tensor, offsets_X: Tensor) -> Tensor:
    from rung_kernels.triton_kernels import grouped_mm as kernels

    y_MF = _fake_forward(x_MD, weights_XDF, offsets_X)
    kernels.forward(x_MD, weights_XDF, offsets_X.contiguous(), y_MF)
    return y_MF


def _cutlass_rows(x_MD: Tensor, weights_XDF: Tensor, offsets_X: Tensor) -> Tensor:
    """torch leaves rows after the last offset as it finds them."""
    y_MF: Tensor = _cutlass(_aligned(x_MD), _aligned(weights_XDF), offs=offsets_X.to(torch.int32)).contiguous()
    if _clears():
        from rung_kernels.triton_kernels import grouped_mm as kernels

        kernels.clear_rows(y_MF, offsets_X.contiguous())
        return y_MF
    rows_M = torch.arange(y_MF.shape[0], device=y_MF.device)
    return y_MF.masked_fill_((rows_M >= offsets_X[-1]).unsqueeze(1), 0.0)


def _cutlass_weights(x_MD: Tensor, grad_MF: Tensor, offsets_X: Tensor, weights_XDF: Tensor) -> Tensor:
    """In the layout of the weights. On Blackwell torch leaves what it finds for an empty group (pytorch#172439)."""
    x_MD, grad_MF = _aligned(x_MD), _aligned(grad_MF)
    transposed = weights_XDF.stride(1) < weights_XDF.stride(2)
    a, b = (grad_MF, x_MD) if transposed else (x_MD, grad_MF)
    grad: Tensor = _cutlass(a.T, b, offs=offsets_X.to(torch.int32)).contiguous()
    if _clears():
        from rung_kernels.triton_kernels import grouped_mm as kernels

        kernels.clear_weights(grad, offsets_X.contiguous(), x_MD.shape[0])
    else:
        grad.masked_fill_((offsets_X.diff(prepend=offsets_X.new_zeros(1)) == 0).view(-1, 1, 1), 0.0)
    return grad.mT if transposed else grad


def _clears() -> bool:
    """Whether kernels clear what torch leaves: they mostly see in the offsets that there is nothing to do, where torch
    would pass over it all."""
    return backend() != "torch" and _HAS_TRITON


def _aligned(x: Tensor) -> Tensor:
    """As torch's kernel reads it: one of the last two dims contiguous, the other and the start at 16 bytes."""
    rows, columns = x.stride()[-2:]
    steps = rows if columns == 1 else columns if rows == 1 else 1
    least = x.shape[-1] if columns == 1 else x.shape[-2]
    outer = x.stride(0) if x.ndim == 3 else 0
    fits = steps % 8 == outer % 8 == x.data_ptr() % 16 == 0 and steps >= least
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _fake_forward(x_MD: Tensor, weights_XDF: Tensor, offsets_X: Tensor) -> Tensor:
    return x_MD.new_empty(x_MD.shape[0], weights_XDF.shape[2])


def _backward(grad_MF: Tensor, x_MD: Tensor, weights_XDF: Tensor, offsets_X: Tensor) -> tuple[Tensor, Tensor]:
    engine = grouped_mm_engine(x_MD, weights_XDF, offsets_X)
    if engine == "loop":
        return grouped_mm_backward(grad_MF, x_MD, weights_XDF, offsets_X)
    if engine == "cutlass":
        grad_x = _cutlass_rows(grad_MF, weights_XDF.mT, offsets_X)
        return grad_x, _cutlass_weights(x_MD, grad_MF, offsets_X, weights_XDF)
    from rung_kernels.triton_kernels import grouped_mm as kernels

    grad_weights = torch.empty_like(weights_XDF)
    kernels.weights_backward(x_MD, grad_MF, offsets_X.contiguous(), grad_weights)
    return _triton_rows(grad_MF, weights_XDF.mT, offsets_X), grad_weights


def _fake_backward(grad_MF: Tensor, x_MD: Tensor, weights_XDF: Tensor, offsets_X: Tensor) -> tuple[Tensor, Tensor]:
    return x_MD.new_empty(x_MD.shape), torch.empty_like(weights_XDF)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, backward: Any, grad_MF: Tensor | None) -> tuple[Any, ...]:
    if grad_MF is None:
        return None, None, None
    return *backward(grad_MF, *ctx.saved_tensors), None


_grouped_mm = make_op(
    "grouped_mm",
    _forward,
    _backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    differentiate=_differentiate,
)
