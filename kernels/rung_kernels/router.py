"""Which experts a token goes to.

Legend: N tokens, X experts, K experts of a token. "fp32" means promote(dtype, float32).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rung_kernels import reference
from rung_kernels.dispatch import uses_triton
from rung_kernels.op import make_op

__all__ = ["router"]

_SCORES = ("softmax", "sigmoid")
_MAX_EXPERTS, _MAX_CHOSEN = 512, 16  # of triton_kernels.router, which is not imported before it is needed


def router(
    logits: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    score: str = "softmax",
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weights [N, K], experts [N, K] int64, counts [X] int64, scores [N, X]) of logits [N, X]; floats in fp32.

    scores = softmax or sigmoid of the logits. A token's experts are the K = ``top_k`` largest of scores + bias, which
    is [X], in descending order, equal ones in ascending order of the expert. weights = scale · scores of those experts,
    divided by their sum if ``normalize``, however small that is: the bias only chooses. With softmax and ``normalize``
    that is the softmax over the K largest logits, too. Without a bias the choice is made by
    the logits themselves, and is the same on every machine. counts: tokens of each expert, exact.

    Mixtral: the defaults. Switch: ``normalize=False``. DeepSeek-V3: sigmoid, its bias, ``scale=2.5``.
    Gradients reach the logits through weights and scores, never the bias. A balance loss over any number of
    micro-batches and ranks needs the sums of ``counts``, which no gradient passes, and ``scores.sum(0)``.
    Every token needs a finite logit; an expert with a logit of -inf has score 0.

    Fedus et al. 2021, "Switch Transformers", section 2.1; Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing",
    equation 3; DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", equations 12 to 16.
    Moves N·X elements and 4·N·X bytes of scores forward, 2·N·X elements backward, with 4·N·X bytes of gradients of the
    scores, unless that is the same for every token. ValueError for shapes or options that say nothing.
    """
    _check(logits, top_k, bias, score)
    fits = logits.shape[1] <= _MAX_EXPERTS and top_k <= _MAX_CHOSEN
    if not fits or not uses_triton("router", logits, bias):
        return reference.router(logits, top_k, bias=bias, score=score, normalize=normalize, scale=scale)
    weights, experts, counts, scores = _router(logits, bias, top_k, score, normalize, scale)
    return weights, experts, counts, scores


def _check(logits: Tensor, top_k: int, bias: Tensor | None, score: str) -> None:
    problems = []
    if score not in _SCORES:
        problems.append(f"score={score!r} is none of {', '.join(_SCORES)}")
    if logits.ndim != 2:
        problems.append(f"logits {tuple(logits.shape)} must be [tokens, experts]")
    else:
        num_experts = logits.shape[1]
        if not 1 <= top_k <= num_experts:
            problems.append(f"top_k={top_k} must be at least 1 and at most the {num_experts} experts")
        if bias is not None and bias.shape != (num_experts,):
            problems.append(f"bias {tuple(bias.shape)} must be [{num_experts}], a number for each expert")
    if problems:
        raise ValueError("; ".join(problems))


def _rows(x: Tensor) -> Tensor:
    """With contiguous rows."""
    return x if x.stride(1) == 1 else x.contiguous()


def _forward(
    logits: Tensor, bias: Tensor | None, top_k: int, score: str, normalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from rung_kernels.triton_kernels import router

    outputs = _fake_forward(logits, bias, top_k, score, normalize, scale)
    outputs[2].zero_()
    router.forward(_rows(logits), None if bias is None else bias.contiguous(), score, normalize, scale, *outputs)
    return outputs


def _fake_forward(
    logits: Tensor, bias: Tensor | None, top_k: int, score: str, normalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    return (
        logits.new_empty(num_tokens, top_k, dtype=torch.float32),
        logits.new_empty(num_tokens, top_k, dtype=torch.int64),
        logits.new_empty(num_experts, dtype=torch.int64),
        logits.new_empty(num_tokens, num_experts, dtype=torch.float32),
    )


def _backward(
    logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    score: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    from rung_kernels.triton_kernels import router

    if grad_weights is not None:
        grad_weights = grad_weights.contiguous()
    if grad_scores is not None:
        grad_scores = _rows(grad_scores)
    grad_logits = logits.new_empty(logits.shape)
    saved = _rows(logits), weights.contiguous(), experts.contiguous()
    router.backward(grad_weights, grad_scores, *saved, score, normalize, scale, grad_logits)
    return grad_logits


def _fake_backward(
    logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    score: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    logits, _, *options = inputs
    weights, experts, counts, _ = output
    ctx.mark_non_differentiable(experts, counts)
    ctx.options = options[1:]
    ctx.save_for_backward(logits, weights, experts)


def _differentiate(
    ctx: Any, backward: Any, grad_weights: Tensor | None, _: None, __: None, grad_scores: Tensor | None
) -> tuple[Any, ...]:
    if grad_weights is None and grad_scores is None:
        return (None,) * 6
    # A tensor comes first: DTensor of torch 2.11 finds its mesh there.
    return backward(*ctx.saved_tensors, grad_weights, grad_scores, *ctx.options), *(None,) * 5


_router = make_op(
    "router",
    _forward,
    _backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    differentiate=_differentiate,
)
