"""Which experts a token goes to, by definition.

Legend: N tokens, X experts, K experts of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["router"]


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

    scores = softmax or sigmoid of the logits. A token's experts are the K largest of scores + bias, which is [X], in
    descending order, equal ones in ascending order of the expert. weights = scale · scores of those experts, divided by
    their sum if ``normalize``. No gradient reaches the bias.
    Fedus et al. 2021, "Switch Transformers", section 2.1; Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing",
    equation 3; DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", equations 12 to 16.
    """
    logits_NX = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score == "softmax":
        scores_NX, logs_NX = logits_NX.softmax(-1), logits_NX  # but for a constant
    else:
        # 1 / (1 + exp(-x)) is zero below -88 in float32, long before the score is. DTensor cannot differentiate
        # logsigmoid. Beyond its threshold softplus(x) is x, to less than an ulp of float64.
        logs_NX = -F.softplus(-logits_NX, threshold=50)
        scores_NX = logs_NX.exp()
    # Both scores grow with the logit: without a bias logits say it without rounding, alike on every machine.
    order_NX = (logits_NX if bias is None else scores_NX + bias).detach()
    # topk says nothing about equal values.
    experts_NK = order_NX.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    weights_NK = _shares(logs_NX.gather(1, experts_NK)) if normalize else scores_NX.gather(1, experts_NK)
    counts_X = torch.zeros_like(order_NX, dtype=torch.int64).scatter(1, experts_NK, 1).sum(0)
    return weights_NK * scale, experts_NK, counts_X, scores_NX


def _shares(logs_NK: Tensor) -> Tensor:
    """Of the sum of their exponentials, which may all be too small for a number; zeros where all logarithms are -inf.

    A sum that is zero, or so small that a gradient divided by it is infinite, is never divided by.
    """
    largest_N1 = logs_NK.detach().max(-1, keepdim=True).values.clamp(min=torch.finfo(logs_NK.dtype).min)
    powers_NK = (logs_NK - largest_N1).exp()
    total_N1 = powers_NK.sum(-1, keepdim=True)
    return powers_NK / total_N1.masked_fill(total_N1 == 0, 1)
