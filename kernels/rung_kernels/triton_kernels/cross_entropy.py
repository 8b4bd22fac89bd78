"""Cross-entropy: what a row's loss needs of its logits in one read, and the gradient of the logits in another.

Legend: N rows, V columns. A row is read in blocks; each lane (thread) keeps the largest logit that it has seen and the
sum of exponentials relative to it, and lanes meet once, at the row's end: nothing waits inside the loop. A block is
[groups of lanes, lanes, neighbours that one lane reads at once].

Blocks of a row whose first logit is not at a multiple of 16 bytes begin ``shift`` columns early, so that they are
aligned; those that are inside the row are read and written without masks, 16 bytes at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rung_kernels.triton_kernels.launch import launch

__all__ = ["facts", "gradient", "losses_and_gradient"]

# How a row is cut: largest block of 2-byte numbers, and how many of its 16-byte vectors each lane has.
_READ = 8192, 4
_READ_AND_WRITE = 4096, 2
_TWICE = 16384, 2
"""Where one program goes twice over its row: a program of 32 warps has a multiprocessor for itself, so that the second
time few rows share the level-2 cache. (132 rows of 128256 bfloat16 logits are 34 MB.)"""


@triton.jit
def _start(row, stride, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """Offset at which the row's blocks begin, and how many columns that is early.

    Multiplied last, by a constant: so the compiler knows the offset's alignment.
    """
    shift = 0
    start = row * (stride // VECTOR) * VECTOR
    if not ALIGNED:
        start = row * stride // VECTOR * VECTOR
        shift = (row * stride - start).to(tl.int32)
    return start, shift


@triton.jit
def _load(block, first_column, num_columns, BLOCK: tl.constexpr):
    """Logits of a block in fp32, -inf where there is no column."""
    at = tl.arange(0, BLOCK)
    if (first_column >= 0) & (first_column + BLOCK <= num_columns):
        values = tl.load(block + at).to(tl.float32)
    else:
        columns = first_column + at
        values = tl.load(block + at, (columns >= 0) & (columns < num_columns), -float("inf")).to(tl.float32)
    return values


@triton.jit
def _store(block, values, first_column, num_columns, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if (first_column >= 0) & (first_column + BLOCK <= num_columns):
        tl.store(block + at, values.to(block.dtype.element_ty))
    else:
        columns = first_column + at
        tl.store(block + at, values.to(block.dtype.element_ty), (columns >= 0) & (columns < num_columns))


@triton.jit
def _row_facts(
    logits,
    start,
    shift,
    column,
    kept,
    num_columns,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
):
    """Maximum, log Σ exp(logit - maximum), the label's logit, Σ (logit - maximum). Ignored rows are not read."""
    maxima = tl.full([LANES], -float("inf"), tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    offsets = tl.zeros([LANES], tl.float32)
    # Logits are summed relative to one of them, so that being far from zero costs no digits. If it is -inf, so is the
    # sum, whatever the others are relative to.
    near = tl.load(logits + start + shift, kept & (num_columns > 0), 0.0).to(tl.float32)
    near = tl.where(near == -float("inf"), 0.0, near)
    end = (num_columns + shift) * kept.to(tl.int32)
    for begin in range(0, end, BLOCK):
        values = _load(logits + start + begin, begin - shift, num_columns, BLOCK)
        if SMOOTH:
            columns = begin - shift + tl.arange(0, BLOCK)
            relative = tl.where((columns >= 0) & (columns < num_columns), values - near, 0.0)
            offsets += tl.sum(tl.sum(tl.reshape(relative, [BLOCK // LANES // VECTOR, LANES, VECTOR]), 2), 0)
        values = tl.reshape(values, [BLOCK // LANES // VECTOR, LANES, VECTOR])
        larger = tl.maximum(maxima, tl.max(tl.max(values, 2), 0))
        base = tl.where(larger == -float("inf"), 0.0, larger)  # -inf - -inf is no number
        exponentials = tl.exp(values - base[None, :, None])
        sums = sums * tl.exp(maxima - base) + tl.sum(tl.sum(exponentials, 2), 0)
        maxima = larger
    maximum = tl.max(maxima, 0)
    base = tl.where(maximum == -float("inf"), 0.0, maximum)
    total = tl.sum(sums * tl.exp(maxima - base), 0)
    log_sum = tl.log(tl.where(maximum == -float("inf"), 1.0, total))
    below = tl.sum(offsets, 0) + num_columns * (near - base)
    here = kept & (column >= 0) & (column < num_columns)
    at_label = tl.load(logits + start + shift + column, here, -float("inf")).to(tl.float32)
    return tl.where(kept, maximum, 0.0), log_sum, at_label, below


@triton.jit
def _loss(maximum, log_sum, at_label, below, num_columns, z_loss, label_smoothing, SMOOTH: tl.constexpr):
    loss = (maximum - at_label) + log_sum
    if SMOOTH:
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_sum - below / num_columns)
    return loss + z_loss * (maximum + log_sum) * (maximum + log_sum)


@triton.jit
def _logit_grads(
    values,
    columns,
    column,
    grad,
    maximum,
    log_sum,
    vocab_size,
    z_loss,
    label_smoothing,
    SMOOTH: tl.constexpr,
):
    # Not relative to maximum + log_sum, whose rounding grows with the logits.
    of_softmax = grad * (1 + 2 * z_loss * (maximum + log_sum))
    grads = of_softmax * tl.exp(values - maximum - log_sum)
    at_label = grad
    if SMOOTH:
        grads -= grad * (label_smoothing / vocab_size)
        at_label = grad * (1 - label_smoothing)
    return grads - tl.where(columns == column, at_label, 0.0)


@triton.jit
def _cross_entropy_facts(
    logits,
    labels,
    maxima,
    log_sums,
    at_labels,
    below,
    losses,
    num_columns,
    stride,
    ignore_index,
    first,
    z_loss,
    label_smoothing,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row).to(tl.int64)
    kept = label != ignore_index
    start, shift = _start(row, stride, VECTOR, ALIGNED)
    maximum, log_sum, at_label, below_maximum = _row_facts(
        logits, start, shift, label - first, kept, num_columns, SMOOTH, BLOCK, VECTOR, LANES
    )
    tl.store(maxima + row, maximum)
    tl.store(log_sums + row, log_sum)
    if at_labels is not None:
        tl.store(at_labels + row, at_label)
    if below is not None:
        tl.store(below + row, below_maximum)
    if losses is not None:
        loss = _loss(maximum, log_sum, at_label, below_maximum, num_columns, z_loss, label_smoothing, SMOOTH)
        tl.store(losses + row, tl.where(kept, loss, 0.0))


@triton.jit
def _cross_entropy_gradient(
    grad_losses,
    logits,
    labels,
    maxima,
    log_sums,
    vocab_size,
    grad_logits,
    num_columns,
    num_blocks,
    stride,
    grad_stride,
    ignore_index,
    first,
    z_loss,
    label_smoothing,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    SAME: tl.constexpr,
):
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    begin = (tl.program_id(0) % num_blocks) * BLOCK
    label = tl.load(labels + row).to(tl.int64)
    start, shift = _start(row, stride, VECTOR, ALIGNED)
    grads = tl.zeros([BLOCK], tl.float32)
    if label != ignore_index:
        values = _load(logits + start + begin, begin - shift, num_columns, BLOCK)
        total = num_columns
        if vocab_size is not None:
            total = tl.load(vocab_size)
        grads = _logit_grads(
            values,
            begin - shift + tl.arange(0, BLOCK),
            label - first,
            tl.load(grad_losses + row),
            tl.load(maxima + row),
            tl.load(log_sums + row),
            total,
            z_loss,
            label_smoothing,
            SMOOTH,
        )
    grad_start = row * grad_stride - shift
    if SAME:
        grad_start = grad_start // VECTOR * VECTOR  # the same number, known to be a multiple
    _store(grad_logits + grad_start + begin, grads, begin - shift, num_columns, BLOCK)


@triton.jit
def _cross_entropy_in_place(
    logits,
    labels,
    losses,
    num_columns,
    stride,
    ignore_index,
    z_loss,
    label_smoothing,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row).to(tl.int64)
    kept = label != ignore_index
    start, shift = _start(row, stride, VECTOR, ALIGNED)
    maximum, log_sum, at_label, below = _row_facts(
        logits, start, shift, label, kept, num_columns, SMOOTH, BLOCK, VECTOR, LANES
    )
    loss = _loss(maximum, log_sum, at_label, below, num_columns, z_loss, label_smoothing, SMOOTH)
    tl.store(losses + row, tl.where(kept, loss, 0.0))
    tl.debug_barrier()  # all threads have read the label's logit before one overwrites it
    for begin in range(0, num_columns + shift, BLOCK):
        grads = tl.zeros([BLOCK], tl.float32)
        if kept:
            values = _load(logits + start + begin, begin - shift, num_columns, BLOCK)
            columns = begin - shift + tl.arange(0, BLOCK)
            grads = _logit_grads(
                values, columns, label, 1.0, maximum, log_sum, num_columns, z_loss, label_smoothing, SMOOTH
            )
        _store(logits + start + begin, grads, begin - shift, num_columns, BLOCK)


def _shape(logits_NV: Tensor, largest: int, vectors: int) -> dict[str, int]:
    """How a block of a row is laid out."""
    vector = 16 // logits_NV.element_size()
    block = min(largest * vector // 8, max(32 * vector, triton.next_power_of_2(logits_NV.shape[1])))
    num_warps = max(1, block // (32 * vector * vectors))
    return {"BLOCK": block, "VECTOR": vector, "LANES": 32 * num_warps, "num_warps": num_warps}


def _is_aligned(logits_NV: Tensor) -> bool:
    return logits_NV.stride(0) * logits_NV.element_size() % 16 == 0


def facts(
    logits_NV: Tensor,
    labels_N: Tensor,
    max_N: Tensor,
    log_sum_N: Tensor,
    label_N: Tensor | None,
    below_N: Tensor | None,
    losses_N: Tensor | None,
    *,
    ignore_index: int,
    first: int,
    z_loss: float,
    label_smoothing: float,
) -> None:
    """Fill what is given, all fp32: maximum, log Σ exp(logit - maximum), the label's logit, Σ (logit - maximum), and
    losses (of whole rows). Columns are contiguous."""
    launch(
        _cross_entropy_facts,
        (logits_NV.shape[0],),
        logits=logits_NV,
        labels=labels_N,
        maxima=max_N,
        log_sums=log_sum_N,
        at_labels=label_N,
        below=below_N,
        losses=losses_N,
        num_columns=logits_NV.shape[1],
        stride=logits_NV.stride(0),
        ignore_index=ignore_index,
        first=first,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        SMOOTH=label_smoothing > 0,
        ALIGNED=_is_aligned(logits_NV),
        **_shape(logits_NV, *_READ),
    )


def gradient(
    grad_N: Tensor,
    logits_NV: Tensor,
    labels_N: Tensor,
    max_N: Tensor,
    log_sum_N: Tensor,
    vocab_size: Tensor | None,
    out_NV: Tensor,
    *,
    ignore_index: int,
    first: int,
    z_loss: float,
    label_smoothing: float,
) -> None:
    """Fill the gradient of the logits, which may be the logits themselves. ``vocab_size``: 0-dim fp32, where V is only
    a part of the vocabulary and labels are smoothed. Columns are contiguous."""
    num_rows, num_columns = logits_NV.shape
    shape, aligned = _shape(logits_NV, *_READ_AND_WRITE), _is_aligned(logits_NV)
    del shape["LANES"]
    vector, block = shape["VECTOR"], shape["BLOCK"]
    num_blocks = triton.cdiv(num_columns + (0 if aligned else vector - 1), block) if num_columns else 0
    launch(
        _cross_entropy_gradient,
        (num_rows * num_blocks,),
        grad_losses=grad_N,
        logits=logits_NV,
        labels=labels_N,
        maxima=max_N,
        log_sums=log_sum_N,
        vocab_size=vocab_size,
        grad_logits=out_NV,
        num_columns=num_columns,
        num_blocks=num_blocks,
        stride=logits_NV.stride(0),
        grad_stride=out_NV.stride(0),
        ignore_index=ignore_index,
        first=first,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        SMOOTH=label_smoothing > 0,
        ALIGNED=aligned,
        SAME=(logits_NV.stride(0) - out_NV.stride(0)) % vector == 0,
        **shape,
    )


def losses_and_gradient(
    logits_NV: Tensor, labels_N: Tensor, losses_N: Tensor, *, ignore_index: int, z_loss: float, label_smoothing: float
) -> None:
    """Fill the losses (fp32) of whole rows, and overwrite the logits by the gradient of their sum."""
    launch(
        _cross_entropy_in_place,
        (logits_NV.shape[0],),
        logits=logits_NV,
        labels=labels_N,
        losses=losses_N,
        num_columns=logits_NV.shape[1],
        stride=logits_NV.stride(0),
        ignore_index=ignore_index,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        SMOOTH=label_smoothing > 0,
        ALIGNED=_is_aligned(logits_NV),
        **_shape(logits_NV, *_TWICE),
    )
