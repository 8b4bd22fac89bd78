"""Blocks of attention against the dense formula: each alone, and joined."""

import itertools

import pytest
import torch

import rung_kernels
from rung_kernels import block_attention
from rung_kernels.block_attention import attention_backward, attention_forward, merge_lse

F64 = {"rtol": 1e-10, "atol": 1e-12}
ENGINES = ["cpu", "formula"]


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    monkeypatch.setattr(block_attention, "_engine", lambda q, mask: request.param)
    return request.param


def inputs(queries: int, keys: int, heads: int = 4, kv_heads: int = 2, dtype=torch.float64, device="cpu", size=8):
    torch.manual_seed(queries * 100 + keys)
    shapes = [(2, queries, heads, size), (2, keys, kv_heads, size), (2, keys, kv_heads, size)]
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


def dense(q, k, v, mask):
    """(out, lse) by the definition, differentiable."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k) / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhts,bshe->bthe", scores.softmax(-1), v), scores.logsumexp(-1).transpose(1, 2)


def dense_grads(q, k, v, mask, grad):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(dense(*leaves, mask)[0], leaves, grad)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("seen", ["causal", "all", "mask"])
def test_one_block(engine, kv_heads, seen):
    q, k, v = inputs(7, 7, kv_heads=kv_heads)
    mask = None
    if seen == "mask":
        mask = (torch.rand(2, 1, 7, 7) < 0.4) | torch.eye(7, dtype=torch.bool)
    said = {"mask": mask, "causal": seen == "causal"}
    out, lse = attention_forward(q, k, v, **said)
    truth = torch.ones(7, 7, dtype=torch.bool).tril() if seen == "causal" else mask
    expected = dense(q, k, v, truth)
    torch.testing.assert_close((out, lse), expected, **F64)
    grad = torch.randn_like(out)
    grads = attention_backward(grad, q, k, v, out, lse, **said)
    torch.testing.assert_close(grads, dense_grads(q, k, v, truth, grad), **F64)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("cuts", [(0, 5, 9), (0, 1, 2, 9), (0, 9, 9), (0, 0, 4, 9)])
def test_joined_blocks_are_dense_attention(engine, cuts):
    """Keys cut anywhere, empty blocks and queries that see nothing of a block among them."""
    q, k, v = inputs(6, 9)
    mask = torch.rand(2, 1, 6, 9) < 0.3
    mask[:, :, :, 8] = True
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    pieces = [slice(start, stop) for start, stop in itertools.pairwise(cuts)]
    for piece in pieces:
        block = attention_forward(q, k[:, piece], v[:, piece], mask[..., piece])
        out, lse = merge_lse(out, lse, *block)
    torch.testing.assert_close((out, lse), dense(q, k, v, mask), **F64)
    grad = torch.randn_like(out)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for piece in pieces:
        block = attention_backward(grad, q, k[:, piece], v[:, piece], out, lse, mask[..., piece])
        dq += block[0]
        dk[:, piece], dv[:, piece] = block[1:]
    torch.testing.assert_close((dq, dk, dv), dense_grads(q, k, v, mask, grad), **F64)


def test_a_query_that_sees_nothing(engine):
    q, k, v = inputs(3, 4)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)[None, None]
    out, lse = attention_forward(q, k, v, mask)
    assert (lse[:, 1] == -torch.inf).all() and (out[:, 1] == 0).all()
    assert lse[:, [0, 2]].isfinite().all()
    dq, dk, dv = attention_backward(torch.ones_like(out), q, k, v, out, lse, mask)
    assert (dq[:, 1] == 0).all() and all(grad.isfinite().all() for grad in (dq, dk, dv))
    others = [0, 2]
    expected = dense_grads(q[:, others], k, v, mask[:, :, others], torch.ones_like(out[:, others]))
    torch.testing.assert_close((dq[:, others], dk, dv), expected, **F64)
    both = merge_lse(out, lse, out, lse)
    assert not any(x.isnan().any() for x in both) and (both[1][:, 1] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_blocks(engine, dtype):
    """Log-sum-exp and merged output are float32, and one block's error is that of dense attention in its dtype."""
    q, k, v = inputs(40, 48, dtype=dtype, size=16)
    mask = torch.rand(2, 1, 40, 48) < 0.5
    mask[:, :, 3] = False
    out, lse = attention_forward(q, k, v, mask)
    merged, _ = merge_lse(out, lse, out, lse)
    assert (out.dtype, lse.dtype, merged.dtype) == (dtype, torch.float32, torch.float32)
    mask[:, :, 3] = True  # the formula's softmax has no answer there
    exact, _ = dense(q.double(), k.double(), v.double(), mask)
    rows = [row for row in range(40) if row != 3]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out[:, rows].double(), exact[:, rows], rtol=tolerance, atol=tolerance)
    assert (out[:, 3] == 0).all() and (lse[:, 3] == -torch.inf).all()


def test_refusals():
    q, k, v = inputs(3, 4)
    with pytest.raises(ValueError, match="not 4 for 3"):
        attention_forward(q, k, v, causal=True)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attention_forward(q, k[:, :, :1].expand(-1, -1, 3, -1), v, causal=True)


def test_merge_is_public():
    assert rung_kernels.merge_lse is merge_lse


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("seen", ["causal", "all", "mask"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [64, 12])
def test_on_cuda(kv_heads, seen, dtype, size):
    """Two joined blocks of whatever kernel fits against float64; 12 features fit none."""
    q, k, v = inputs(70, 70, kv_heads=kv_heads, dtype=dtype, device="cuda", size=size)
    full = torch.ones(1, 1, 70, 70, dtype=torch.bool, device="cuda")
    truth = {"causal": full.tril(), "all": full, "mask": (full & (torch.rand_like(q[:1, :1, :1, :1]) < 2)).tril(-3)}[
        seen
    ]
    if seen == "mask":
        truth = truth | (torch.rand(2, 1, 70, 70, device="cuda") < 0.3)
        truth[..., 0] = True
    # The first block is said in full; the second holds keys that only the mask lets some queries see.
    if seen == "mask":
        blocks = [(slice(0, 33), {"mask": truth[..., :33]}), (slice(33, 70), {"mask": truth[..., 33:]})]
    else:
        blocks = [(slice(0, 70), {"causal": seen == "causal"})]
    parts = [attention_forward(q, k[:, piece], v[:, piece], **said) for piece, said in blocks]
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = merge_lse(out, lse, *part)
    out = out.to(dtype)
    wide = [x.double() for x in (q, k, v)]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 3e-2)
    expected_out, expected_lse = dense(*wide, truth)
    torch.testing.assert_close(out.double(), expected_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(out)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for piece, said in blocks:
        grads = attention_backward(grad, q, k[:, piece], v[:, piece], out, lse, **said)
        dq += grads[0]
        dk[:, piece], dv[:, piece] = grads[1:]
    for ours, theirs in zip((dq, dk, dv), dense_grads(*wide, truth, grad.double()), strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
