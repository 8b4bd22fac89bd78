"""Joining attention over two sets of keys.

Legend: B, T, H the leading dims, whichever they are; E head size. A program takes a tile of the longest leading dim at
one place of the others, so that nothing is divided but the program's own number.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rung_kernels.triton_kernels.launch import launch

__all__ = ["MAX_FEATURES", "backward", "forward"]

MAX_FEATURES = 4096  # a row is held in registers
_TILE = 2048  # elements of a tile: 16 a thread


@triton.jit
def _weights(lse_a, lse_b):
    """What each side counts, and the joined log-sum-exp; 0, 0 and -inf where both are -inf."""
    largest = tl.maximum(lse_a, lse_b)
    neither = largest == float("-inf")
    base = tl.where(neither, 0.0, largest)
    from_a, from_b = tl.exp(lse_a - base), tl.exp(lse_b - base)
    total = tl.where(neither, 1.0, from_a + from_b)
    lse = tl.where(neither, float("-inf"), base + tl.log(total))
    return from_a / total, from_b / total, lse


@triton.jit
def _merge_lse_forward(
    out_a,
    lse_a,
    out_b,
    lse_b,
    out,
    lse,
    num_rows,
    num_seconds,
    num_features,
    out_a_rows,
    out_a_firsts,
    out_a_seconds,
    out_a_features,
    lse_a_rows,
    lse_a_firsts,
    lse_a_seconds,
    out_b_rows,
    out_b_firsts,
    out_b_seconds,
    out_b_features,
    lse_b_rows,
    lse_b_firsts,
    lse_b_seconds,
    out_rows,
    out_firsts,
    out_seconds,
    out_features,
    lse_rows,
    lse_firsts,
    lse_seconds,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    second = program % num_seconds
    tiles = tl.cdiv(num_rows, ROWS)
    tile, first = (program // num_seconds) % tiles, (program // num_seconds) // tiles
    rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
    features = tl.arange(0, FEATURES).to(tl.int64)
    inside = rows < num_rows
    here = inside[:, None] & (features < num_features)[None, :]
    a = tl.load(lse_a + first * lse_a_firsts + second * lse_a_seconds + rows * lse_a_rows, inside, 0.0).to(tl.float32)
    b = tl.load(lse_b + first * lse_b_firsts + second * lse_b_seconds + rows * lse_b_rows, inside, 0.0).to(tl.float32)
    out_a += first * out_a_firsts + second * out_a_seconds
    out_b += first * out_b_firsts + second * out_b_seconds
    values_a = tl.load(out_a + rows[:, None] * out_a_rows + features[None, :] * out_a_features, here, 0.0)
    values_b = tl.load(out_b + rows[:, None] * out_b_rows + features[None, :] * out_b_features, here, 0.0)
    weight_a, weight_b, joined = _weights(a, b)
    tl.store(lse + first * lse_firsts + second * lse_seconds + rows * lse_rows, joined, inside)
    values = values_a.to(tl.float32) * weight_a[:, None] + values_b.to(tl.float32) * weight_b[:, None]
    out += first * out_firsts + second * out_seconds
    tl.store(out + rows[:, None] * out_rows + features[None, :] * out_features, values, here)


@triton.jit
def _merge_lse_backward(
    grad_out,
    grad_lse,
    out_a,
    lse_a,
    out_b,
    lse_b,
    grad_out_a,
    grad_lse_a,
    grad_out_b,
    grad_lse_b,
    num_rows,
    num_seconds,
    num_features,
    grad_out_rows,
    grad_out_firsts,
    grad_out_seconds,
    grad_out_features,
    grad_lse_rows,
    grad_lse_firsts,
    grad_lse_seconds,
    out_a_rows,
    out_a_firsts,
    out_a_seconds,
    out_a_features,
    lse_a_rows,
    lse_a_firsts,
    lse_a_seconds,
    out_b_rows,
    out_b_firsts,
    out_b_seconds,
    out_b_features,
    lse_b_rows,
    lse_b_firsts,
    lse_b_seconds,
    grad_out_a_rows,
    grad_out_a_firsts,
    grad_out_a_seconds,
    grad_out_a_features,
    grad_lse_a_rows,
    grad_lse_a_firsts,
    grad_lse_a_seconds,
    grad_out_b_rows,
    grad_out_b_firsts,
    grad_out_b_seconds,
    grad_out_b_features,
    grad_lse_b_rows,
    grad_lse_b_firsts,
    grad_lse_b_seconds,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    second = program % num_seconds
    tiles = tl.cdiv(num_rows, ROWS)
    tile, first = (program // num_seconds) % tiles, (program // num_seconds) // tiles
    rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
    features = tl.arange(0, FEATURES).to(tl.int64)
    inside = rows < num_rows
    here = inside[:, None] & (features < num_features)[None, :]
    a = tl.load(lse_a + first * lse_a_firsts + second * lse_a_seconds + rows * lse_a_rows, inside, 0.0).to(tl.float32)
    b = tl.load(lse_b + first * lse_b_firsts + second * lse_b_seconds + rows * lse_b_rows, inside, 0.0).to(tl.float32)
    grad_lse += first * grad_lse_firsts + second * grad_lse_seconds
    dlse = tl.load(grad_lse + rows * grad_lse_rows, inside, 0.0).to(tl.float32)
    grad_out += first * grad_out_firsts + second * grad_out_seconds
    out_a += first * out_a_firsts + second * out_a_seconds
    out_b += first * out_b_firsts + second * out_b_seconds
    dout = tl.load(grad_out + rows[:, None] * grad_out_rows + features[None, :] * grad_out_features, here, 0.0)
    values_a = tl.load(out_a + rows[:, None] * out_a_rows + features[None, :] * out_a_features, here, 0.0)
    values_b = tl.load(out_b + rows[:, None] * out_b_rows + features[None, :] * out_b_features, here, 0.0)
    dout, values_a, values_b = dout.to(tl.float32), values_a.to(tl.float32), values_b.to(tl.float32)
    weight_a, weight_b, _ = _weights(a, b)
    # The weights are a softmax of two: d weight_a / d lse_a = weight_a weight_b.
    moved = weight_a * weight_b * tl.sum(dout * (values_a - values_b), 1)
    grad_lse_a += first * grad_lse_a_firsts + second * grad_lse_a_seconds + rows * grad_lse_a_rows
    grad_lse_b += first * grad_lse_b_firsts + second * grad_lse_b_seconds + rows * grad_lse_b_rows
    tl.store(grad_lse_a, (weight_a * dlse + moved).to(grad_lse_a.dtype.element_ty), inside)
    tl.store(grad_lse_b, (weight_b * dlse - moved).to(grad_lse_b.dtype.element_ty), inside)
    grad_out_a += first * grad_out_a_firsts + second * grad_out_a_seconds
    grad_out_b += first * grad_out_b_firsts + second * grad_out_b_seconds
    grad_out_a += rows[:, None] * grad_out_a_rows + features[None, :] * grad_out_a_features
    grad_out_b += rows[:, None] * grad_out_b_rows + features[None, :] * grad_out_b_features
    tl.store(grad_out_a, (dout * weight_a[:, None]).to(grad_out_a.dtype.element_ty), here)
    tl.store(grad_out_b, (dout * weight_b[:, None]).to(grad_out_b.dtype.element_ty), here)


def forward(
    out_a_BTHE: Tensor,
    lse_a_BTH: Tensor,
    out_b_BTHE: Tensor,
    lse_b_BTH: Tensor,
    out_BTHE: Tensor,
    lse_BTH: Tensor,
) -> None:
    """Fill out and lse (fp32). Any strides."""
    outs = {"out_a": out_a_BTHE, "out_b": out_b_BTHE, "out": out_BTHE}
    lses = {"lse_a": lse_a_BTH, "lse_b": lse_b_BTH, "lse": lse_BTH}
    _launch(_merge_lse_forward, outs, lses)


def backward(
    grad_out_BTHE: Tensor,
    grad_lse_BTH: Tensor,
    out_a_BTHE: Tensor,
    lse_a_BTH: Tensor,
    out_b_BTHE: Tensor,
    lse_b_BTH: Tensor,
    grad_out_a_BTHE: Tensor,
    grad_lse_a_BTH: Tensor,
    grad_out_b_BTHE: Tensor,
    grad_lse_b_BTH: Tensor,
) -> None:
    """Fill the last four. Any strides."""
    outs = {
        "grad_out": grad_out_BTHE,
        "out_a": out_a_BTHE,
        "out_b": out_b_BTHE,
        "grad_out_a": grad_out_a_BTHE,
        "grad_out_b": grad_out_b_BTHE,
    }
    lses = {
        "grad_lse": grad_lse_BTH,
        "lse_a": lse_a_BTH,
        "lse_b": lse_b_BTH,
        "grad_lse_a": grad_lse_a_BTH,
        "grad_lse_b": grad_lse_b_BTH,
    }
    _launch(_merge_lse_backward, outs, lses)


def _launch(kernel: triton.JITFunction, outs: dict[str, Tensor], lses: dict[str, Tensor]) -> None:
    shape = next(iter(outs.values())).shape
    tiled = max(range(3), key=lambda dim: shape[dim])
    first, second = (dim for dim in range(3) if dim != tiled)
    strides: dict[str, int] = {}
    for name, tensor in (outs | lses).items():
        strides |= {f"{name}_rows": tensor.stride(tiled), f"{name}_firsts": tensor.stride(first)}
        strides |= {f"{name}_seconds": tensor.stride(second)}
    strides |= {f"{name}_features": tensor.stride(3) for name, tensor in outs.items()}
    arguments: dict[str, Any] = {**outs, **lses, **strides}
    features = triton.next_power_of_2(max(1, shape[3]))
    rows = max(1, _TILE // features)
    launch(
        kernel,
        (triton.cdiv(shape[tiled], rows) * shape[first] * shape[second],),
        **arguments,
        num_rows=shape[tiled],
        num_seconds=shape[second],
        num_features=shape[3],
        ROWS=rows,
        FEATURES=features,
        num_warps=4 if features <= 2048 else 8,
    )
