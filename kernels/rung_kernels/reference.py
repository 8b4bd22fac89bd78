"""Plain torch references: the maths each kernel is held against, and what runs where no kernel exists.

Legend: B batch, T tokens, D features, H heads, K key/value heads, E head size, N rows (tokens), V vocabulary, C rows of
one chunk. "fp32" means promote(dtype, float32).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention", "cross_entropy", "rms_norm", "rope", "swiglu"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32, rounded once to x's dtype.

    x [..., D], weight [D] -> [..., D]. Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _rotate(x_BTHE: Tensor, cos_BT1E: Tensor, sin_BT1E: Tensor) -> Tensor:
    first, second = x_BTHE.chunk(2, dim=-1)
    turned = x_BTHE * cos_BT1E + torch.cat((-second, first), dim=-1) * sin_BT1E
    return turned.to(x_BTHE.dtype)


def rope(q_BTHE: Tensor, k_BTKE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the feature pairs (e, e + E/2) of every head by the angle of its position.

    cos_BTE and sin_BTE hold E/2 angles twice, batch 1 allowed; in float32 for narrower q and k, so that the product is
    rounded once. Su et al. 2021, "RoFormer", equation 34, with Hugging Face's pairing of halves.
    """
    cos_BT1E, sin_BT1E = cos_BTE.unsqueeze(-2), sin_BTE.unsqueeze(-2)
    return _rotate(q_BTHE, cos_BT1E, sin_BT1E), _rotate(k_BTKE, cos_BT1E, sin_BT1E)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, element by element. Shazeer 2020, "GLU Variants Improve Transformer", equation 6."""
    return F.silu(gate) * up


def attention(
    q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Tensor | None = None, causal: bool = True
) -> Tensor:
    """softmax(q kᵀ / sqrt(E)) v per head -> [B, T, H, E]; H is a multiple of K, and query head h reads head h // (H/K).

    mask: bool, broadcastable to [B, 1, T, T], True where the query (row) sees the key (column); it replaces ``causal``.
    Every query must see a key. Without a mask, ``causal`` lets token t see tokens 0..t.
    """
    q_BHTE, k_BKTE, v_BKTE = q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2)
    if q_BTHE.dtype == torch.float64 and torch.compiler.is_compiling():
        # torch 2.11 tells inductor that the CPU's log-sum-exp is float32 here too, and the backward pass fails.
        return _attention_by_definition(q_BHTE, k_BKTE, v_BKTE, mask, causal).transpose(1, 2)
    grouped = q_BTHE.shape[2] != k_BTKE.shape[2]
    out_BHTE = F.scaled_dot_product_attention(
        q_BHTE, k_BKTE, v_BKTE, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=grouped
    )
    return out_BHTE.transpose(1, 2)


def _attention_by_definition(
    q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """The formula itself, scores and all: memory grows with T²."""
    groups = q_BHTE.shape[1] // k_BKTE.shape[1]
    k_BHTE, v_BHTE = k_BKTE.repeat_interleave(groups, dim=1), v_BKTE.repeat_interleave(groups, dim=1)
    scores_BHTT = q_BHTE @ k_BHTE.mT / math.sqrt(q_BHTE.shape[-1])
    if mask is None and causal:
        mask = torch.ones(scores_BHTT.shape[-2:], dtype=torch.bool, device=q_BHTE.device).tril()
    if mask is not None:
        scores_BHTT = scores_BHTT.masked_fill(~mask, -math.inf)
    return scores_BHTT.softmax(dim=-1) @ v_BHTE


_CHUNK_ELEMENTS = {"cpu": 2**21}  # about the last-level cache
_CHUNK_ELEMENTS_ELSEWHERE = 2**25  # 128 MiB of float32: few launches, little memory


class _CrossEntropy(torch.autograd.Function):
    """Row-wise -log softmax(logits)[label]. Backward makes the softmax again from the logits, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, ignore_index: int) -> Tensor:
        fp32 = torch.promote_types(logits_NV.dtype, torch.float32)
        kept_N = labels_N != ignore_index
        column_N1 = labels_N.masked_fill(~kept_N, 0).unsqueeze(1)
        losses_N = logits_NV.new_empty(logits_NV.shape[0], dtype=fp32)
        for rows in _chunks(logits_NV):
            log_probs_CV = torch.log_softmax(logits_NV[rows], dim=-1, dtype=fp32)
            torch.neg(log_probs_CV.gather(1, column_N1[rows]).squeeze(1), out=losses_N[rows])
        ctx.save_for_backward(logits_NV, column_N1, kept_N)
        return losses_N.masked_fill_(~kept_N, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, column_N1, kept_N = ctx.saved_tensors
        grad_N1 = grad_N.masked_fill(~kept_N, 0.0).unsqueeze(1)
        grad_logits_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        in_place = logits_NV.dtype == grad_N.dtype
        for rows in _chunks(logits_NV):
            out_CV = grad_logits_NV[rows] if in_place else None
            probs_CV = torch.softmax(logits_NV[rows], dim=-1, dtype=grad_N.dtype, out=out_CV)
            probs_CV.mul_(grad_N1[rows]).scatter_add_(1, column_N1[rows], -grad_N1[rows])
            if not in_place:
                grad_logits_NV[rows] = probs_CV
        return grad_logits_NV, None, None


def _chunks(logits_NV: Tensor) -> list[slice]:
    """Slices of rows; the answer does not depend on their size, because every row stands alone."""
    elements = _CHUNK_ELEMENTS.get(logits_NV.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    num_rows, vocab_size = logits_NV.shape
    step = max(1, elements // vocab_size)
    return [slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]


def cross_entropy(logits_NV: Tensor, labels_N: Tensor, ignore_index: int = -100) -> Tensor:
    """Negative log-likelihood of each label, in nats -> losses_N in fp32; 0 where the label is ignore_index.

    Beside the logits at most one chunk of rows lives in fp32; the gradient has the logits' dtype.
    """
    return _CrossEntropy.apply(logits_NV, labels_N, ignore_index)
