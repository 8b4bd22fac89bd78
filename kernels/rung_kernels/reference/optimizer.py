"""AdamW and SPAM over many tensors, one elementwise operation at a time.

Every operation is rounded by itself: no fused multiply-add, of which a vectorised loop has some and its ragged end
others, and division and square roots are correctly rounded. So an element's new bits follow from its old ones and the
factors, however tensors are cut into shards, and a kernel that keeps to this order can have the same bits.

All numbers that change from step to step arrive on the device, in one float64 tensor with a slot per ``Factor``: the
host never learns whether a step is skipped or moments are reset.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rung_kernels.philox import philox_torch

__all__ = ["ROUNDING_TAG", "Factor", "Rounding", "adamw_step", "spam_step"]


class Factor(IntEnum):
    """Slots of the float64 tensor ``factors``. Each is rounded once to the dtype of the arithmetic."""

    GRAD_SCALE = 0
    """What gradients are divided by."""
    SKIP = 1
    """1.0: nothing changes, and gradients may be NaN. 0.0: the step is done."""
    RESET = 2
    """1.0: moments count as zero before this step."""
    THRESHOLD = 3
    """spam_step: a gradient is a spike where g² > threshold · v and v > 0; infinity: never."""
    BETA1 = 4
    COMPLEMENT1 = 5
    """1 - beta1, in float64."""
    BETA2 = 6
    COMPLEMENT2 = 7
    """1 - beta2, in float64."""
    STEP_SIZE = 8
    """What m / (√v / divisor + eps) is multiplied by: the learning rate and all else that is the same for all."""
    DIVISOR = 9
    """√(1 - beta2^step) in Adam; 1 in SPAM, whose step size holds it."""
    EPS = 10
    DECAY = 11
    """1 - lr · weight_decay."""


ROUNDING_TAG = 0x524F554E
"""Last counter word of the draws of stochastic rounding: "ROUN"."""


class Rounding(NamedTuple):
    """Draws for rounding copies stochastically. Element i of tensor t is element ``firsts[t] + i`` of a logical tensor,
    and takes the low half of word e % 4 of the Philox counter (low and high 32 bits of e // 4, low 32 bits of step,
    ``ROUNDING_TAG``) under the key of t, e being that number."""

    keys: Tensor
    """int64 [tensors, 2]: two 32-bit words each."""
    firsts: Tensor
    """int64 [tensors]."""
    step: Tensor
    """int64 [], on the device."""


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    factors: Tensor,
    *,
    levels: Tensor | None = None,
    maxima: Tensor | None = None,
    gains: Tensor | None = None,
    counts: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
    rounding: Rounding | None = None,
) -> None:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) in place, as ``torch.optim.AdamW`` defines it, on all tensors.

    With g, m, v, w an element's gradient, moments and parameter, each line one rounded operation after another::

        g = g / GRAD_SCALE                       m, v = 0 where RESET
        g = g / maxima[t] · levels[t]            where |g| > levels[t]
        g = g · gains[t]
        w = w · DECAY
        m = m · BETA1 + g · COMPLEMENT1
        v = v · BETA2 + (g · g) · COMPLEMENT2
        w = w - m / (√v / DIVISOR + EPS) · STEP_SIZE

    Args:
        params: any shape and strides, of one floating dtype or several; as ``grads`` and both moments, tensor by
            tensor of the same shape. dtypes may differ: arithmetic is in promote(dtype of the parameter, float32), and
            what is stored is rounded once.
        factors: float64 [len(Factor)], on the parameters' device.
        levels, maxima: float64 [tensors], both or none: the level above which elements of a tensor are scaled down, and
            its largest element, which comes down to the level (AdaClip of Stable-SPAM).
        gains: float64 [tensors] (AdaGN of Stable-SPAM).
        counts: int64 [tensors]; the number of elements above the level is added, unless the step is skipped.
        copies: bfloat16, one for each parameter: receive the new parameters; rounded to nearest, or stochastically
            with ``rounding``, which needs contiguous tensors.
    """
    clip = None if levels is None or maxima is None else (levels, maxima)
    _step(params, grads, exp_avgs, exp_avg_sqs, factors, clip, gains, counts, copies, rounding, spam=False)


def spam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    factors: Tensor,
    *,
    counts: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
    rounding: Rounding | None = None,
) -> None:
    """SPAM (Huang et al., arXiv 2501.06842) in place on all tensors; arguments as of ``adamw_step``.

    Each line one rounded operation after another::

        g = g / GRAD_SCALE                       m, v = 0 where RESET
        g = copysign(√(v · THRESHOLD), g)        where v > 0 and g · g > v · THRESHOLD
        m = m · BETA1 + g · COMPLEMENT1
        v = v · BETA2 + (g · g) · COMPLEMENT2
        w = (w - m / (√v / DIVISOR + EPS) · STEP_SIZE) · DECAY

    ``counts`` receives the number of spikes. An element whose v is zero has no spikes: clipping its gradient to zero
    would keep v at zero, and the element still, until the next reset.
    """
    _step(params, grads, exp_avgs, exp_avg_sqs, factors, None, None, counts, copies, rounding, spam=True)


class _Piece(NamedTuple):
    """Rows of one of the tensors."""

    tensor: int
    """Its number."""
    first: int
    """Number of its elements before these."""
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    narrow: Tensor | None
    """Of the copy."""


