"""Rotary position embedding of queries and keys in one launch.

Legend: B batch, T tokens, H query heads, K key/value heads, E head size. "columns" are the E/2 pairs of a head.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rung_kernels.triton_kernels.launch import launch

__all__ = ["MAX_HEAD_SIZE", "turn"]

MAX_HEAD_SIZE = 8192  # one head's pairs are held in registers
_TILE = 2048  # pairs of queries that a program aims for: few enough to load them all before the first is stored
_MAX_TILE = 4096  # beyond it heads are shared out over programs


@triton.jit
def _load_pairs(x, at, here, HALF: tl.constexpr):
    return tl.load(x + at, here, 0.0).to(tl.float32), tl.load(x + at + HALF, here, 0.0).to(tl.float32)


@triton.jit
def _store_turned(out, at, here, first, second, cosine, sine, HALF: tl.constexpr):
    tl.store(out + at, (first * cosine - second * sine).to(out.dtype.element_ty), here)
    tl.store(out + at + HALF, (second * cosine + first * sine).to(out.dtype.element_ty), here)


@triton.jit
def _rope(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    num_tokens,
    tiles,
    num_q_heads,
    num_k_heads,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    cos_batch_stride,
    cos_token_stride,
    sin_batch_stride,
    sin_token_stride,
    BACK: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tokens = (tl.program_id(0) % tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    tokens = tokens[:, None, None]
    columns = tl.arange(0, COLUMNS)[None, None, :]
    # Everything is loaded before anything is stored, so that all of a program's bytes are on their way at once.
    here = (tokens < num_tokens) & (columns < HALF)
    cosine = tl.load(cos + batch * cos_batch_stride + tokens * cos_token_stride + columns, here, 0.0).to(tl.float32)
    sine = tl.load(sin + batch * sin_batch_stride + tokens * sin_token_stride + columns, here, 0.0).to(tl.float32)
    if BACK:
        sine = -sine
    row = batch * num_tokens + tokens
    if q is not None:
        q_heads = (tl.program_id(1).to(tl.int64) * Q_HEADS + tl.arange(0, Q_HEADS).to(tl.int64))[None, :, None]
        q_here = here & (q_heads < num_q_heads)
        q_at = batch * q_batch_stride + tokens * q_token_stride + q_heads * q_head_stride + columns
        q_first, q_second = _load_pairs(q, q_at, q_here, HALF)
    if k is not None:
        k_heads = (tl.program_id(1).to(tl.int64) * K_HEADS + tl.arange(0, K_HEADS).to(tl.int64))[None, :, None]
        k_here = here & (k_heads < num_k_heads)
        k_at = batch * k_batch_stride + tokens * k_token_stride + k_heads * k_head_stride + columns
        k_first, k_second = _load_pairs(k, k_at, k_here, HALF)
    if q is not None:
        q_at = (row * num_q_heads + q_heads) * (2 * HALF) + columns
        _store_turned(q_out, q_at, q_here, q_first, q_second, cosine, sine, HALF)
    if k is not None:
        k_at = (row * num_k_heads + k_heads) * (2 * HALF) + columns
        _store_turned(k_out, k_at, k_here, k_first, k_second, cosine, sine, HALF)


def turn(
    q_BTHE: Tensor,
    k_BTKE: Tensor,
    cos_BTE: Tensor,
    sin_BTE: Tensor,
    q_out_BTHE: Tensor,
    k_out_BTKE: Tensor,
    *,
    back: bool,
) -> None:
    """Fill q_out and k_out (contiguous) with q and k turned by the tables' angles, or by their negatives.

    The last dim of every tensor is contiguous, other strides are free. Tables of batch 1 serve every sequence, and only
    the first E/2 columns of tables are read. H or K may be 0.
    """
    batch, num_tokens, num_q_heads, head_size = q_BTHE.shape
    num_k_heads = k_BTKE.shape[2]
    if not head_size or not max(num_q_heads, num_k_heads):
        return
    columns = triton.next_power_of_2(head_size // 2)
    pairs = triton.next_power_of_2(max(num_q_heads, num_k_heads)) * columns
    groups = triton.cdiv(pairs, _MAX_TILE)
    tokens = min(max(1, _TILE // pairs), triton.next_power_of_2(max(1, num_tokens)))
    tiles = triton.cdiv(num_tokens, tokens)
    launch(
        _rope,
        (batch * tiles, groups),
        q=q_BTHE if num_q_heads else None,
        k=k_BTKE if num_k_heads else None,
        cos=cos_BTE,
        sin=sin_BTE,
        q_out=q_out_BTHE if num_q_heads else None,
        k_out=k_out_BTKE if num_k_heads else None,
        num_tokens=num_tokens,
        tiles=tiles,
        num_q_heads=num_q_heads,
        num_k_heads=num_k_heads,
        q_batch_stride=q_BTHE.stride(0),
        q_token_stride=q_BTHE.stride(1),
        q_head_stride=q_BTHE.stride(2),
        k_batch_stride=k_BTKE.stride(0),
        k_token_stride=k_BTKE.stride(1),
        k_head_stride=k_BTKE.stride(2),
        cos_batch_stride=_batch_stride(cos_BTE),
        cos_token_stride=cos_BTE.stride(1),
        sin_batch_stride=_batch_stride(sin_BTE),
        sin_token_stride=sin_BTE.stride(1),
        BACK=back,
        TOKENS=tokens,
        Q_HEADS=triton.next_power_of_2(triton.cdiv(num_q_heads, groups)) if num_q_heads else 1,
        K_HEADS=triton.next_power_of_2(triton.cdiv(num_k_heads, groups)) if num_k_heads else 1,
        HALF=head_size // 2,
        COLUMNS=columns,
        # 32 bytes of each half of the queries for a thread.
        num_warps=min(16, max(4, tokens * pairs // groups * q_BTHE.element_size() // 1024)),
    )


def _batch_stride(table_BTE: Tensor) -> int:
    return 0 if table_BTE.shape[0] == 1 else table_BTE.stride(0)
