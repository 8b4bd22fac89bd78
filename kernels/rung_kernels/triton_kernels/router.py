"""Scores of the experts, the choice among them, and how often each was chosen: one pass over the logits.

Legend: N tokens, X experts, K experts of a token. Tokens in tiles, so that few experts fill a program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rung_kernels.triton_kernels.launch import launch, num_multiprocessors

__all__ = ["MAX_CHOSEN", "MAX_EXPERTS", "backward", "forward"]

MAX_EXPERTS = 512  # a token's scores are held in registers
MAX_CHOSEN = 16
_TILE = 512  # elements
_PROGRAMS_PER_MULTIPROCESSOR = 16

_LEAST = tl.constexpr(-(2**31))


@triton.jit
def _sortable(values):
    """32-bit integers in the order of these numbers: zeros are equal, NaN is above all, and none is ``_LEAST``."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return tl.where(values != values, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _scores(values, SIGMOID: tl.constexpr):
    """And 1 - scores, which rounding scores would lose where they are large."""
    if SIGMOID:
        small = tl.exp(-tl.abs(values))  # never overflows
        score = tl.where(values >= 0, 1.0, small) / (1.0 + small)
        rest = tl.where(values >= 0, small, 1.0) / (1.0 + small)
    else:
        score = tl.exp(values - tl.max(values, 1)[:, None])
        score /= tl.sum(score, 1)[:, None]
        rest = 1.0 - score
    return score, rest


@triton.jit
def _router_forward(
    logits,
    bias,
    weights,
    experts,
    counts,
    scores,
    num_tokens,
    num_experts,
    logits_stride,
    scale,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    columns = tl.arange(0, EXPERTS)[None, :]
    slots = tl.arange(0, SLOTS)[None, :]
    inside = columns < num_experts
    counted = tl.zeros([TOKENS, EXPERTS], tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, TOKENS), tl.num_programs(0)):
        tokens = (tile * TOKENS + tl.arange(0, TOKENS).to(tl.int64))[:, None]
        here = (tokens < num_tokens) & inside
        values = tl.load(logits + tokens * logits_stride + columns, here, tl.where(inside, 0.0, -float("inf")))
        values = values.to(tl.float32)
        score, _ = _scores(values, SIGMOID)
        tl.store(scores + tokens * num_experts + columns, score, here)
        # Both scores grow with the logit: without a bias logits say it without rounding, as in the reference.
        if bias is None:
            order = _sortable(values)
        else:
            order = _sortable(score + tl.load(bias + columns, inside, 0.0).to(tl.float32))
        order = tl.where(inside, order, _LEAST)
        chosen = tl.zeros([TOKENS, SLOTS], tl.int32)
        for slot in range(TOP_K):
            best = tl.max(order, 1)[:, None]
            expert = tl.min(tl.where(order == best, columns, EXPERTS), 1)[:, None]
            chosen = tl.where(slots == slot, expert, chosen)
            order = tl.where(columns == expert, _LEAST, order)
        counted += tl.where(here & (order == _LEAST), 1, 0)
        if NORMALIZE:
            # Shares of a sum of which every summand may be too small for a number: by the scores' logarithms.
            log = tl.gather(values, chosen, 1)
            if SIGMOID:
                log = tl.minimum(log, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(log)))
            log = tl.where(slots < TOP_K, log, -float("inf"))
            weight = tl.exp(log - tl.maximum(tl.max(log, 1), -3.4e38)[:, None])
            total = tl.sum(weight, 1)[:, None]
            weight /= tl.where(total == 0.0, 1.0, total)
        else:
            weight = tl.gather(score, chosen, 1)
        at = tokens * TOP_K + slots
        here = (tokens < num_tokens) & (slots < TOP_K)
        tl.store(weights + at, weight * scale, here)
        tl.store(experts + at, chosen.to(tl.int64), here)
    # Integers: the sum is the same in any order.
    columns = tl.arange(0, EXPERTS)
    tl.atomic_add(counts + columns, tl.sum(counted, 0).to(tl.int64), columns < num_experts, sem="relaxed")