def _step(
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
    skip, kept = factors[Factor.SKIP] > 0, factors[Factor.RESET] <= 0
    for pieces in _batches(params, grads, exp_avgs, exp_avg_sqs, copies):
        work = _work(pieces[0].param)
        f = factors.to(work)
        zero = torch.zeros((), dtype=work, device=factors.device)
        g: list[Tensor] = list(torch._foreach_div([x.grad.to(work) for x in pieces], f[Factor.GRAD_SCALE]))
        m = [torch.where(kept, x.exp_avg.to(work), zero) for x in pieces]
        v = [torch.where(kept, x.exp_avg_sq.to(work), zero) for x in pieces]
        above: list[Tensor] = []
        if spam:
            limits = torch._foreach_mul(v, f[Factor.THRESHOLD])
            above = [(x > 0) & (y * y > limit) for x, y, limit in zip(v, g, limits, strict=True)]
            clipped = [root.copysign(y) for root, y in zip(_sqrt(limits), g, strict=True)]
        elif clip is not None:
            levels, maxima = ([x[piece.tensor].to(work) for piece in pieces] for x in clip)
            above = [y.abs() > level for y, level in zip(g, levels, strict=True)]
            clipped = [y / top * level for y, level, top in zip(g, levels, maxima, strict=True)]
        if above:
            g = [torch.where(a, x, y) for a, x, y in zip(above, clipped, g, strict=True)]
        if gains is not None:
            g = [y * gains[piece.tensor].to(work) for y, piece in zip(g, pieces, strict=True)]
        if counts is not None and above:
            for piece, a in zip(pieces, above, strict=True):
                counts[piece.tensor] += torch.where(skip, 0, a.sum())

        torch._foreach_mul_(m, f[Factor.BETA1])
        torch._foreach_add_(m, torch._foreach_mul(g, f[Factor.COMPLEMENT1]))
        torch._foreach_mul_(v, f[Factor.BETA2])
        squares = torch._foreach_mul(g, g)
        torch._foreach_mul_(squares, f[Factor.COMPLEMENT2])
        torch._foreach_add_(v, squares)
        denominators = _sqrt(v)
        torch._foreach_div_(denominators, f[Factor.DIVISOR])
        torch._foreach_add_(denominators, f[Factor.EPS])
        updates = torch._foreach_div(m, denominators)
        torch._foreach_mul_(updates, f[Factor.STEP_SIZE])
        w = [x.param.to(work, copy=True) for x in pieces]
        if not spam:
            torch._foreach_mul_(w, f[Factor.DECAY])
        torch._foreach_sub_(w, updates)
        if spam:
            torch._foreach_mul_(w, f[Factor.DECAY])

        for piece, *new in zip(pieces, w, m, v, strict=True):
            if piece.narrow is not None:
                rounded = new[0].bfloat16() if rounding is None else _round(new[0], rounding, piece)
                piece.narrow.copy_(torch.where(skip, piece.narrow, rounded))
            for old, x in zip((piece.param, piece.exp_avg, piece.exp_avg_sq), new, strict=True):
                old.copy_(torch.where(skip, old, x.to(old.dtype)))


def _sqrt(values: Sequence[Tensor]) -> list[Tensor]:
    """Correctly rounded, as the rest is and as Triton's is: on the CPU torch asks a library that is not."""
    if values[0].device.type == "cpu":
        return [torch.from_numpy(np.sqrt(x.numpy(), out=np.empty(tuple(x.shape), x.numpy().dtype))) for x in values]
    return list(torch._foreach_sqrt(list(values)))


def _work(param: Tensor) -> torch.dtype:
    """What arithmetic is done in."""
    return torch.promote_types(param.dtype, torch.float32)


def _batches(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
) -> Iterator[list[_Piece]]:
    """What is worked on together, of one dtype of arithmetic: at most ``most`` elements, or one row of one tensor."""
    by_dtype: dict[torch.dtype, list[_Piece]] = {}
    for index, tensors in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, copies or params, strict=True)):
        param = tensors[0]
        if not param.numel():
            continue
        most = 1 << (18 if param.device.type == "cpu" else 24)  # a core's cache; memory and launches
        rows = max(1, most * param.shape[0] // param.numel()) if param.dim() else 1
        split = [x.split(rows) if param.dim() else (x,) for x in tensors]
        first = 0
        for p, g, m, v, copy in zip(*split, strict=True):
            pieces = by_dtype.setdefault(_work(param), [])
            if pieces and sum(x.param.numel() for x in pieces) + p.numel() > most:
                yield by_dtype.pop(_work(param))
                pieces = by_dtype.setdefault(_work(param), [])
            pieces.append(_Piece(index, first, p, g, m, v, copy if copies is not None else None))
            first += p.numel()
    yield from by_dtype.values()


def _round(values: Tensor, rounding: Rounding, piece: _Piece) -> Tensor:
    """bfloat16 neighbours of values, the upper one the more often the nearer it is."""
    exact = values.float()
    numbers = torch.arange(piece.first, piece.first + exact.numel(), device=exact.device).view(exact.shape)
    numbers = numbers + rounding.firsts[piece.tensor]
    quads = numbers >> 2
    words = philox_torch(quads, quads >> 32, rounding.step, ROUNDING_TAG, *rounding.keys[piece.tensor].unbind())
    draws = torch.stack(words).gather(0, (numbers & 3)[None])[0] & 0xFFFF
    bits = exact.view(torch.int32) + draws.to(torch.int32)  # carries into the half that is kept, away from zero
    return torch.where(exact.isfinite(), (bits & -0x10000).view(torch.float32), exact).bfloat16()
