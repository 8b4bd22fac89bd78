"""Attention, by definition or by torch.

Legend: B batch, T tokens (queries), S keys, H heads, K key/value heads, E head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention", "attention_by_definition", "attention_by_torch", "visible"]


def attention(
    q_BTHE: Tensor,
    k_BTKE: Tensor,
    v_BTKE: Tensor,
    mask: Tensor | None = None,
    causal: bool = True,
    *,
    window: int | None = None,
    document_ids_BT: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kᵀ / sqrt(E)) v per head -> [B, T, H, E]; H is a multiple of K, and query head h reads head h // (H/K).

    Which keys a query sees is said as in ``rung_kernels.attention``. With ``return_lse``: also the log-sum-exp of its
    scores [B, T, H] in fp32, and then memory grows with T².
    """
    if mask is None:
        mask = visible(q_BTHE.shape[1], causal, window, document_ids_BT, q_BTHE.device)
    if return_lse or (q_BTHE.dtype == torch.float64 and torch.compiler.is_compiling()):
        # torch 2.11 tells inductor that the CPU's log-sum-exp is float32 in float64 too, and the backward pass fails.
        out, lse = attention_by_definition(q_BTHE, k_BTKE, v_BTKE, mask, causal)
        return (out, lse) if return_lse else out
    return attention_by_torch(q_BTHE, k_BTKE, v_BTKE, mask, causal)


def attention_by_torch(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Whichever of its kernels torch chooses; a mask replaces ``causal``."""
    out_BHTE = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BTKE.transpose(1, 2),
        v_BTKE.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=q_BTHE.shape[2] != k_BTKE.shape[2],
    )
    return out_BHTE.transpose(1, 2)


def attention_by_definition(
    q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """The formula itself in fp32, scores and all -> (out in q's dtype, log-sum-exp in fp32); memory grows with T²."""
    fp32 = torch.promote_types(q_BTHE.dtype, torch.float32)
    groups = q_BTHE.shape[2] // k_BTKE.shape[2]
    q_BHTE = q_BTHE.transpose(1, 2).to(fp32)
    k_BHSE, v_BHSE = (x.transpose(1, 2).repeat_interleave(groups, dim=1).to(fp32) for x in (k_BTKE, v_BTKE))
    scores_BHTS = q_BHTE @ k_BHSE.mT / math.sqrt(q_BTHE.shape[-1])
    if mask is None and causal:
        mask = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q_BTHE.device).tril()
    if mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask, -math.inf)
    out_BHTE = scores_BHTS.softmax(dim=-1) @ v_BHSE
    return out_BHTE.transpose(1, 2).to(q_BTHE.dtype), scores_BHTS.logsumexp(-1).transpose(1, 2)


def visible(
    num_tokens: int, causal: bool, window: int | None, document_ids_BT: Tensor | None, device: torch.device
) -> Tensor | None:
    """bool [B or 1, 1, T, T], True where the query (row) sees the key (column); None where ``causal`` says it all."""
    if document_ids_BT is None and (window is None or window >= num_tokens):
        return None
    positions_T = torch.arange(num_tokens, device=device)
    distance_TT = positions_T.unsqueeze(-1) - positions_T
    seen = distance_TT >= 0 if causal else torch.ones_like(distance_TT, dtype=torch.bool)
    if window is not None:
        seen = seen & (distance_TT < window)
    if document_ids_BT is None:
        return seen[None, None]
    runs_BT = runs(document_ids_BT)
    return (seen & (runs_BT.unsqueeze(-1) == runs_BT.unsqueeze(-2))).unsqueeze(1)


def runs(ids_BT: Tensor) -> Tensor:
    """int64 [B, T]: the number of the run of equal ids that a token is in, from 0 in each row."""
    changes = ids_BT[:, 1:] != ids_BT[:, :-1]
    return torch.nn.functional.pad(changes.long().cumsum(1), (1, 0))
