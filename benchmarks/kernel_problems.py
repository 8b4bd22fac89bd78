"""What kernels.py measures: every operation at the shapes of a model, who computes it, and the least that it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from kernel_shapes import Least, Maker, Problem, elsewhere, having
from torch import Tensor

import rung_kernels
from rung_kernels import reference

# --- what moves bytes


def norms(m: Maker) -> list[Problem]:
    liger = elsewhere("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    liger_add = elsewhere("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    s, found = m.size, []
    for rows, width in ((1, s.features), (1, 2 * s.features), (s.heads + s.kv_heads, s.head_size)):
        count = s.tokens * rows * width
        found.append(
            Problem(
                "rms_norm",
                f"{s.tokens} × {f'{rows} × ' if rows > 1 else ''}{width}",
                lambda tokens, rows=rows, width=width: (m.randn(tokens, rows, width), m.randn(width), 1e-5),
                reference.rms_norm,
                rung_kernels.rms_norm,
                {"forward": Least(0.85, 4 * count), "backward": Least(0.80, 6 * count)},
                s.tokens,
                s.checked,
                {"Liger": having(liger, lambda x, w, eps: liger.apply(x, w, eps, 0.0, "llama", True))},
            )
        )
    count = s.tokens * s.features
    for dtype, forward, backward in ((m.dtype, 8, 8), (torch.float32, 12, 16)):
        one = dtype == m.dtype
        found.append(
            Problem(
                "add_rms_norm",
                f"{s.tokens} × {s.features}{'' if one else ', float32 stream'}",
                lambda tokens, dtype=dtype: (
                    m.randn(tokens, s.features),
                    m.randn(tokens, s.features, dtype=dtype),
                    m.randn(s.features),
                    1e-5,
                ),
                reference.add_rms_norm,
                rung_kernels.add_rms_norm,
                {"forward": Least(0.85, forward * count), "backward": Least(0.80, backward * count)},
                s.tokens,
                s.checked,
                {"Liger": having(liger_add, lambda x, r, w, eps: liger_add.apply(x, r, w, eps, 0.0, "llama", False))}
                if one
                else {},
            )
        )
    return found


def rope(m: Maker) -> Problem:
    liger = elsewhere("liger_kernel.ops.rope", "LigerRopeFunction")
    s = m.size
    least = 4.0 * s.tokens * (s.heads + s.kv_heads) * s.head_size

    def make(tokens: int) -> tuple[Tensor, ...]:
        angles = torch.rand(1, tokens, s.head_size // 2, device=m.device).repeat(1, 1, 2) * 6.28
        q, k = m.randn(1, tokens, s.heads, s.head_size), m.randn(1, tokens, s.kv_heads, s.head_size)
        return q, k, angles.cos(), angles.sin()

    def theirs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.transpose(1, 2) for x in liger.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin))

    return Problem(
        "rope",
        f"{s.tokens} × ({s.heads} + {s.kv_heads}) × {s.head_size}",
        make,
        reference.rope,
        rung_kernels.rope,
        {"forward": Least(0.85, least), "backward": Least(0.80, least)},
        s.tokens,
        s.checked,
        {"Liger": having(liger, theirs)},
    )


def swiglu(m: Maker) -> Problem:
    liger = elsewhere("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
    s = m.size
    count = s.tokens * s.inner
    return Problem(
        "swiglu",
        f"{s.tokens} × {s.inner}",
        lambda tokens: (m.randn(tokens, s.inner), m.randn(tokens, s.inner)),
        reference.swiglu,
        rung_kernels.swiglu,
        {"forward": Least(0.85, 6 * count), "backward": Least(0.80, 10 * count)},
        s.tokens,
        s.checked,
        {"Liger": having(liger, lambda gate, up: liger.apply(gate, up))},
    )


def merge_lse(m: Maker) -> Problem:
    """A step of a ring: what was found so far in float32, what is new in bf16."""
    s = m.size
    count = s.tokens * s.heads * s.head_size

    def make(tokens: int) -> tuple[Tensor, ...]:
        old, new = (m.randn(1, tokens, s.heads, s.head_size, dtype=dtype) for dtype in (torch.float32, m.dtype))
        lse, new_lse = (m.randn(1, tokens, s.heads, dtype=torch.float32) for _ in range(2))
        return old, lse, new, new_lse

    return Problem(
        "merge_lse",
        f"{s.tokens} × {s.heads} × {s.head_size}",
        make,
        reference.merge_lse,
        rung_kernels.merge_lse,
        {"forward": Least(0.85, 10 * count), "backward": Least(0.80, 16 * count)},
        s.tokens,
        s.checked,
    )


def cross_entropy(m: Maker) -> Problem:
    liger = elsewhere("liger_kernel.ops.cross_entropy", "LigerCrossEntropyFunction")
    s = m.size
    return Problem(
        "cross_entropy",
        f"{s.tokens} × {s.vocab}",
        # So large that the gradient is not all in the labels' columns.
        lambda tokens: (m.randn(tokens, s.vocab, scale=3), m.below(s.vocab, tokens)),
        lambda logits, labels: reference.cross_entropy(logits, labels).mean(),
        lambda logits, labels: rung_kernels.cross_entropy(logits, labels).mean(),
        {"both": Least(0.80, 4.0 * s.tokens * s.vocab)},
        s.tokens,
        s.checked,
        {
            "F.cross_entropy": F.cross_entropy,
            "Liger": having(liger, lambda logits, labels: liger.apply(logits, labels, None)[0]),
        },
        formula=lambda logits, labels: F.cross_entropy(logits.float(), labels),
    )


# --- what multiplies


def linear_cross_entropy(m: Maker) -> Problem:
    liger = elsewhere("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    cce = elsewhere("cut_cross_entropy", "linear_cross_entropy")
    torchs = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    s = m.size

    def whole(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = x @ weight.T
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)

    others = {
        "F.linear_cross_entropy": having(torchs, lambda x, w, labels: torchs(x, w, labels)),
        "F.linear_cross_entropy, in chunks": having(
            options, lambda x, w, labels: torchs(x, w, labels, options=options())
        ),
        "Liger": having(liger, lambda x, w, labels: liger.apply(x, w, labels)[0]),
        "CCE": having(cce, cce),
    }
    return Problem(
        "linear_cross_entropy",
        f"{s.tokens} × {s.features} × {s.vocab}",
        lambda tokens: (
            m.randn(tokens, s.features),
            m.randn(s.vocab, s.features, scale=3 * s.features**-0.5),
            m.below(s.vocab, tokens),
        ),
        whole,
        lambda x, w, labels: rung_kernels.linear_cross_entropy(x, w, labels, reduction="sum") / len(labels),
        {"both": Least(0.60, flops=6.0 * s.tokens * s.features * s.vocab)},
        s.tokens,
        s.checked,
        others,
    )


def attention(m: Maker) -> Problem:
    """Causal, of one sequence. Whoever is faster than everyone else has reached the goal."""
    s = m.size
    least = 2.0 * s.tokens**2 * s.heads * s.head_size
    flash = elsewhere("flash_attn", "flash_attn_func")

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            return reference.attention(q, k, v)

    return Problem(
        "attention",
        f"{s.tokens} × ({s.heads} + 2 × {s.kv_heads}) × {s.head_size}",
        lambda tokens: tuple(m.randn(1, tokens, heads, s.head_size) for heads in (s.heads, s.kv_heads, s.kv_heads)),
        reference.attention,
        rung_kernels.attention,
        {"forward": Least(None, flops=least), "backward": Least(None, flops=2.5 * least)},
        s.tokens,
        4 * s.checked,
        {
            "cuDNN": cudnn if m.device.type == "cuda" else None,
            "flash-attn": having(flash, lambda q, k, v: flash(q, k, v, causal=True)),
        },
    )


# --- mixtures of experts


def router(m: Maker) -> Problem:
    s = m.size
    whole, chosen = s.tokens * s.experts, s.tokens * s.chosen
    return Problem(
        "router",
        f"{s.tokens} × {s.experts}, {s.chosen} chosen",
        lambda tokens: (m.randn(tokens, s.experts, dtype=torch.float32), s.chosen),
        reference.router,
        rung_kernels.router,
        {"forward": Least(0.85, 8 * whole + 12 * chosen), "backward": Least(0.80, 12 * whole + 12 * chosen)},
        s.tokens,
        s.checked,
    )


def permutations(m: Maker) -> list[Problem]:
    s = m.size

    def chosen(tokens: int) -> Tensor:
        return torch.rand(tokens, s.experts, device=m.device).topk(s.chosen).indices

    def combined(tokens: int) -> tuple[Tensor, ...]:
        row_of = reference.permute(m.randn(tokens, 1, grad=False), chosen(tokens), s.experts)[2]
        weights = torch.rand(tokens, s.chosen, device=m.device).requires_grad_()
        return m.randn(tokens * s.chosen, s.moe_features), row_of, weights

    row, shape = 2.0 * s.tokens * s.moe_features, f"{s.tokens} × {s.chosen} × {s.moe_features}"
    return [
        Problem(
            "permute",
            shape,
            lambda tokens: (m.randn(tokens, s.moe_features), chosen(tokens), s.experts),
            reference.permute,
            rung_kernels.permute,
            {"forward": Least(0.85, (1 + s.chosen) * row), "backward": Least(0.80, (1 + s.chosen) * row)},
            s.tokens,
            s.checked,
        ),
        Problem(
            "unpermute",
            shape,
            combined,
            reference.unpermute,
            rung_kernels.unpermute,
            {"forward": Least(0.85, (1 + s.chosen) * row), "backward": Least(0.80, (1 + 2 * s.chosen) * row)},
            s.tokens,
            s.checked,
        ),
    ]


def grouped_mm(m: Maker) -> Problem:
    """Gate and up projections of all experts, with as many tokens as a uniform draw gives each."""
    torchs = getattr(F, "grouped_mm", None)
    s = m.size
    least = 4.0 * s.tokens * s.chosen * s.moe_features * s.moe_inner

    def make(tokens: int) -> tuple[Tensor, ...]:
        rows = tokens * s.chosen
        ends = m.below(s.experts, rows).bincount(minlength=s.experts).cumsum(0).to(torch.int32)
        weights = m.randn(s.experts, s.moe_features, 2 * s.moe_inner, scale=s.moe_features**-0.5)
        return m.randn(rows, s.moe_features), weights, ends

    return Problem(
        "grouped_mm",
        f"{s.tokens} × {s.chosen} × {s.moe_features} × {2 * s.moe_inner}, {s.experts} groups",
        make,
        reference.grouped_mm,
        rung_kernels.grouped_mm,
        {"forward": Least(None, flops=least), "backward": Least(None, flops=2 * least)},
        s.tokens,
        s.checked,
        {"F.grouped_mm": having(torchs, lambda x, weights, ends: torchs(x, weights, offs=ends))},
        # The reference reads the offsets on the host; what is compiled is what a model without kernels would call.
        formula=having(torchs, lambda x, weights, ends: torchs(x, weights, offs=ends)),
    )


# --- what steps


def optimizers(m: Maker) -> list[Problem]:
    s, found = m.size, []
    shapes = [(s.features, s.features), (s.inner, s.features), (s.features, s.inner), (s.features,)] * 2
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    at = reference.Factor
    numbers = {at.GRAD_SCALE: 1.0, at.THRESHOLD: 5000.0, at.BETA1: 0.9, at.COMPLEMENT1: 0.1, at.BETA2: 0.999}
    numbers |= {
        at.COMPLEMENT2: 0.001,
        at.STEP_SIZE: 1e-3 / 0.1,
        at.DIVISOR: 0.001**0.5,
        at.EPS: 1e-8,
        at.DECAY: 1 - 1e-5,
    }

    def make(tokens: int) -> tuple[Any, ...]:
        sizes = shapes if tokens == s.tokens else [(tokens, shape[-1]) for shape in shapes]
        params, grads, averages, squares = (
            [m.randn(*shape, dtype=torch.float32, grad=False) for shape in sizes] for _ in range(4)
        )
        factors = torch.zeros(len(at), dtype=torch.float64)
        for slot, value in numbers.items():
            factors[slot] = value
        return params, grads, averages, [x.square_() for x in squares], factors.to(m.device)

    def formula(params: Any, grads: Any, averages: Any, squares: Any, f: Tensor, spam: bool) -> None:
        """As few operations as torch.compile could wish for, on a device's scalars."""
        f = f.to(params[0].dtype)
        for w, g, a, v in zip(params, grads, averages, squares, strict=True):
            if spam:
                limit = v * f[at.THRESHOLD]
                g = torch.where((v > 0) & (g * g > limit), limit.sqrt().copysign(g), g)
            a.mul_(f[at.BETA1]).add_(g * f[at.COMPLEMENT1])
            v.mul_(f[at.BETA2]).add_(g * g * f[at.COMPLEMENT2])
            step = a / (v.sqrt() / f[at.DIVISOR] + f[at.EPS]) * f[at.STEP_SIZE]
            w.copy_((w - step) * f[at.DECAY] if spam else w * f[at.DECAY] - step)

    first = [torch.ones((), device=m.device) for _ in shapes]

    def fused(params: Any, grads: Any, averages: Any, squares: Any, _: Tensor) -> None:
        adamw = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
        flags = {"amsgrad": False, "maximize": False, "grad_scale": None, "found_inf": None}
        torch._fused_adamw_(params, grads, averages, squares, [], first, **adamw, **flags)  # type: ignore[attr-defined]

    for name in ("adamw_step", "spam_step"):
        spam = name == "spam_step"
        found.append(
            Problem(
                name,
                f"{numel / 1e6:.0f}e6 parameters in float32",
                make,
                getattr(reference, name),
                getattr(rung_kernels, name),
                {"step": Least(0.85, 28.0 * numel)},
                s.tokens,
                s.checked,
                {} if spam else {"fused": fused},
                formula=lambda *arguments, spam=spam: formula(*arguments, spam=spam),
            )
        )
    return found


MAKERS: dict[str, Callable[[Maker], Problem | list[Problem]]] = {
    "rms_norm, add_rms_norm": norms,
    "rope": rope,
    "swiglu": swiglu,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "adamw_step, spam_step": optimizers,
    "attention": attention,
    "merge_lse": merge_lse,
    "router": router,
    "permute, unpermute": permutations,
    "grouped_mm": grouped_mm,
}
WITHOUT_KERNEL = ("attention",)
"""Chooses among the kernels of others."""
OPS = [op for ops in MAKERS for op in ops.split(", ")]


def problems(m: Maker, only: Sequence[str]) -> list[Problem]:
    """Those of these operations, the ones that most of a dense model's time hangs on first."""
    found: list[Problem] = []
    for ops, make in MAKERS.items():
        if not set(ops.split(", ")).isdisjoint(only):
            made = make(m)
            found += [made] if isinstance(made, Problem) else made
    return [problem for problem in found if problem.op in only]