@triton.jit
def _router_backward(
    grad_weights,
    grad_scores,
    logits,
    weights,
    experts,
    grad_logits,
    num_tokens,
    num_experts,
    grad_scores_stride,
    logits_stride,
    inverse_scale,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    columns = tl.arange(0, EXPERTS)[None, :]
    tokens = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS).to(tl.int64))[:, None]
    exists = tokens < num_tokens
    inside = columns < num_experts
    here = exists & inside
    values = tl.load(logits + tokens * logits_stride + columns, here, tl.where(inside, 0.0, -float("inf")))
    score, rest = _scores(values.to(tl.float32), SIGMOID)
    # Both derivatives begin with gradient times score, which is gradient times weight where that is known: nothing is
    # divided by a score, or by a sum of scores, that may be tiny.
    grads = tl.zeros([TOKENS, EXPERTS], tl.float32)
    if grad_weights is not None:
        share = tl.zeros([TOKENS, EXPERTS], tl.float32)
        for slot in range(TOP_K):
            expert = tl.load(experts + tokens * TOP_K + slot, exists, -1)
            weight = tl.load(weights + tokens * TOP_K + slot, exists, 0.0)
            grad = tl.load(grad_weights + tokens * TOP_K + slot, exists, 0.0).to(tl.float32)
            grads = tl.where(columns == expert, grad, grads)
            share = tl.where(columns == expert, weight, share)
        if NORMALIZE:
            grads -= tl.sum(grads * share, 1)[:, None] * inverse_scale
        grads *= share
    if grad_scores is not None:
        direct = tl.load(grad_scores + tokens * grad_scores_stride + columns, here, 0.0).to(tl.float32)
        # Through softmax, gradients lose their sum; what normalised weights bring has none.
        if not SIGMOID and NORMALIZE:
            direct -= tl.sum(direct * score, 1)[:, None]
        grads += direct * score
    if SIGMOID:
        grads *= rest
    elif not NORMALIZE:
        grads -= score * tl.sum(grads, 1)[:, None]
    tl.store(grad_logits + tokens * num_experts + columns, grads.to(grad_logits.dtype.element_ty), here)


def forward(
    logits_NX: Tensor,
    bias_X: Tensor | None,
    score: str,
    normalize: bool,
    scale: float,
    weights_NK: Tensor,
    experts_NK: Tensor,
    counts_X: Tensor,
    scores_NX: Tensor,
) -> None:
    """Fill weights and scores (fp32) and experts (int64), add to counts (int64). Rows of logits are contiguous."""
    num_tokens, num_experts = logits_NX.shape
    tokens, columns = _tile(num_experts)
    tiles = triton.cdiv(num_tokens, tokens)
    launch(
        _router_forward,
        (min(tiles, _PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(logits_NX.device)),),
        logits=logits_NX,
        bias=bias_X,
        weights=weights_NK,
        experts=experts_NK,
        counts=counts_X,
        scores=scores_NX,
        num_tokens=num_tokens,
        num_experts=num_experts,
        logits_stride=logits_NX.stride(0),
        scale=scale,
        SIGMOID=score == "sigmoid",
        NORMALIZE=normalize,
        TOP_K=experts_NK.shape[1],
        TOKENS=tokens,
        EXPERTS=columns,
        SLOTS=triton.next_power_of_2(experts_NK.shape[1]),
    )


def backward(
    grad_weights_NK: Tensor | None,
    grad_scores_NX: Tensor | None,
    logits_NX: Tensor,
    weights_NK: Tensor,
    experts_NK: Tensor,
    score: str,
    normalize: bool,
    scale: float,
    grad_logits_NX: Tensor,
) -> None:
    """Fill the gradient of the logits. Rows of these and of grad_scores are contiguous, the rest is as a whole."""
    num_tokens, num_experts = logits_NX.shape
    tokens, columns = _tile(num_experts)
    launch(
        _router_backward,
        (triton.cdiv(num_tokens, tokens),),
        grad_weights=grad_weights_NK,
        grad_scores=grad_scores_NX,
        logits=logits_NX,
        weights=weights_NK,
        experts=experts_NK,
        grad_logits=grad_logits_NX,
        num_tokens=num_tokens,
        num_experts=num_experts,
        grad_scores_stride=0 if grad_scores_NX is None else grad_scores_NX.stride(0),
        logits_stride=logits_NX.stride(0),
        inverse_scale=1.0 / scale if scale else 0.0,  # of weights that are then zero
        SIGMOID=score == "sigmoid",
        NORMALIZE=normalize,
        TOP_K=experts_NK.shape[1],
        TOKENS=tokens,
        EXPERTS=columns,
    )


def _tile(num_experts: int) -> tuple[int, int]:
    """Tokens and columns."""
    columns = triton.next_power_of_2(num_experts)
    return max(1, min(32, _TILE // columns)), columns
