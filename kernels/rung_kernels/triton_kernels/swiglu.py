"""SwiGLU.

Legend: N rows, F features.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rung_kernels.triton_kernels.launch import launch

__all__ = ["backward", "forward"]

_TILE = 2048  # elements of a tile: 16 for each thread, two 16-byte loads of every bfloat16 input


@triton.jit
def _tile(num_rows, num_columns, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows, columns (both 64-bit: without gaps there is one row of everything) and which of them exist.

    ``tiles`` cover a row. They are counted by the host, since num_columns + COLUMNS may be more than 32 bits hold.
    """
    rows = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    columns = (tl.program_id(0) % tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    return rows, columns, (rows < num_rows) & (columns < num_columns)


@triton.jit
def _swiglu_forward(
    gate,
    up,
    y,
    num_rows,
    num_columns,
    tiles,
    gate_stride,
    up_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, here = _tile(num_rows, num_columns, tiles, ROWS, COLUMNS)
    gates = tl.load(gate + rows * gate_stride + columns, here, 0.0).to(tl.float32)
    ups = tl.load(up + rows * up_stride + columns, here, 0.0).to(tl.float32)
    out = gates * tl.sigmoid(gates) * ups
    tl.store(y + rows * num_columns + columns, out.to(y.dtype.element_ty), here)


@triton.jit
def _swiglu_backward(
    grad_y,
    gate,
    up,
    grad_gate,
    grad_up,
    num_rows,
    num_columns,
    tiles,
    grad_y_stride,
    gate_stride,
    up_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, here = _tile(num_rows, num_columns, tiles, ROWS, COLUMNS)
    grads = tl.load(grad_y + rows * grad_y_stride + columns, here, 0.0).to(tl.float32)
    gates = tl.load(gate + rows * gate_stride + columns, here, 0.0).to(tl.float32)
    ups = tl.load(up + rows * up_stride + columns, here, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gates)
    silu = gates * sigmoid
    at = rows * num_columns + columns
    # silu' = sigmoid + gate · sigmoid · (1 - sigmoid)
    tl.store(grad_gate + at, (grads * ups * (sigmoid + silu * (1 - sigmoid))).to(grad_gate.dtype.element_ty), here)
    tl.store(grad_up + at, (grads * silu).to(grad_up.dtype.element_ty), here)


def forward(gate_NF: Tensor, up_NF: Tensor, y_NF: Tensor) -> None:
    """Fill y (contiguous). The last dim of gate and up is contiguous; rows may lie apart."""
    grid, sizes = _sizes(gate_NF)
    launch(
        _swiglu_forward,
        grid,
        gate=gate_NF,
        up=up_NF,
        y=y_NF,
        gate_stride=gate_NF.stride(0),
        up_stride=up_NF.stride(0),
        **sizes,
    )


def backward(grad_y_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, grad_gate_NF: Tensor, grad_up_NF: Tensor) -> None:
    """Fill the gradients of gate and up (contiguous). The last dim of the other three is contiguous."""
    grid, sizes = _sizes(gate_NF)
    launch(
        _swiglu_backward,
        grid,
        grad_y=grad_y_NF,
        gate=gate_NF,
        up=up_NF,
        grad_gate=grad_gate_NF,
        grad_up=grad_up_NF,
        grad_y_stride=grad_y_NF.stride(0),
        gate_stride=gate_NF.stride(0),
        up_stride=up_NF.stride(0),
        **sizes,
    )


def _sizes(x_NF: Tensor) -> tuple[tuple[int], dict[str, int]]:
    num_rows, num_columns = x_NF.shape
    columns = min(_TILE, triton.next_power_of_2(max(1, num_columns)))
    rows = min(_TILE // columns, triton.next_power_of_2(max(1, num_rows)))
    tiles = triton.cdiv(num_columns, columns)
    sizes = {"num_rows": num_rows, "num_columns": num_columns, "tiles": tiles, "ROWS": rows, "COLUMNS": columns}
    return (triton.cdiv(num_rows, rows) * tiles,), sizes
