"""Attention by whichever engine fits: flash-attn, torch's own kernels, or the definition. None of them is ours.

Legend: B batch, T tokens (queries), S keys, H heads, K key/value heads, E head size, N documents and one. "fp32" means
promote(dtype, float32).
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from rung_kernels.block_attention import attention_backward, attention_forward
from rung_kernels.op import make_op
from rung_kernels.reference.attention import attention_by_definition, attention_by_torch, runs, visible

__all__ = ["ENGINES", "attention", "attention_engine"]

ENGINES = ("sdpa", "flash_attn", "varlen", "masked", "blocks", "definition")
"""In the order in which they are tried.

sdpa: torch's choice of cuDNN, flash or efficient, for what it can be told without a mask. flash_attn: the package of
that name (Dao 2023, "FlashAttention-2"). varlen: ``torch.nn.attention.varlen``, the same kernels. masked: sdpa with a
mask of T² elements. blocks: the kernels under sdpa, which also say the log-sum-exp. definition: scores and all.
"""

_HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None
_HAS_VARLEN = importlib.util.find_spec("torch.nn.attention.varlen") is not None


class _Case(NamedTuple):
    """What is asked for; ``window`` is None where it hides nothing."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    window: int | None
    documents: Tensor | None
    max_documents: int | None
    lse: bool


