"""Tokens to the rows of their experts and back: a counting sort of small integers, and two kernels that move rows.

Legend: N tokens, K experts of a token (its slots), M = N · K entries and rows, X experts, D features, G blocks of
entries. An expert that is none of 0 … X - 1 counts as expert X. Tokens in tiles, so that narrow rows fill a program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rung_kernels.triton_kernels.launch import launch

__all__ = ["MAX_FEATURES", "MAX_SLOTS", "combine", "copy", "count", "num_blocks", "place"]

MAX_FEATURES = 16384  # a row is held in registers
MAX_SLOTS = 16
_TILE = 512  # elements of a tile, where rows are narrower
_BLOCK = 512  # entries that are counted together
_CHUNK = 64  # entries of which each is compared with every earlier one of the block


@triton.jit
def _group(experts, entries, num_entries, num_experts):
    """The expert of each entry, num_experts where that is none; beyond the last entry num_experts + 1."""
    expert = tl.load(experts + entries, entries < num_entries, 0)
    group = tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)
    return tl.where(entries < num_entries, group, num_experts + 1)


@triton.jit
def _count_entries(experts, counts, num_entries, num_experts, num_blocks, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    group = _group(experts, block * BLOCK + tl.arange(0, BLOCK).to(tl.int64), num_entries, num_experts)
    groups = tl.arange(0, GROUPS)
    tl.store(counts + groups.to(tl.int64) * num_blocks + block, tl.histogram(group, GROUPS), groups <= num_experts)


@triton.jit
def _place_entries(
    experts,
    ends,
    offsets,
    row_of,
    num_entries,
    num_experts,
    num_blocks,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    chunk = tl.program_id(0)
    block = (chunk // (BLOCK // CHUNK)).to(tl.int64)
    within = tl.arange(0, CHUNK)
    entries = chunk * CHUNK + within.to(tl.int64)
    group = _group(experts, entries, num_entries, num_experts)
    rank = tl.zeros([CHUNK], tl.int32)
    for other in range(chunk // (BLOCK // CHUNK) * (BLOCK // CHUNK), chunk + 1):
        others = _group(experts, other * CHUNK + within.to(tl.int64), num_entries, num_experts)
        earlier = ((other - chunk) * CHUNK + within)[None, :] < within[:, None]
        rank += tl.sum(((group[:, None] == others[None, :]) & earlier).to(tl.int32), 1)
    at = group.to(tl.int64) * num_blocks + block - 1  # of the block before: where this one's rows begin
    here = entries < num_entries
    row = tl.load(ends + at, here & (at >= 0), 0).to(tl.int64) + rank
    tl.store(row_of + entries, tl.where(group < num_experts, row, -1 - row), here)
    if chunk == 0:
        groups = tl.arange(0, GROUPS)
        end = tl.load(ends + (groups.to(tl.int64) + 1) * num_blocks - 1, groups < num_experts, 0)
        tl.store(offsets + groups, end, groups < num_experts)


@triton.jit
def _copy_rows(
    x,
    row_of,
    weights,
    kept,
    y,
    grad_weights,
    num_tokens,
    num_features,
    x_stride,
    kept_stride,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    columns = tl.arange(0, FEATURES)[None, :]
    exists = tokens < num_tokens
    inside = exists[:, None] & (columns < num_features)
    values = tl.load(x + tokens[:, None] * x_stride + columns, inside, 0.0).to(tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(row_of + tokens * SLOTS + slot, exists, 0)
        here = (row >= 0)[:, None]
        row = tl.where(row < 0, -1 - row, row)[:, None]
        out = tl.where(here, values, 0.0)
        if weights is not None:
            old = tl.load(kept + row * kept_stride + columns, inside & here, 0.0).to(tl.float32)
            tl.store(grad_weights + tokens * SLOTS + slot, tl.sum(values * old, 1), exists)
            out *= tl.load(weights + tokens * SLOTS + slot, exists, 0.0).to(tl.float32)[:, None]
        tl.store(y + row * num_features + columns, out.to(y.dtype.element_ty), inside)


@triton.jit
def _combine_rows(
    y,
    row_of,
    weights,
    out,
    num_tokens,
    num_features,
    y_stride,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    columns = tl.arange(0, FEATURES)[None, :]
    exists = tokens < num_tokens
    inside = exists[:, None] & (columns < num_features)
    total = tl.zeros([TOKENS, FEATURES], tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(row_of + tokens * SLOTS + slot, exists, -1)[:, None]
        values = tl.load(y + row * y_stride + columns, inside & (row >= 0), 0.0).to(tl.float32)
        if weights is not None:
            values *= tl.load(weights + tokens * SLOTS + slot, exists, 0.0).to(tl.float32)[:, None]
        total += values
    tl.store(out + tokens[:, None] * num_features + columns, total.to(out.dtype.element_ty), inside)


def num_blocks(num_entries: int) -> int:
    """G, at least 1, so that there are offsets without a token, too."""
    return max(1, triton.cdiv(num_entries, _BLOCK))


def count(experts_NK: Tensor, counts_XG: Tensor) -> None:
    """Fill counts (int32): of each expert, and of none in the last row, in each block of entries."""
    groups, blocks = counts_XG.shape
    launch(
        _count_entries,
        (blocks,),
        experts=experts_NK,
        counts=counts_XG,
        num_entries=experts_NK.numel(),
        num_experts=groups - 1,
        num_blocks=blocks,
        BLOCK=_BLOCK,
        GROUPS=triton.next_power_of_2(groups + 1),
    )


def place(experts_NK: Tensor, ends_XG: Tensor, offsets_X: Tensor, row_of_NK: Tensor) -> None:
    """Fill offsets (int32) and row_of (int64). ends: inclusive sums over the counts, in the order they lie."""
    groups, blocks = ends_XG.shape
    launch(
        _place_entries,
        (max(1, triton.cdiv(experts_NK.numel(), _CHUNK)),),
        experts=experts_NK,
        ends=ends_XG,
        offsets=offsets_X,
        row_of=row_of_NK,
        num_entries=experts_NK.numel(),
        num_experts=groups - 1,
        num_blocks=blocks,
        BLOCK=_BLOCK,
        CHUNK=_CHUNK,
        GROUPS=triton.next_power_of_2(groups),
    )


def copy(
    x_ND: Tensor,
    row_of_NK: Tensor,
    weights_NK: Tensor | None,
    kept_MD: Tensor | None,
    y_MD: Tensor,
    grad_weights_NK: Tensor | None,
) -> None:
    """Fill y: each token in the rows of its slots, times its weights where there are some, zeros in negative rows.

    With weights fill grad_weights (fp32), too: the products of the token and the rows of kept.
    """
    num_tokens, num_features = x_ND.shape
    tokens, features, num_warps = _tile(num_features)
    launch(
        _copy_rows,
        (triton.cdiv(num_tokens, tokens),),
        x=x_ND,
        row_of=row_of_NK,
        weights=weights_NK,
        kept=kept_MD,
        y=y_MD,
        grad_weights=grad_weights_NK,
        num_tokens=num_tokens,
        num_features=num_features,
        x_stride=x_ND.stride(0),
        kept_stride=0 if kept_MD is None else kept_MD.stride(0),
        SLOTS=row_of_NK.shape[1],
        TOKENS=tokens,
        FEATURES=features,
        num_warps=num_warps,
    )


def combine(y_MD: Tensor, row_of_NK: Tensor, weights_NK: Tensor | None, out_ND: Tensor) -> None:
    """Fill out: the sum of each token's rows of y, times weights where there are some, slot by slot in fp32."""
    num_tokens, num_features = out_ND.shape
    tokens, features, num_warps = _tile(num_features)
    launch(
        _combine_rows,
        (triton.cdiv(num_tokens, tokens),),
        y=y_MD,
        row_of=row_of_NK,
        weights=weights_NK,
        out=out_ND,
        num_tokens=num_tokens,
        num_features=num_features,
        y_stride=y_MD.stride(0),
        SLOTS=row_of_NK.shape[1],
        TOKENS=tokens,
        FEATURES=features,
        num_warps=num_warps,
    )


def _tile(num_features: int) -> tuple[int, int, int]:
    """Tokens, columns, and warps of about 8 elements a thread."""
    features = triton.next_power_of_2(num_features)
    tokens = max(1, min(32, _TILE // features))
    return tokens, features, min(16, max(4, tokens * features // 256))
