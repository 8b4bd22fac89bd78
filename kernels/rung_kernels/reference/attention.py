"""Attention, by definition or by torch.

Legend: B batch, T tokens, H heads, K key/value heads, E head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention"]


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
