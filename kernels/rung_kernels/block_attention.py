"""Attention of some queries over some keys, with what is needed to join it with attention over other keys.

A block returns its output and the log-sum-exp of its scores. Outputs of the same queries over several blocks of keys
are joined by ``merge_lse``; the backward pass of each block then takes the *joined* output and log-sum-exp, from which
it makes the joined probabilities, so that gradients of queries, keys and values are plain sums over blocks (Liu et al.
2023, "Ring Attention with Blockwise Transformers", section 3; Dao 2023, "FlashAttention-2", algorithm 2).

Legend: B batch, T queries, S keys, H heads, K key/value heads, E head size, 1 a broadcast dimension. "fp32" means
promote(dtype, float32).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rung_kernels.merge_lse import merge_lse

__all__ = ["attention_backward", "attention_forward", "merge_lse"]

_aten: Any = torch.ops.aten


def attention_forward(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / sqrt(E)) v over these keys alone -> (out_BTHE in q's dtype, lse_BTH in fp32).

    H is a multiple of K, and query head h reads head h // (H/K). mask: bool, broadcastable to [B, 1, T, S], True where
    the query (row) sees the key (column); it replaces ``causal``, which needs T = S and lets query t see keys 0..t.
    A query that sees no key has output 0 and log-sum-exp -inf; there may be no keys at all. Not differentiable: see
    ``attention_backward``. Raises ValueError for shapes that do not fit.
    """
    causal = _causal(q_BTHE, k_BSKE, mask, causal)
    mask = None if mask is None else mask[(None,) * (4 - mask.ndim)]
    if 0 in (q_BTHE.numel(), k_BSKE.numel()):  # the CPU's kernel divides by the number of keys
        return torch.zeros_like(q_BTHE), q_BTHE.new_full(q_BTHE.shape[:3], -math.inf, dtype=_fp32(q_BTHE))
    q, k, v = q_BTHE.transpose(1, 2), k_BSKE.transpose(1, 2), v_BSKE.transpose(1, 2)
    engine = _engine(q, mask)
    if engine == "cpu":
        bias = None if mask is None else _bias(mask, q.dtype, k.shape[2])
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)
    elif engine == "flash":
        out, lse = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    elif engine == "efficient":
        bias = None if mask is None else _bias(mask, q.dtype, k.shape[2]).expand(*q.shape[:3], -1)
        k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
        out, lse = _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal)[:2]
        lse = lse[..., : q.shape[2]]  # the kernel pads it
    else:
        out, lse = _formula_forward(q, k, v, mask, causal)
    out, lse = out.transpose(1, 2), lse.transpose(1, 2)
    if mask is not None:
        # What a kernel says of a row that sees nothing differs: 0, a mean of all values, or NaN.
        sees = mask.any(dim=-1).transpose(1, 2)
        out, lse = torch.where(sees.unsqueeze(-1), out, 0.0), lse.masked_fill(~sees, -math.inf)
    return out, lse


