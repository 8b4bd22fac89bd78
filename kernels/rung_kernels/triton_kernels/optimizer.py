"""AdamW and SPAM over many tensors in one launch, one pass over memory.

A program takes ``_BLOCK`` elements of one tensor; which, and where it lies, it reads in tables. Every operation is
rounded by itself, in the order of the reference: products and sums are not fused, divisions and square roots are those
of IEEE. So results have the reference's bits, whatever the lengths and alignments of tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rung_kernels.reference.optimizer import ROUNDING_TAG, Factor, Rounding
from rung_kernels.triton_kernels.launch import launch
from rung_kernels.triton_kernels.philox import in_order, philox

__all__ = ["step"]

_BLOCK = 1024  # elements of a program
_PART = 256  # elements at once where a block is not whole
_NUM_WARPS = 4  # eight elements a thread: 16 bytes of bfloat16, twice 16 of float32
_MAX_REGISTERS = 96  # of a thread; left to itself, ptxas spills one or two where one more program would then fit

_TAG = tl.constexpr(ROUNDING_TAG)
_GRAD_SCALE = tl.constexpr(int(Factor.GRAD_SCALE))
_SKIP = tl.constexpr(int(Factor.SKIP))
_RESET = tl.constexpr(int(Factor.RESET))
_THRESHOLD = tl.constexpr(int(Factor.THRESHOLD))
_BETA1 = tl.constexpr(int(Factor.BETA1))
_COMPLEMENT1 = tl.constexpr(int(Factor.COMPLEMENT1))
_BETA2 = tl.constexpr(int(Factor.BETA2))
_COMPLEMENT2 = tl.constexpr(int(Factor.COMPLEMENT2))
_STEP_SIZE = tl.constexpr(int(Factor.STEP_SIZE))
_DIVISOR = tl.constexpr(int(Factor.DIVISOR))
_EPS = tl.constexpr(int(Factor.EPS))
_DECAY = tl.constexpr(int(Factor.DECAY))

# Columns of the table of tensors: five addresses, then these.
_SIZE = tl.constexpr(5)
_FIRST_BLOCK = tl.constexpr(6)
_INDEX = tl.constexpr(7)
_COLUMNS = tl.constexpr(8)


@triton.jit
def _load(address, start, at, here, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE)) + start
    if VECTOR > 1:
        values = tl.load(tl.multiple_of(pointer, VECTOR * DTYPE.primitive_bitwidth // 8) + at)
    else:
        values = tl.load(pointer + at, here, 0.0)
    return values.to(tl.float32)


@triton.jit
def _store(address, start, at, here, values, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE)) + start
    if VECTOR > 1:
        tl.store(tl.multiple_of(pointer, VECTOR * DTYPE.primitive_bitwidth // 8) + at, values.to(DTYPE))
    else:
        tl.store(pointer + at, values.to(DTYPE), here)


@triton.jit
def _draws(first, k0, k1, step, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """16 random bits for elements first to first + BLOCK of a logical tensor. WHOLE: first is a multiple of 4."""
    if WHOLE:
        quads = (first >> 2) + tl.arange(0, BLOCK // 4)
        words0, words1, words2, words3 = philox(quads, quads >> 32, step, _TAG, k0, k1)
        words = in_order(words0, words1, words2, words3)
    else:
        numbers = first + tl.arange(0, BLOCK)
        quads = numbers >> 2
        words0, words1, words2, words3 = philox(quads, quads >> 32, step, _TAG, k0, k1)
        place = numbers & 3
        words = tl.where(place < 2, tl.where(place == 0, words0, words1), tl.where(place == 2, words2, words3))
    return words & 0xFFFF


@triton.jit
def _block(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    copy,
    start,
    index,
    size,
    factors,
    levels,
    maxima,
    gains,
    counts,
    keys,
    firsts,
    step,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    COPY: tl.constexpr,
    SPAM: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Elements start to start + BLOCK of one tensor, or to its end. VECTOR > 1: there are as many, and addresses are
    aligned so that this many are read at once."""
    at = tl.arange(0, BLOCK)
    here = at < size - start
    g = _load(grad, start, at, here, GRAD, VECTOR)
    m = _load(exp_avg, start, at, here, EXP_AVG, VECTOR)
    v = _load(exp_avg_sq, start, at, here, EXP_AVG_SQ, VECTOR)
    w = _load(param, start, at, here, PARAM, VECTOR)
    # While elements are on their way.
    grad_scale = tl.load(factors + _GRAD_SCALE).to(tl.float32)
    kept = tl.load(factors + _RESET) <= 0
    threshold = tl.load(factors + _THRESHOLD).to(tl.float32)
    beta1 = tl.load(factors + _BETA1).to(tl.float32)
    complement1 = tl.load(factors + _COMPLEMENT1).to(tl.float32)
    beta2 = tl.load(factors + _BETA2).to(tl.float32)
    complement2 = tl.load(factors + _COMPLEMENT2).to(tl.float32)
    step_size = tl.load(factors + _STEP_SIZE).to(tl.float32)
    divisor = tl.load(factors + _DIVISOR).to(tl.float32)
    eps = tl.load(factors + _EPS).to(tl.float32)
    decay = tl.load(factors + _DECAY).to(tl.float32)

    if grad_scale != 1.0:  # a division takes ten instructions, and by one it changes nothing
        g = tl.div_rn(g, grad_scale)
    m = tl.where(kept, m, 0.0)
    v = tl.where(kept, v, 0.0)
    if SPAM:
        limit = v * threshold
        above = (v > 0) & (g * g > limit)
        root = tl.sqrt_rn(limit)
        g = tl.where(above, tl.where(g < 0, -root, root), g)
    elif levels is not None:
        level = tl.load(levels + index).to(tl.float32)
        above = tl.abs(g) > level
        g = tl.where(above, tl.div_rn(g, tl.load(maxima + index).to(tl.float32)) * level, g)
    if counts is not None:
        number = tl.sum((above & here).to(tl.int32), 0).to(tl.int64)
        # Integers: the order of programs does not matter.
        tl.atomic_add(counts + index, number, number > 0, sem="relaxed")
    if gains is not None:
        g *= tl.load(gains + index).to(tl.float32)

    m = m * beta1 + g * complement1
    v = v * beta2 + (g * g) * complement2
    root = tl.sqrt_rn(v)
    if divisor != 1.0:
        root = tl.div_rn(root, divisor)
    update = tl.div_rn(m, root + eps) * step_size
    if SPAM:
        w = (w - update) * decay
    else:
        w = w * decay - update

    _store(param, start, at, here, w, PARAM, VECTOR)
    _store(exp_avg, start, at, here, m, EXP_AVG, VECTOR)
    _store(exp_avg_sq, start, at, here, v, EXP_AVG_SQ, VECTOR)
    if COPY is not None:
        if keys is not None:
            first = tl.load(firsts + index) + start
            k0, k1 = tl.load(keys + 2 * index), tl.load(keys + 2 * index + 1)
            bits = w.to(tl.uint32, bitcast=True)
            finite = (bits & 0x7F800000) != 0x7F800000
            # Adding carries into the half that is kept, away from zero.
            bits = (bits + _draws(first, k0, k1, tl.load(step), BLOCK, VECTOR > 1)) & 0xFFFF0000
            w = tl.where(finite, bits.to(tl.float32, bitcast=True), w)
        _store(copy, start, at, here, w, COPY, VECTOR)