@overload
def attention(
    q_BTHE: Tensor,
    k_BTKE: Tensor,
    v_BTKE: Tensor,
    mask: Tensor | None = None,
    causal: bool = True,
    *,
    window: int | None = None,
    document_ids_BT: Tensor | None = None,
    max_documents: int | None = None,
    return_lse: Literal[False] = False,
    engine: str = "auto",
) -> Tensor: ...
@overload
def attention(
    q_BTHE: Tensor,
    k_BTKE: Tensor,
    v_BTKE: Tensor,
    mask: Tensor | None = None,
    causal: bool = True,
    *,
    window: int | None = None,
    document_ids_BT: Tensor | None = None,
    max_documents: int | None = None,
    return_lse: Literal[True],
    engine: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def attention(
    q_BTHE: Tensor,
    k_BTKE: Tensor,
    v_BTKE: Tensor,
    mask: Tensor | None = None,
    causal: bool = True,
    *,
    window: int | None = None,
    document_ids_BT: Tensor | None = None,
    max_documents: int | None = None,
    return_lse: bool = False,
    engine: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kᵀ / sqrt(E)) v per head -> [B, T, H, E]; H is a multiple of K, and query head h reads head h // (H/K).

    ``causal``: token t sees tokens 0..t. ``window``: and of those at most so many, itself among them (Beltagy et al.
    2020, "Longformer", section 3.1). ``document_ids_BT``: integers; a document is a run of equal ids, and tokens see
    only their own. ``max_documents``: no row has more of them; with it, flash_attn and varlen need no mask of T²
    elements, and what is more stops the program on the device. Where several documents are seldom that many, a number
    not far above what occurs is fast: kernels look at each that there might be.
    ``mask``: bool, broadcastable to [B, 1, T, S], True where the query (row) sees the key (column); it replaces all of
    these. Every query must see a key.

    return_lse: also the log-sum-exp of each query's scores [B, T, H] in fp32, through which no gradient flows.
    engine: one of ``ENGINES`` in place of what ``attention_engine`` says. Raises ValueError for what does not fit
    together, and for an engine that cannot do it.
    """
    arguments = (mask, causal, window, document_ids_BT, max_documents, return_lse)
    case = _case(q_BTHE, k_BTKE, v_BTKE, *arguments)
    name = _choose(case) if engine == "auto" else engine
    if engine != "auto":
        if engine not in ENGINES:
            raise ValueError(f"engine={engine!r} is none of auto, {', '.join(ENGINES)}")
        reason = _refusal(engine, case)
        if reason:
            raise ValueError(f"engine={engine!r}: {reason}")
    out, lse = _RUN[name](case)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def attention_engine(
    q_BTHE: Tensor,
    k_BTKE: Tensor,
    v_BTKE: Tensor,
    mask: Tensor | None = None,
    causal: bool = True,
    *,
    window: int | None = None,
    document_ids_BT: Tensor | None = None,
    max_documents: int | None = None,
    return_lse: bool = False,
) -> str:
    """Which of ``ENGINES`` computes ``attention`` of the same arguments: the first that can."""
    return _choose(
        _case(q_BTHE, k_BTKE, v_BTKE, mask, causal, window, document_ids_BT, max_documents, return_lse),
    )


def _case(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int | None,
    documents: Tensor | None,
    max_documents: int | None,
    lse: bool,
) -> _Case:
    """Refuses what does not fit together."""
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if mask is not None and (window is not None or documents is not None):
        raise ValueError("a mask replaces window and document_ids_BT; say it all in the mask, or give none")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window={window} must be at least 1, and needs causal=True")
    if (window is not None or documents is not None) and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"window and document_ids_BT need as many keys as queries, not {k.shape[1]} for {q.shape[1]}; use a mask"
        )
    if documents is not None and documents.shape != q.shape[:2]:
        raise ValueError(f"document_ids_BT is {tuple(documents.shape)}, and must be {tuple(q.shape[:2])}")
    if max_documents is not None and (documents is None or max_documents < 1):
        raise ValueError(f"max_documents={max_documents} must be at least 1, and needs document_ids_BT")
    if window is not None and window >= q.shape[1]:
        window = None
    return _Case(q, k, v, mask, causal and mask is None, window, documents, max_documents, lse)


def _choose(case: _Case) -> str:
    return next(name for name in ENGINES if not _refusal(name, case))


def _refusal(name: str, case: _Case) -> str:
    """Why this engine cannot do it, or must not be chosen; empty: it can."""
    q, plain = case.q, case.mask is None and case.window is None and case.documents is None
    square = q.shape[1] == case.k.shape[1]
    if name == "definition":
        return ""
    if name == "blocks":
        if case.causal and not square:
            return f"causal needs as many keys as queries, not {case.k.shape[1]} for {q.shape[1]}"
        return ""
    if name in ("sdpa", "masked"):
        if q.dtype == torch.float64 and torch.compiler.is_compiling():
            # torch 2.11 tells inductor that the CPU's log-sum-exp is float32 here too, and the backward pass fails.
            return "float64 is not compiled right"
        if q.device.type == "cpu" and _is_spread(q):
            return "the CPU's kernel has no rule for DTensors"
        if case.lse:
            return "the log-sum-exp stays inside"
        return "" if name == "masked" or plain else "it can be told mask, window and documents only as a mask"
    return _why_not_flash(q) or _why_not_called(name, case, square)


def _why_not_flash(q: Tensor) -> str:
    """What kernels of the flash family do not take."""
    if q.device.type != "cuda":
        return f"it runs on CUDA, not on {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs compute capability 8.0"
    if _is_spread(q):
        return "it has no rule for DTensors"
    return ""


def _why_not_called(name: str, case: _Case, square: bool) -> str:
    if name == "flash_attn" and not _HAS_FLASH_ATTN:
        return "the package flash-attn is not installed"
    if name == "varlen" and not _HAS_VARLEN:
        return "this torch has no torch.nn.attention.varlen"
    if case.q.shape[-1] % 8 or case.q.shape[-1] > 256:
        return f"the head size is a multiple of 8 up to 256, not {case.q.shape[-1]}"
    if case.q.numel() == 0 or case.k.numel() == 0:
        return "there is nothing to attend to"
    if case.mask is not None:
        return "it takes no mask"
    if case.causal and not square:
        return f"causal needs as many keys as queries, not {case.k.shape[1]} for {case.q.shape[1]}"
    if case.documents is not None and case.max_documents is None:
        return "documents need max_documents"
    if name == "varlen" and case.q.shape[2] != case.k.shape[2] and not _varlen_groups_heads():
        return "this torch's has as many key/value heads as query heads"
    return ""


# --- the engines


def _sdpa(case: _Case) -> tuple[Tensor, Tensor | None]:
    return attention_by_torch(case.q, case.k, case.v, _mask(case), case.causal), None


def _definition(case: _Case) -> tuple[Tensor, Tensor | None]:
    out, lse = attention_by_definition(case.q, case.k, case.v, _mask(case), case.causal)
    return out, lse.detach()


def _blocks(case: _Case) -> tuple[Tensor, Tensor | None]:
    mask = _mask(case)
    out, lse = _attention_with_lse(case.q, case.k, case.v, mask, case.causal and mask is None)
    return out, lse


def _flash_attn(case: _Case) -> tuple[Tensor, Tensor | None]:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    options: dict[str, Any] = {
        "causal": case.causal,
        "window_size": (-1, -1) if case.window is None else (case.window - 1, 0),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "return_attn_probs": case.lse,
    }
    if case.documents is None:
        found = flash_attn_func(case.q, case.k, case.v, **options)
        return (found[0], found[1].detach().transpose(1, 2)) if case.lse else (found, None)
    ends_N, longest = _boundaries(case.documents, case.max_documents), case.q.shape[1]
    found = flash_attn_varlen_func(*_packed(case), ends_N, ends_N, longest, longest, **options)
    return _unpacked(case, *(found[:2] if case.lse else (found, None)))


def _varlen(case: _Case) -> tuple[Tensor, Tensor | None]:
    from torch.nn.attention import varlen

    longest, num_keys = case.q.shape[1], case.k.shape[1]
    if case.documents is None:
        ends_N = torch.arange(0, case.q.shape[0] + 1, dtype=torch.int32, device=case.q.device)
        ends_q, ends_k = ends_N * longest, ends_N * num_keys
    else:
        ends_q = ends_k = _boundaries(case.documents, case.max_documents)
    options: dict[str, Any] = {}
    if case.causal:
        options["window_size"] = (-1 if case.window is None else case.window - 1, 0)
    if case.q.shape[2] != case.k.shape[2]:
        options["enable_gqa"] = True
    if case.lse:
        options["return_aux"] = varlen.AuxRequest(lse=True)
    found = varlen.varlen_attn(*_packed(case), ends_q, ends_k, longest, num_keys, **options)
    return _unpacked(case, *(found if case.lse else (found, None)))


_RUN = {
    "sdpa": _sdpa,
    "flash_attn": _flash_attn,
    "varlen": _varlen,
    "masked": _sdpa,
    "blocks": _blocks,
    "definition": _definition,
}


def _mask(case: _Case) -> Tensor | None:
    if case.mask is not None:
        return case.mask
    tokens, device, ids = case.q.shape[1], case.q.device, case.documents
    if not _is_spread(case.q):
        return visible(tokens, case.causal, case.window, ids, device)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    # Each rank makes the mask of the rows whose ids it has; without rows, all make the same.
    q: Any = case.q
    mesh = q.device_mesh
    placements: list[Any] = [Replicate()] * mesh.ndim
    if ids is not None and _is_spread(ids):
        spread: Any = ids
        placements = [p if p == Shard(0) else Replicate() for p in spread.placements]
        ids = spread.redistribute(mesh, placements).to_local()
    mask = visible(tokens, case.causal, case.window, ids, device)
    if mask is None:
        return None
    shape = torch.Size((mask.shape[0] if case.documents is None else case.documents.shape[0], 1, tokens, tokens))
    return DTensor.from_local(
        mask, mesh, placements, run_check=False, shape=shape, stride=(tokens * tokens, tokens * tokens, tokens, 1)
    )


def _is_spread(x: Tensor) -> bool:
    """Whether it is a DTensor; asked so that nothing of torch.distributed is imported, and that compilers follow."""
    return hasattr(x, "placements")


def _packed(case: _Case) -> tuple[Tensor, Tensor, Tensor]:
    """All rows of the batch as one."""
    return case.q.flatten(0, 1), case.k.flatten(0, 1), case.v.flatten(0, 1)


def _unpacked(case: _Case, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``lse`` comes with heads first."""
    shape = case.q.shape[:2]
    return out.unflatten(0, shape), None if lse is None else lse.detach().T.unflatten(0, shape)


def _boundaries(ids_BT: Tensor, max_documents: int | None) -> Tensor:
    """int32 [N]: where each document starts in all rows as one, and B · T for each that is not there.

    Made on the device: the host knows only how many there are at most.
    """
    assert max_documents is not None
    batch, tokens = ids_BT.shape
    most = min(max_documents, tokens)
    runs_BT = runs(ids_BT)
    counts_B = runs_BT[:, -1] + 1
    torch._assert_async((counts_B <= most).all(), f"a row has more than max_documents={max_documents} documents")
    numbers_BT = runs_BT + (counts_B.cumsum(0) - counts_B).unsqueeze(1)
    each_N = torch.arange(batch * most + 1, device=ids_BT.device)
    return torch.searchsorted(numbers_BT.flatten(), each_N, out_int32=True)


def _varlen_groups_heads() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


# --- an operator of the kernels that say the log-sum-exp


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = attention_forward(q, k, v, mask, causal)
    return out.contiguous(), lse.contiguous()


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    fp32 = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=fp32)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = attention_backward(grad, q, k, v, out, lse, mask, causal)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, mask)


def _differentiate(ctx: Any, backward: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None, None
    return *backward(grad, *ctx.saved_tensors, ctx.causal), None, None


_attention_with_lse = make_op(
    "attention_with_lse",
    _forward,
    _backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    differentiate=_differentiate,
)
