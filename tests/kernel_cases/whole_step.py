"""A training step of a small decoder that uses every operation, mixture of experts and all.

Legend: B batch, T tokens, D features, H heads, K key/value heads, E head size, N rows, X experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import rung_kernels
from rung_kernels.reference.optimizer import Factor

BATCH, TOKENS, FEATURES, HEADS, KV_HEADS, HEAD, INNER, EXPERTS, TOP_K, VOCAB = 2, 12, 32, 4, 2, 8, 24, 4, 2, 61


class Step(nn.Module):
    """One layer between an embedding and a head that never makes all logits."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * 0.2)

        self.embedding = weight(VOCAB, FEATURES)
        self.first_norm, self.second_norm, self.last_norm = (nn.Parameter(torch.ones(FEATURES)) for _ in range(3))
        self.qkv = weight((HEADS + 2 * KV_HEADS) * HEAD, FEATURES)
        self.out = weight(FEATURES, HEADS * HEAD)
        self.route = weight(EXPERTS, FEATURES)
        self.gate, self.up = weight(EXPERTS, FEATURES, INNER), weight(EXPERTS, FEATURES, INNER)
        self.down = weight(EXPERTS, INNER, FEATURES)
        self.head = weight(VOCAB, FEATURES)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """The sum of losses: of the fused head, and of logits that are made whole."""
        stream = nn.functional.embedding(tokens_BT, self.embedding)
        attended = self.attention(rung_kernels.rms_norm(stream, self.first_norm, 1e-5))
        normed, stream = rung_kernels.add_rms_norm(attended, stream, self.second_norm, 1e-5)
        stream = stream + self.experts(normed.flatten(0, 1)).view_as(stream)
        x_ND = rung_kernels.rms_norm(stream, self.last_norm, 1e-5).flatten(0, 1)
        labels_N = labels_BT.flatten()
        fused = rung_kernels.linear_cross_entropy(x_ND, self.head, labels_N, reduction="sum")
        return fused + rung_kernels.cross_entropy(x_ND @ self.head.T, labels_N).sum()

    def attention(self, x_BTD: Tensor) -> Tensor:
        sizes = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
        q, k, v = (t.unflatten(-1, (-1, HEAD)) for t in (x_BTD @ self.qkv.T).split(sizes, dim=-1))
        angles = torch.arange(TOKENS, device=x_BTD.device)[:, None] * torch.logspace(0, -2, HEAD // 2).to(x_BTD.device)
        angles = torch.cat((angles, angles), dim=-1)[None]
        q, k = rung_kernels.rope(q, k, angles.cos(), angles.sin())
        whole = rung_kernels.attention(q, k, v)
        return (self.in_two_blocks(q, k, v) + whole).flatten(-2) @ self.out.T

    def in_two_blocks(self, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
        """The same once more: every token sees the first half of the tokens, and is merged with what it sees of all."""
        first, lse = definition(q_BTHE, k_BTKE[:, : TOKENS // 2], v_BTKE[:, : TOKENS // 2])
        second, other = definition(q_BTHE, k_BTKE[:, TOKENS // 2 :], v_BTKE[:, TOKENS // 2 :])
        return rung_kernels.merge_lse(first, lse, second, other)[0].to(q_BTHE.dtype)

    def experts(self, x_ND: Tensor) -> Tensor:
        weights, experts, _, _ = rung_kernels.router(x_ND @ self.route.T, TOP_K)
        rows, ends, row_of = rung_kernels.permute(x_ND, experts, EXPERTS)
        gate = rung_kernels.grouped_mm(rows, self.gate, ends)
        inner = rung_kernels.swiglu(gate, rung_kernels.grouped_mm(rows, self.up, ends))
        return rung_kernels.unpermute(rung_kernels.grouped_mm(inner, self.down, ends), row_of, weights)


def definition(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over some keys, all seen, and its log-sum-exp [B, T, H]."""
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=2) for t in (k_BSKE, v_BSKE))
    scores_BHTS = torch.einsum("bthe,bshe->bhts", q_BTHE, k) / HEAD**0.5
    out = torch.einsum("bhts,bshe->bthe", scores_BHTS.softmax(-1), v)
    return out, scores_BHTS.logsumexp(-1).transpose(1, 2)


def run(dtype: torch.dtype, device: str, update: Callable[..., None]) -> dict[str, Tensor]:
    """Loss, gradients and parameters after one step; the same start for every dtype."""
    model = Step().to(device, dtype)
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(VOCAB, (BATCH, TOKENS), generator=generator)
    labels_BT = tokens_BT.roll(-1, 1)
    labels_BT[:, -1] = -100
    loss = model(tokens_BT.to(device), labels_BT.to(device))
    loss.backward()
    found = {"loss": loss.detach()}
    parameters = dict(model.named_parameters())
    found |= {f"grad {name}": p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    values = [p.detach() for p in parameters.values()]
    states = [[torch.full_like(p, 1e-3) for p in values] for _ in range(2)]
    update(values, [p.grad for p in parameters.values()], *states, factors().to(device))
    return found | {name: p.detach() for name, p in parameters.items()}


def factors() -> Tensor:
    """Of a step of SPAM that clips."""
    slots = torch.zeros(len(Factor), dtype=torch.float64)
    values = {
        Factor.GRAD_SCALE: 1.0,
        Factor.THRESHOLD: 50.0,
        Factor.BETA1: 0.9,
        Factor.COMPLEMENT1: 0.1,
        Factor.BETA2: 0.999,
        Factor.COMPLEMENT2: 0.001,
        Factor.STEP_SIZE: 0.01,
        Factor.DIVISOR: 1.0,
        Factor.EPS: 1e-6,
        Factor.DECAY: 0.999,
    }
    for slot, value in values.items():
        slots[slot] = value
    return slots