@triton.jit
def _optimizer_step(
    tensors,
    tensor_of_block,
    factors,
    levels,
    maxima,
    gains,
    counts,
    keys,
    firsts,
    step,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    COPY: tl.constexpr,
    SPAM: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    VECTOR: tl.constexpr,
):
    if tl.load(factors + _SKIP) > 0:
        return
    row = tensors + tl.load(tensor_of_block + tl.program_id(0)).to(tl.int64) * _COLUMNS
    size, index = tl.load(row + _SIZE), tl.load(row + _INDEX)
    start = (tl.program_id(0) - tl.load(row + _FIRST_BLOCK)) * BLOCK
    param, grad, exp_avg, exp_avg_sq = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    copy = tl.load(row + 4)
    whole = (((param | grad | exp_avg | exp_avg_sq | copy) & 15) == 0) & (size - start >= BLOCK)
    if keys is not None:
        whole = whole & ((tl.load(firsts + index) & 3) == 0)
    # Without masks, and knowing that addresses are aligned, a thread moves 16 bytes at once. What is left goes in
    # parts, so that the registers of a program are those that whole blocks need.
    if whole:
        _block(
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            copy,
            start,
            index,
            size,
            factors,
            levels,
            maxima,
            gains,
            counts,
            keys,
            firsts,
            step,
            PARAM,
            GRAD,
            EXP_AVG,
            EXP_AVG_SQ,
            COPY,
            SPAM,
            BLOCK,
            VECTOR,
        )
    else:
        for part in range(0, BLOCK, PART):
            _block(
                param,
                grad,
                exp_avg,
                exp_avg_sq,
                copy,
                start + part,
                index,
                size,
                factors,
                levels,
                maxima,
                gains,
                counts,
                keys,
                firsts,
                step,
                PARAM,
                GRAD,
                EXP_AVG,
                EXP_AVG_SQ,
                COPY,
                SPAM,
                PART,
                1,
            )


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    factors: Tensor,
    clip: tuple[Tensor, Tensor] | None,
    gains: Tensor | None,
    counts: Tensor | None,
    copies: Sequence[Tensor] | None,
    rounding: Rounding | None,
    *,
    spam: bool,
) -> None:
    """One launch for each combination of dtypes among the tensors. All are contiguous and on one device."""
    lists = [params, grads, exp_avgs, exp_avg_sqs] + ([] if copies is None else [copies])
    groups: dict[tuple[torch.dtype, ...], list[tuple[int, ...]]] = {}
    no_copy = () if copies is not None else (0,)
    for index, tensors in enumerate(zip(*lists, strict=True)):
        if size := tensors[0].numel():
            row = (*[x.data_ptr() for x in tensors], *no_copy, size, index)
            groups.setdefault(tuple([x.dtype for x in tensors]), []).append(row)
    device = factors.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("optimizer steps cannot be captured in a CUDA graph: their tables come from the host")
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    for dtypes, rows in groups.items():
        of_block, num_blocks = _tensor_of_block(device, stream, tuple([row[5] for row in rows]))
        param, grad, exp_avg, exp_avg_sq, *copy = (_DTYPES[dtype] for dtype in dtypes)
        launch(
            _optimizer_step,
            (num_blocks,),
            tensors=_tensors(device, stream, tuple(rows)),
            tensor_of_block=of_block,
            factors=factors,
            levels=None if clip is None else clip[0],
            maxima=None if clip is None else clip[1],
            gains=gains,
            counts=counts if spam or clip is not None else None,
            keys=None if rounding is None else rounding.keys,
            firsts=None if rounding is None else rounding.firsts,
            step=None if rounding is None else rounding.step,
            PARAM=param,
            GRAD=grad,
            EXP_AVG=exp_avg,
            EXP_AVG_SQ=exp_avg_sq,
            COPY=copy[0] if copy else None,
            SPAM=spam,
            BLOCK=_BLOCK,
            PART=_PART,
            # The narrowest: where it is float32, the layout in which 8 elements of bfloat16 are one access would have
            # to be changed through shared memory before float32 is stored.
            VECTOR=16 // max(dtype.itemsize for dtype in dtypes),
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
            maxnreg=_MAX_REGISTERS,
        )


# Tables hold what they are looked up by and nothing else, so that none is ever out of date. The stream is part of that,
# because another one does not wait for the copy. Addresses seldom change: torch's allocator hands out the same ones
# step after step.


@functools.lru_cache(maxsize=64)
def _tensors(device: torch.device, stream: int, rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """int64 [tensors, 8]: addresses of parameter, gradient, moments and copy, size, first block, index in the lists."""
    first_block, table = 0, []
    for *addresses, size, index in rows:
        table.append((*addresses, size, first_block, index))
        first_block += triton.cdiv(size, _BLOCK)
    return _to(device, torch.tensor(table, dtype=torch.int64))


@functools.lru_cache(maxsize=64)
def _tensor_of_block(device: torch.device, stream: int, sizes: tuple[int, ...]) -> tuple[Tensor, int]:
    """int32 [blocks], the row in the table of tensors of each block; and how many blocks there are."""
    blocks = torch.tensor([triton.cdiv(size, _BLOCK) for size in sizes])
    of_block = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), blocks)
    return _to(device, of_block), len(of_block)


def _to(device: torch.device, table: Tensor) -> Tensor:
    """From pinned memory, or the host would wait for the device."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)
