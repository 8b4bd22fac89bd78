"""The references against naive formulas, forward and every gradient, in float64."""

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes

import rung_kernels
from rung_kernels import reference
from rung_kernels.reference import rows


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(ours, naive, inputs) -> None:
    """Outputs and the gradients of all inputs, under one random outer gradient."""
    ours, naive = (out if isinstance(out, tuple) else (out,) for out in (ours, naive))
    outer = [torch.randn_like(out) for out in ours]
    ours_grads, naive_grads = (torch.autograd.grad(outs, inputs, outer) for outs in (ours, naive))
    for a, b in zip((*ours, *ours_grads), (*naive, *naive_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_rms_norm():
    x, weight = randn(2, 5, 12), randn(12)
    naive = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    assert_same(rung_kernels.rms_norm(x, weight, 1e-3), naive, (x, weight))


def test_rms_norm_rounds_once():
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(32).bfloat16()
    exact = reference.rms_norm(x.float(), weight.float(), 1e-6)
    assert torch.equal(reference.rms_norm(x, weight, 1e-6), exact.bfloat16())


def test_rope_turns_pairs_of_features():
    q, k, angles = randn(2, 5, 4, 6), randn(2, 5, 2, 6), torch.randn(2, 5, 3, dtype=torch.float64)
    tables = torch.cat((angles, angles), -1)

    def naive(x: torch.Tensor) -> torch.Tensor:
        turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
        return torch.cat((turned.real, turned.imag), -1)

    assert_same(rung_kernels.rope(q, k, tables.cos(), tables.sin()), (naive(q), naive(k)), (q, k))
    narrow = rung_kernels.rope(q.bfloat16(), k.bfloat16(), tables.cos().float(), tables.sin().float())
    assert {out.dtype for out in narrow} == {torch.bfloat16}


def test_swiglu():
    gate, up = randn(3, 7), randn(3, 7)
    assert_same(rung_kernels.swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up, (gate, up))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("seen", ["before", "all", "mask"])
def test_attention(kv_heads, seen):
    q, k, v = randn(2, 6, 4, 8), randn(2, 6, kv_heads, 8), randn(2, 6, kv_heads, 8)
    mask = torch.ones(6, 6, dtype=torch.bool)
    if seen == "mask":
        mask = (torch.rand(2, 1, 6, 6) < 0.5) | torch.eye(6, dtype=torch.bool)
        ours = rung_kernels.attention(q, k, v, mask=mask)
    else:
        mask = mask.tril() if seen == "before" else mask
        ours = rung_kernels.attention(q, k, v, causal=seen == "before")
    k_all, v_all = (x.repeat_interleave(4 // kv_heads, dim=2) for x in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k_all) / 8**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    assert_same(ours, torch.einsum("bhts,bshe->bthe", weights, v_all), (q, k, v))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setitem(rows.CHUNK_ELEMENTS, "cpu", 4 * 64)  # four rows of the tests' vocabulary


@pytest.mark.parametrize("num_rows", [1, 4, 11])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.usefixtures("small_chunks")
def test_cross_entropy(num_rows, ignore_index):
    logits, labels = randn(num_rows, 64), torch.randint(64, (num_rows,))
    labels[num_rows // 2] = ignore_index
    losses = rung_kernels.cross_entropy(logits * 30, labels, ignore_index)
    assert losses.shape == (num_rows,) and losses[num_rows // 2] == 0
    naive = F.cross_entropy(logits * 30, labels, reduction="none", ignore_index=ignore_index)
    assert_same(losses, naive, (logits,))


@pytest.mark.usefixtures("small_chunks")
def test_cross_entropy_of_narrow_logits_is_computed_in_float32():
    logits, labels = torch.randn(10, 64).bfloat16().requires_grad_(), torch.randint(64, (10,))
    exact = logits.detach().float().requires_grad_()
    losses, exact_losses = rung_kernels.cross_entropy(logits, labels), F.cross_entropy(exact, labels, reduction="none")
    outer = torch.rand(10)
    (grad,), (exact_grad,) = torch.autograd.grad(losses, logits, outer), torch.autograd.grad(exact_losses, exact, outer)
    assert losses.dtype == torch.float32 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(losses, exact_losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, exact_grad.bfloat16(), rtol=1e-2, atol=1e-6)  # an ulp at the rounding boundary


def test_cross_entropy_never_holds_the_logits_in_float32(monkeypatch):
    num_rows, vocab_size, chunk_rows = 256, 512, 4
    monkeypatch.setitem(rows.CHUNK_ELEMENTS, "cpu", chunk_rows * vocab_size)
    logits = torch.randn(num_rows, vocab_size).bfloat16().requires_grad_()
    labels = torch.randint(vocab_size, (num_rows,))
    with LiveBytes() as live:
        rung_kernels.cross_entropy(logits, labels).sum().backward()
    chunk, per_row = 4 * chunk_rows * vocab_size, 4 * num_rows
    assert chunk <= live.peak[torch.float32] <= 3 * chunk + 6 * per_row  # all of them would be 64 chunks
    assert live.peak[torch.bfloat16] <= 2 * (2 * num_rows * vocab_size)  # logits, by slices, and gradient
