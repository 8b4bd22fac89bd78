"""Philox4x32-10 and what is made of its words: normals and dropout masks.

Legend: C counters, N numbers, R rows (tokens), F features, Q counters of a row's features.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rung_kernels.triton_kernels.launch import launch

__all__ = ["dropout_mask", "in_order", "normals", "normals_of", "philox", "words"]

_COUNTERS = 512  # of a program that fills words or normals: four numbers each
_TILE = 1024  # counters of a program that fills masks


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four blocks of words, uint32, from the low 32 bits of integer counters (they broadcast) and of a key.

    Triton's rounds on four words of 32 bits are those of the paper; only its ``tl.philox`` lays out counters in its
    own way.
    """
    return tl.philox_impl(
        tl.cast(c0, tl.uint32),
        tl.cast(c1, tl.uint32),
        tl.cast(c2, tl.uint32),
        tl.cast(c3, tl.uint32),
        tl.cast(k0, tl.uint32),
        tl.cast(k1, tl.uint32),
    )


@triton.jit
def in_order(words0, words1, words2, words3):
    """[..., 4n] from four times [..., n]: the words of a counter one after another."""
    return tl.interleave(tl.interleave(words0, words2), tl.interleave(words1, words3))


@triton.jit
def normals_of(words, table, SEGMENTS: tl.constexpr, DTYPE: tl.constexpr):
    """The normal of each word, exact integers until it is rounded once to DTYPE (float64 or float32).

    ``table``, int64 [3, SEGMENTS], holds c0, c1 and c2 of quadratics in units of 2^-40. With n = word | 1 and its bits
    as a float64, exponent and six leading mantissa bits choose the quadratic; the next 25 bits are its argument.
    """
    bits = (words | 1).to(tl.float64).to(tl.int64, bitcast=True)
    segment = (bits >> 46) - (1023 << 6)
    place = (bits >> 21) & ((1 << 25) - 1)
    scaled = ((tl.load(table + 2 * SEGMENTS + segment) * place) >> 25) + tl.load(table + SEGMENTS + segment)
    scaled = ((scaled * place) >> 25) + tl.load(table + segment)
    return tl.where((words & 1) != 0, -scaled, scaled).to(DTYPE) * 2.0**-40


@triton.jit
def _philox_words(out, start, count, c2, c3, k0, k1, COUNTERS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * COUNTERS
    counters = start + first + tl.arange(0, COUNTERS)
    words0, words1, words2, words3 = philox(
        counters, counters >> 32, tl.load(c2), tl.load(c3), tl.load(k0), tl.load(k1)
    )
    at = 4 * first + tl.arange(0, 4 * COUNTERS)
    tl.store(out + at, in_order(words0, words1, words2, words3).to(tl.int64), at // 4 < count)


@triton.jit
def _philox_normals(out, table, first_counter, skipped, count, k0, k1, SEGMENTS: tl.constexpr, COUNTERS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * COUNTERS
    counters = first_counter + first + tl.arange(0, COUNTERS)
    words0, words1, words2, words3 = philox(counters, counters >> 32, 0, 0, tl.load(k0), tl.load(k1))
    words = in_order(words0, words1, words2, words3)
    WIDE: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    values = normals_of(words, table, SEGMENTS, WIDE)
    at = 4 * first + tl.arange(0, 4 * COUNTERS) - skipped
    tl.store(out + at, values.to(out.dtype.element_ty), (at >= 0) & (at < count))


@triton.jit
def _dropout_mask(
    out,
    sample_ids,
    positions,
    k0,
    k1,
    num_rows,
    tokens_per_sample,
    sample_stride,
    position_stride0,
    position_stride1,
    num_features,
    first_counter,
    threshold,
    ROWS: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = rows < num_rows
    samples, tokens = rows // tokens_per_sample, rows % tokens_per_sample
    ids = tl.load(sample_ids + samples * sample_stride, here, 0)[:, None]
    places = tl.load(positions + samples * position_stride0 + tokens * position_stride1, here, 0)[:, None]
    counters = (first_counter + tl.program_id(1) * COUNTERS + tl.arange(0, COUNTERS))[None, :]
    words0, words1, words2, words3 = philox(counters, places, ids, ids >> 32, tl.load(k0), tl.load(k1))
    features = tl.program_id(1) * (4 * COUNTERS) + tl.arange(0, 4 * COUNTERS)
    kept = in_order(
        # The threshold may be 2^32, which no word reaches.
        (words0.to(tl.int64) >= threshold).to(tl.int8),
        (words1.to(tl.int64) >= threshold).to(tl.int8),
        (words2.to(tl.int64) >= threshold).to(tl.int8),
        (words3.to(tl.int64) >= threshold).to(tl.int8),
    )
    at = rows[:, None] * num_features + features[None, :]
    tl.store(out + at, kept, here[:, None] & (features < num_features)[None, :])


def words(start: int, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor, out_C4: Tensor) -> None:
    """Fill int64 [C, 4] with the words of counters (low and high 32 bits of start + i, c2, c3); start in int64."""
    launch(
        _philox_words,
        (triton.cdiv(out_C4.shape[0], _COUNTERS),),
        out=out_C4,
        start=start,
        count=out_C4.shape[0],
        c2=c2,
        c3=c3,
        k0=k0,
        k1=k1,
        COUNTERS=_COUNTERS,
    )


def normals(start: int, k0: Tensor, k1: Tensor, table: Tensor, out_N: Tensor) -> None:
    """Fill floats [N] with normals number start to start + N; table int64 [3, segments], contiguous."""
    skipped = start & 3
    launch(
        _philox_normals,
        (triton.cdiv(skipped + out_N.shape[0], 4 * _COUNTERS) if out_N.shape[0] else 0,),
        out=out_N,
        table=table,
        first_counter=start >> 2,
        skipped=skipped,
        count=out_N.shape[0],
        k0=k0,
        k1=k1,
        SEGMENTS=table.shape[1],
        COUNTERS=_COUNTERS,
    )


def dropout_mask(
    k0: Tensor,
    k1: Tensor,
    sample_ids_B: Tensor,
    positions_BT: Tensor,
    first_feature: int,
    threshold: int,
    out_BTF: Tensor,
) -> None:
    """Fill uint8 [B, T, F] with 1 where the feature's word reaches ``threshold``; first_feature a multiple of 4."""
    batch, tokens, num_features = out_BTF.shape
    num_counters = triton.cdiv(num_features, 4)
    counters = min(256, triton.next_power_of_2(max(1, num_counters)))
    rows = _TILE // counters
    launch(
        _dropout_mask,
        (triton.cdiv(batch * tokens, rows), triton.cdiv(num_counters, counters)),
        out=out_BTF,
        sample_ids=sample_ids_B,
        positions=positions_BT,
        k0=k0,
        k1=k1,
        num_rows=batch * tokens,
        tokens_per_sample=tokens,
        sample_stride=sample_ids_B.stride(0),
        position_stride0=positions_BT.stride(0),
        position_stride1=positions_BT.stride(1),
        num_features=num_features,
        first_counter=first_feature // 4,
        threshold=threshold,
        ROWS=rows,
        COUNTERS=counters,
    )
