"""A matrix product per group of rows; no group's size is known to the host.

Legend: M rows, X groups, D features in, F features out, P tiles of rows. A tile holds rows of one group, and which is
found on the device: the grid has as many tiles as there can be at most, and those too many return at once. Products are
summed in float32, in an order that depends on shapes alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rung_kernels.triton_kernels.launch import launch, num_multiprocessors

__all__ = ["clear_rows", "clear_weights", "forward", "weights_backward"]

_GROUPS = 128  # looked at at once
_FOUND = 16  # tiles that a program of the plan looks for
_PIECES = 8  # programs that clear a group's gradient


@triton.jit
def _bound(offsets, group, num_groups, num_rows):
    """Where this group ends: a row, whatever the offset says. What follows the last group ends with the rows."""
    end = tl.load(offsets + group, (group >= 0) & (group < num_groups), 0).to(tl.int64)
    end = tl.where(group < num_groups, end, num_rows)
    return tl.minimum(tl.maximum(end, 0), num_rows)


@triton.jit
def _grouped_mm_plan(
    offsets, plan, num_groups, num_rows, num_tiles, ROWS: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr
):
    """plan [3, P]: the group, first row and end of the group of each tile; group -1 where there is no such tile.

    Rows after the last offset are the group ``num_groups``.
    """
    tiles = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES).to(tl.int64)
    group = tl.zeros([TILES], tl.int64) - 1
    row = tl.zeros([TILES], tl.int64)
    stop = tl.zeros([TILES], tl.int64)
    before = tl.zeros([1], tl.int64)
    for block in range(tl.cdiv(num_groups + 1, GROUPS)):
        groups = block * GROUPS + tl.arange(0, GROUPS).to(tl.int64)
        start, end = _bound(offsets, groups - 1, num_groups, num_rows), _bound(offsets, groups, num_groups, num_rows)
        count = tl.maximum(end - start + ROWS - 1, 0) // ROWS
        last = before + tl.cumsum(count, 0)
        first = last - count
        found = (tiles[:, None] >= first[None, :]) & (tiles[:, None] < last[None, :])
        group += tl.sum(tl.where(found, groups[None, :] + 1, 0), 1)
        row += tl.sum(tl.where(found, start[None, :] + (tiles[:, None] - first[None, :]) * ROWS, 0), 1)
        stop += tl.sum(tl.where(found, end[None, :], 0), 1)
        before += tl.sum(count, 0)
    inside = tiles < num_tiles
    tl.store(plan + tiles, group, inside)
    tl.store(plan + num_tiles + tiles, row, inside)
    tl.store(plan + 2 * num_tiles + tiles, stop, inside)


@triton.jit
def _grouped_mm_forward(
    x,
    weights,
    plan,
    y,
    num_groups,
    num_tiles,
    num_inner,
    num_columns,
    x_rows,
    x_inner,
    weights_groups,
    weights_inner,
    weights_columns,
    y_rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """WHOLE: INNER divides num_inner. WIDEN: operands become float32, as the interpreter needs them."""
    blocks = tl.cdiv(num_columns, COLUMNS)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    group = tl.load(plan + tile)
    if group < 0:
        return
    first_row, first_column = tl.load(plan + num_tiles + tile), block.to(tl.int64) * COLUMNS
    # Where a block starts is a 64-bit number, and where something lies in it a 32-bit one: half the registers.
    rows, columns, inner = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, INNER)
    here = (rows < tl.load(plan + 2 * num_tiles + tile) - first_row)[:, None]
    inside = (columns < num_columns - first_column)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if group < num_groups:
        x += first_row * x_rows
        weights += group * weights_groups + first_column * weights_columns
        in_x = rows[:, None] * x_rows + inner[None, :] * x_inner
        in_weights = inner[:, None] * weights_inner + columns[None, :] * weights_columns
        for done in range(0, num_inner, INNER):
            if WHOLE:
                a = tl.load(x + in_x, here, 0.0)
                b = tl.load(weights + in_weights, inside, 0.0)
            else:
                left = inner < num_inner - done
                a = tl.load(x + in_x, here & left[None, :], 0.0)
                b = tl.load(weights + in_weights, inside & left[:, None], 0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision="ieee")
            x += INNER * x_inner
            weights += INNER * weights_inner
    y += first_row * y_rows + first_column
    tl.store(y + rows[:, None] * y_rows + columns[None, :], total.to(y.dtype.element_ty), here & inside)


@triton.jit
def _grouped_mm_weights_backward(
    x,
    grad_y,
    offsets,
    grad_weights,
    num_groups,
    num_rows,
    num_inner,
    num_columns,
    x_rows,
    x_inner,
    grad_y_rows,
    grad_y_columns,
    grad_weights_groups,
    grad_weights_inner,
    grad_weights_columns,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A block of one group's gradient: x transposed times grad_y over the rows of the group, which may be none."""
    blocks, deep = tl.cdiv(num_columns, COLUMNS), tl.cdiv(num_inner, INNER)
    program = tl.program_id(0)
    group = (program // (blocks * deep)).to(tl.int64)
    start, stop = _bound(offsets, group - 1, num_groups, num_rows), _bound(offsets, group, num_groups, num_rows)
    first_inner = (program // blocks % deep).to(tl.int64) * INNER
    first_column = (program % blocks).to(tl.int64) * COLUMNS
    inner, columns, rows = tl.arange(0, INNER), tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    x += start * x_rows + first_inner * x_inner
    grad_y += start * grad_y_rows + first_column * grad_y_columns
    in_x = inner[:, None] * x_inner + rows[None, :] * x_rows
    in_grad = rows[:, None] * grad_y_rows + columns[None, :] * grad_y_columns
    deep_inside = (inner < num_inner - first_inner)[:, None]
    inside = (columns < num_columns - first_column)[None, :]
    total = tl.zeros([INNER, COLUMNS], tl.float32)
    left = tl.maximum(stop - start, 0)
    for _ in range(tl.cdiv(left, ROWS)):
        here = rows < left
        a = tl.load(x + in_x, deep_inside & here[None, :], 0.0)
        b = tl.load(grad_y + in_grad, inside & here[:, None], 0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        left -= ROWS
        x += ROWS * x_rows
        grad_y += ROWS * grad_y_rows
    grad_weights += group * grad_weights_groups
    grad_weights += first_inner * grad_weights_inner + first_column * grad_weights_columns
    out = grad_weights + inner[:, None] * grad_weights_inner + columns[None, :] * grad_weights_columns
    tl.store(out, total.to(grad_weights.dtype.element_ty), deep_inside & inside)


@triton.jit
def _grouped_mm_clear_rows(y, offsets, num_groups, num_rows, num_columns, SIZE: tl.constexpr):
    """Zeros in the rows of y after the last offset."""
    columns = tl.arange(0, SIZE).to(tl.int64)
    programs = tl.num_programs(0)
    first = _bound(offsets, num_groups - 1, num_groups, num_rows) + tl.program_id(0)
    for turn in range(tl.cdiv(tl.maximum(num_rows - first, 0), programs)):
        row = y + (first + turn * programs) * num_columns
        for done in range(0, num_columns, SIZE):
            tl.store(row + done + columns, tl.zeros([SIZE], y.dtype.element_ty), columns < num_columns - done)


@triton.jit
def _grouped_mm_clear_weights(
    grad, offsets, num_groups, num_rows, num_elements, PIECES: tl.constexpr, SIZE: tl.constexpr
):
    """Zeros in the gradients [X, num_elements] of groups that have no rows."""
    group = (tl.program_id(0) // PIECES).to(tl.int64)
    if _bound(offsets, group, num_groups, num_rows) > _bound(offsets, group - 1, num_groups, num_rows):
        return
    elements = (tl.program_id(0) % PIECES).to(tl.int64) * SIZE + tl.arange(0, SIZE).to(tl.int64)
    for _ in range(tl.cdiv(num_elements, PIECES * SIZE)):
        zeros = tl.zeros([SIZE], grad.dtype.element_ty)
        tl.store(grad + group * num_elements + elements, zeros, elements < num_elements)
        elements += PIECES * SIZE


def forward(x_MD: Tensor, weights_XDF: Tensor, offsets_X: Tensor, y_MF: Tensor) -> None:
    """Fill y, whose columns are contiguous. x and weights lie as they like; offsets are contiguous.

    With ``weights.mT`` this is the gradient of x.
    """
    x_MD, weights_XDF = _near(x_MD), _near(weights_XDF)
    num_groups, num_inner, num_columns = weights_XDF.shape
    num_rows = x_MD.shape[0]
    mean = triton.cdiv(num_rows, max(1, num_groups))
    most = _most(x_MD, weights_XDF)
    rows, columns, inner = _power(mean, most[0]), _power(num_columns, most[1]), _power(num_inner, most[2])
    # Each group adds less than a tile to those of whole rows; the rows after the last offset count as a group.
    num_tiles = triton.cdiv(num_rows, rows) + num_groups if num_rows else 0
    plan_3P = torch.empty(3, num_tiles, dtype=torch.int64, device=x_MD.device)
    launch(
        _grouped_mm_plan,
        (triton.cdiv(num_tiles, _FOUND),),
        offsets=offsets_X,
        plan=plan_3P,
        num_groups=num_groups,
        num_rows=num_rows,
        num_tiles=num_tiles,
        ROWS=rows,
        TILES=_FOUND,
        GROUPS=_GROUPS,
    )
    launch(
        _grouped_mm_forward,
        (num_tiles * triton.cdiv(num_columns, columns),),
        x=x_MD,
        weights=weights_XDF,
        plan=plan_3P,
        y=y_MF,
        num_groups=num_groups,
        num_tiles=num_tiles,
        num_inner=num_inner,
        num_columns=num_columns,
        x_rows=x_MD.stride(0),
        x_inner=x_MD.stride(1),
        weights_groups=weights_XDF.stride(0),
        weights_inner=weights_XDF.stride(1),
        weights_columns=weights_XDF.stride(2),
        y_rows=y_MF.stride(0),
        ROWS=rows,
        COLUMNS=columns,
        INNER=inner,
        WHOLE=num_inner % inner == 0,
        WIDEN=triton.knobs.runtime.interpret,
        num_warps=_num_warps(rows, columns),
        num_stages=_num_stages(x_MD, rows * inner + inner * columns),
    )


def weights_backward(x_MD: Tensor, grad_MF: Tensor, offsets_X: Tensor, grad_weights_XDF: Tensor) -> None:
    """Fill the gradient of the weights. Everything lies as it likes but the offsets, which are contiguous."""
    x_MD, grad_MF = _near(x_MD), _near(grad_MF)
    num_groups, num_inner, num_columns = grad_weights_XDF.shape
    num_rows = x_MD.shape[0]
    mean = triton.cdiv(num_rows, max(1, num_groups))
    most = _most(x_MD, grad_MF)
    inner, columns, rows = _power(num_inner, most[0]), _power(num_columns, most[1]), _power(mean, most[2])
    launch(
        _grouped_mm_weights_backward,
        (num_groups * triton.cdiv(num_inner, inner) * triton.cdiv(num_columns, columns),),
        x=x_MD,
        grad_y=grad_MF,
        offsets=offsets_X,
        grad_weights=grad_weights_XDF,
        num_groups=num_groups,
        num_rows=num_rows,
        num_inner=num_inner,
        num_columns=num_columns,
        x_rows=x_MD.stride(0),
        x_inner=x_MD.stride(1),
        grad_y_rows=grad_MF.stride(0),
        grad_y_columns=grad_MF.stride(1),
        grad_weights_groups=grad_weights_XDF.stride(0),
        grad_weights_inner=grad_weights_XDF.stride(1),
        grad_weights_columns=grad_weights_XDF.stride(2),
        INNER=inner,
        COLUMNS=columns,
        ROWS=rows,
        WIDEN=triton.knobs.runtime.interpret,
        num_warps=_num_warps(inner, columns),
        num_stages=_num_stages(x_MD, rows * inner + rows * columns),
    )


def clear_rows(y_MF: Tensor, offsets_X: Tensor) -> None:
    """Zeros in the rows of y (contiguous) after the last offset, of which there are mostly none."""
    num_rows, num_columns = y_MF.shape
    launch(
        _grouped_mm_clear_rows,
        (min(num_rows, 4 * num_multiprocessors(y_MF.device)),),
        y=y_MF,
        offsets=offsets_X,
        num_groups=offsets_X.shape[0],
        num_rows=num_rows,
        num_columns=num_columns,
        SIZE=1024,
    )


def clear_weights(grad_weights_XDF: Tensor, offsets_X: Tensor, num_rows: int) -> None:
    """Zeros in the gradients (contiguous) of groups without rows."""
    num_groups = grad_weights_XDF.shape[0]
    launch(
        _grouped_mm_clear_weights,
        (num_groups * _PIECES,),
        grad=grad_weights_XDF,
        offsets=offsets_X,
        num_groups=num_groups,
        num_rows=num_rows,
        num_elements=grad_weights_XDF[0].numel() if num_groups else 0,
        PIECES=_PIECES,
        SIZE=1024,
    )


def _near(x: Tensor) -> Tensor:
    """Such that what lies in one block is within 32 bits; a copy only where rows are millions of elements apart."""
    return x if 256 * sum(x.stride()[-2:]) < 2**31 else x.clone(memory_format=torch.contiguous_format)


def _most(a: Tensor, b: Tensor) -> tuple[int, int, int]:
    """Rows and columns of the largest block of sums, and how deep its operands are, by what a thread can hold.

    float32 is multiplied without tensor cores. Operands that cannot be read 16 bytes at a time need an address for each
    element.
    """
    wide = all(step == 1 or step * x.element_size() % 16 == 0 for x in (a, b) for step in x.stride()[-2:])
    if a.element_size() == 4:
        return (64, 64, 16) if wide else (64, 32, 16)
    return (128, 256, 64) if wide else (64, 64, 32)


def _power(size: int, largest: int) -> int:
    """A side of a block: the least power of two that holds it, of those that tl.dot takes and registers hold."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def _num_warps(rows: int, columns: int) -> int:
    """At most 128 sums a thread."""
    return 8 if rows * columns > 128 * 128 else 4


def _num_stages(x: Tensor, elements: int) -> int:
    """Three blocks of operands on their way, or as many as the GPU's shared memory holds."""
    shared = 160 * 1024
    if x.device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(x.device)  # whose stub knows not all of them
        shared = properties.shared_memory_per_block_optin
    return max(1, min(3, shared // (elements * x.element_size())))