def attention_backward(
    grad_out_BTHE: Tensor,
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    out_BTHE: Tensor,
    lse_BTH: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share of the gradients -> (dq_BTHE, dk_BSKE, dv_BSKE) in the dtype of q, k and v.

    ``out_BTHE`` and ``lse_BTH`` are those of the queries over *all* their keys, after merging. The block itself is said
    as in ``attention_forward``.
    """
    causal = _causal(q_BTHE, k_BSKE, mask, causal)
    mask = None if mask is None else mask[(None,) * (4 - mask.ndim)]
    if 0 in (q_BTHE.numel(), k_BSKE.numel()):
        return torch.zeros_like(q_BTHE), torch.zeros_like(k_BSKE), torch.zeros_like(v_BSKE)
    q, k, v = q_BTHE.transpose(1, 2), k_BSKE.transpose(1, 2), v_BSKE.transpose(1, 2)
    grad, out = grad_out_BTHE.contiguous().transpose(1, 2), out_BTHE.transpose(1, 2)
    # A query that sees nothing anywhere: any finite number makes its probabilities exp(-inf) = 0, -inf makes them NaN.
    lse = lse_BTH.masked_fill(lse_BTH == -math.inf, 0.0).transpose(1, 2).contiguous()
    engine = _engine(q, mask)
    if engine == "cpu":
        bias = None if mask is None else _bias(mask, q.dtype, k.shape[2])
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias
        )
    elif engine == "flash":
        # Without dropout nobody reads the state of the generator; lengths are all equal, so there are no offsets.
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        grads = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, state, state[:0]
        )
    elif engine == "efficient":
        bias = None if mask is None else _bias(mask, q.dtype, k.shape[2]).expand(*q.shape[:3], -1)
        heads, kv_heads = q.shape[1], k.shape[1]
        k, v = _repeat(k, heads), _repeat(v, heads)
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)  # as the kernel's own forward pads it
        state = torch.empty((), dtype=torch.int64, device=q.device)
        needed = [True, True, True, False]
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, bias, out, lse, state, state, 0.0, needed, causal
        )
        grads = dq, _sum_repeated(dk, kv_heads), _sum_repeated(dv, kv_heads)
    else:
        grads = _formula_backward(grad, q, k, v, out, lse, mask, causal)
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return dq, dk, dv


def _fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _causal(q_BTHE: Tensor, k_BSKE: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether the kernel is to be told causal; kernels disagree about which corner a rectangle's diagonal starts at."""
    if q_BTHE.shape[2] % k_BSKE.shape[2]:
        raise ValueError(f"{q_BTHE.shape[2]} query heads are not a multiple of {k_BSKE.shape[2]} key/value heads")
    if mask is None and causal and q_BTHE.shape[1] != k_BSKE.shape[1]:
        raise ValueError(f"causal needs as many keys as queries, not {k_BSKE.shape[1]} for {q_BTHE.shape[1]}")
    return mask is None and causal


def _engine(q: Tensor, mask: Tensor | None) -> str:
    """Which code computes the block: cpu, flash, efficient, or formula where no kernel fits."""
    if torch.compiler.is_compiling():  # torch 2.11 tells inductor that the CPU's log-sum-exp is float32 in float64 too
        return "formula"
    if q.device.type == "cpu":
        return "cpu" if q.dtype in (torch.float64, torch.float32, torch.bfloat16) else "formula"
    if q.device.type == "cuda" and q.shape[-1] % 8 == 0 and q.dtype != torch.float64:
        if mask is None and q.dtype != torch.float32 and q.shape[-1] <= 256 and _has_flash(q.device):
            return "flash"
        return "efficient"
    return "formula"


@functools.cache
def _has_flash(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _bias(mask: Tensor, dtype: torch.dtype, num_keys: int) -> Tensor:
    """What is added to the scores: 0 where mask is True; in q's dtype, as the kernels want it.

    Not -inf but a number whose exponential is 0 beside any score: rows without a key then stay free of NaN. Rows are
    stored 16 elements apart or a multiple, which CUDA's kernel reads aligned.
    """
    mask = mask.expand(*mask.shape[:-1], num_keys)
    shape = (*mask.shape[:-1], num_keys + -num_keys % 16)
    bias = torch.zeros(shape, dtype=dtype, device=mask.device)[..., :num_keys]
    return bias.masked_fill_(~mask, torch.finfo(dtype).min / 2)


def _repeat(x_BKSE: Tensor, num_heads: int) -> Tensor:
    return x_BKSE.repeat_interleave(num_heads // x_BKSE.shape[1], dim=1) if x_BKSE.shape[1] != num_heads else x_BKSE


def _sum_repeated(x_BHSE: Tensor, num_kv_heads: int) -> Tensor:
    """The gradient of ``_repeat``."""
    return x_BHSE if x_BHSE.shape[1] == num_kv_heads else x_BHSE.unflatten(1, (num_kv_heads, -1)).sum(2)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """fp32 [B, H, T, S], -inf where not seen."""
    scores = q.to(_fp32(q)) @ _repeat(k, q.shape[1]).to(_fp32(q)).mT / math.sqrt(q.shape[-1])
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores if mask is None else scores.masked_fill(~mask, -math.inf)


def _formula_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """The definition, on [B, H, T, E]; memory grows with T · S."""
    scores = _scores(q, k, mask, causal)
    lse = scores.logsumexp(-1)
    base = lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)
    out = torch.exp(scores - base) @ _repeat(v, q.shape[1]).to(scores.dtype)
    return out.to(q.dtype), lse


def _formula_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    probs = torch.exp(_scores(q, k, mask, causal) - lse.unsqueeze(-1))
    fp32, (heads, kv_heads) = probs.dtype, (q.shape[1], k.shape[1])
    grad = grad.to(fp32)
    dprobs = grad @ _repeat(v, heads).to(fp32).mT
    delta = (grad * out.to(fp32)).sum(-1, keepdim=True)
    dscores = probs * (dprobs - delta) / math.sqrt(q.shape[-1])
    dq = dscores @ _repeat(k, heads).to(fp32)
    dk = _sum_repeated(dscores.mT @ q.to(fp32), kv_heads)
    dv = _sum_repeated(probs.mT @ grad, kv_heads)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
