"""The front of attention: what it computes by every engine, which it chooses, and how it calls those that are not here.

Engines that need CUDA are stood in for by functions that check how they are called and compute by definition; run with
-m gpu, the real ones are held against the definition.
"""

import itertools
import math
import sys
import types

import pytest
import torch
from kernel_cases import attention as cases
from law.workers import Workers

import rung_kernels
from rung_kernels import attention_engine

module = sys.modules["rung_kernels.attention"]  # the package's attribute is the function
F64 = {"rtol": 1e-10, "atol": 1e-12}
IDS = torch.tensor([[7, 7, 7, 2, 2, 2, 2, 7, 7], [5, 5, 5, 5, 5, 5, 5, 5, 5]])
ASKED = {
    "causal": {},
    "all": {"causal": False},
    "mask": {"mask": torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(3)) < 0.5},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window that hides nothing": {"window": 9},
    "documents": {"document_ids_BT": IDS, "max_documents": 4},
    "documents without a bound": {"document_ids_BT": IDS},
    "documents seen whole": {"document_ids_BT": IDS, "max_documents": 3, "causal": False},
    "documents and window": {"document_ids_BT": IDS, "max_documents": 3, "window": 2},
}
ASKED["mask"]["mask"] |= torch.eye(9, dtype=torch.bool)
EACH = pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)


def inputs(kv_heads=2, dtype=torch.float64, device="cpu", size=8, batch=2, tokens=9):
    generator = torch.Generator().manual_seed(kv_heads)
    shapes = [(batch, tokens, heads, size) for heads in (4, kv_heads, kv_heads)]
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def naive(q, k, v, mask=None, causal=True, window=None, document_ids_BT=None, max_documents=None):
    """Query by query, in float64 -> (out, lse)."""
    batch, tokens, heads, size = q.shape
    outs, lses = [], []
    for b, t, h in itertools.product(range(batch), range(tokens), range(heads)):
        seen = range(tokens) if not causal or mask is not None else range(t + 1)
        if window is not None:
            seen = range(max(0, t - window + 1), t + 1)
        if mask is not None:
            seen = [s for s in seen if mask.expand(batch, 1, tokens, tokens)[b, 0, t, s]]
        if document_ids_BT is not None:
            ids = document_ids_BT[b].tolist()
            seen = [s for s in seen if len(set(ids[min(s, t) : max(s, t) + 1])) == 1]
        group = h // (heads // k.shape[2])
        scores = k[b, list(seen), group] @ q[b, t, h] / math.sqrt(size)
        outs.append(scores.softmax(0) @ v[b, list(seen), group])
        lses.append(scores.logsumexp(0))
    return torch.stack(outs).view(q.shape), torch.stack(lses).view(q.shape[:3])


def assert_right(found, q, k, v, asked, **tolerance):
    """Output, log-sum-exp if it is there, and gradients of q, k and v."""
    found = found if isinstance(found, tuple) else (found,)
    expected = naive(q, k, v, **asked)[: len(found)]
    torch.testing.assert_close(found, expected, **tolerance)
    assert len(found) == 1 or not found[1].requires_grad
    outer = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(8))
    grads, expected_grads = (torch.autograd.grad(outs[0], (q, k, v), outer) for outs in (found, expected))
    torch.testing.assert_close(grads, expected_grads, **tolerance)


@EACH
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("engine", ["auto", "sdpa", "masked", "blocks", "definition"])
def test_engines_of_the_cpu(engine, kv_heads, asked):
    q, k, v = inputs(kv_heads)
    for lse in (False, True):
        if lse and engine in ("sdpa", "masked"):
            continue
        try:
            found = rung_kernels.attention(q, k, v, **asked, return_lse=lse, engine=engine)
        except ValueError as error:
            assert engine == "sdpa" and "only as a mask" in str(error)
            assert asked.keys() & {"window", "mask", "document_ids_BT"} and asked.get("window") != 9
            continue
        assert_right(found, q, k, v, asked, **F64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["auto", "masked", "blocks", "definition"])
def test_narrow(engine, dtype):
    """Results in q's dtype, the log-sum-exp in float32; errors are those of the dtype."""
    q, k, v = inputs(dtype=dtype)
    options = {"window": 3, "engine": engine, "return_lse": engine != "masked"}
    found = rung_kernels.attention(q, k, v, **options)
    out, lse = found if options["return_lse"] else (found, None)
    exact = naive(*(x.detach().double() for x in (q, k, v)), window=3)
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype and (out.double() - exact[0]).abs().max() < 8 * eps
    assert lse is None or (lse.dtype == torch.float32 and (lse.double() - exact[1]).abs().max() < 8 * eps)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert [g.dtype for g in grads] == [dtype] * 3


def test_more_keys_than_queries():
    """Only a mask, or seeing all, says which keys a query sees then."""
    q, _, _ = inputs()
    _, k, v = inputs(tokens=12)
    for engine in ("sdpa", "masked", "blocks", "definition"):
        out = rung_kernels.attention(q, k, v, causal=False, engine=engine)
        keys, values = (x.repeat_interleave(2, dim=2) for x in (k, v))
        weights = (torch.einsum("bthe,bshe->bhts", q, keys) / math.sqrt(8)).softmax(-1)
        torch.testing.assert_close(out, torch.einsum("bhts,bshe->bthe", weights, values), **F64)
    with pytest.raises(ValueError, match="engine='blocks': causal needs as many keys as queries, not 12 for 9"):
        rung_kernels.attention(q, k, v, engine="blocks")


def test_empty():
    q, k, v = inputs(tokens=0)
    for asked in ({}, {"window": 2}, {"return_lse": True}):
        found = rung_kernels.attention(q, k, v, **asked)
        assert (found[0] if isinstance(found, tuple) else found).shape == q.shape
    q, k, v = inputs(batch=0)
    assert rung_kernels.attention(q, k, v, document_ids_BT=torch.zeros(0, 9)).shape == q.shape


@pytest.mark.parametrize("asked", [{}, {"window": 3}, {"document_ids_BT": IDS}], ids=["causal", "window", "documents"])
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_whole(asked, lse, dtype):
    q, k, v = inputs(dtype=dtype)
    torch._dynamo.reset()  # compilations of one function are counted
    compiled = torch.compile(rung_kernels.attention, fullgraph=True, backend="aot_eager")
    found = compiled(q, k, v, **asked, return_lse=lse)
    tolerance = F64 if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    assert_right(found, q, k, v, asked, **tolerance)


def test_library_operators():
    q, k, v = inputs(dtype=torch.float32)
    mask = ASKED["mask"]["mask"]
    torch.library.opcheck(torch.ops.rung.attention_with_lse.default, (q, k, v, mask, False))
    torch.library.opcheck(torch.ops.rung.attention_with_lse.default, (q, k, v, None, True))
    plain = [x.detach() for x in (q, k, v)]
    out, lse = torch.ops.rung.attention_with_lse(*plain, None, True)
    arguments = (torch.randn_like(out), *plain, out, lse, None, True)
    torch.library.opcheck(torch.ops.rung.attention_with_lse_backward.default, arguments)


@pytest.mark.parametrize("lse", [False, True])
def test_dtensors_on_two_ranks(workers: Workers, lse):
    for differences in workers.run(2, cases.spread_over_two_ranks, lse):
        assert max(differences) < 1e-5


# --- what is chosen and refused


def test_what_the_cpu_runs():
    q, k, v = inputs(dtype=torch.float32)
    assert attention_engine(q, k, v) == attention_engine(q, k, v, causal=False) == "sdpa"
    assert attention_engine(q, k, v, window=9) == "sdpa" and attention_engine(q, k, v, window=8) == "masked"
    assert attention_engine(q, k, v, document_ids_BT=IDS, max_documents=2) == "masked"
    assert attention_engine(q, k, v, return_lse=True) == "blocks"


def test_refusals():
    q, k, v = inputs()
    attention = rung_kernels.attention
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attention(q, k[:, :, :1].expand(-1, -1, 3, -1), v[:, :, :1].expand(-1, -1, 3, -1))
    with pytest.raises(ValueError, match="a mask replaces window and document_ids_BT"):
        attention(q, k, v, torch.ones(9, 9, dtype=torch.bool), window=3)
    for window, causal in ((0, True), (3, False)):
        with pytest.raises(ValueError, match=f"window={window} must be at least 1, and needs causal=True"):
            attention(q, k, v, causal=causal, window=window)
    with pytest.raises(ValueError, match="as many keys as queries, not 5 for 9; use a mask"):
        attention(q, k[:, :5], v[:, :5], window=3)
    with pytest.raises(ValueError, match=r"document_ids_BT is \(2, 8\), and must be \(2, 9\)"):
        attention(q, k, v, document_ids_BT=IDS[:, :8])
    with pytest.raises(ValueError, match="max_documents=3 must be at least 1, and needs document_ids_BT"):
        attention(q, k, v, max_documents=3)
    with pytest.raises(ValueError, match="engine='fast' is none of auto, sdpa"):
        attention(q, k, v, engine="fast")
    with pytest.raises(ValueError, match="engine='flash_attn': it runs on CUDA, not on cpu"):
        attention(q, k, v, engine="flash_attn")
    with pytest.raises(ValueError, match="engine='masked': the log-sum-exp stays inside"):
        attention(q, k, v, engine="masked", return_lse=True)


# --- engines that are not here


@pytest.fixture
def gpu(monkeypatch):
    """Both packages of flash kernels, which take any device and compute by definition; calls are recorded."""
    calls = []

    def one(q, k, v, causal, window):
        """[B, T, H, E], windows as (left, right), -1 for any number."""
        distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
        seen = torch.ones_like(distance, dtype=torch.bool) if not causal else distance >= 0
        left, right = window
        seen = seen & ((distance <= left) | (left < 0)) & ((-distance <= right) | (right < 0))
        return module.attention_by_definition(q, k, v, seen, False)

    def packed(q, k, v, ends_q, ends_k, max_q, max_k, causal, window):
        """[tokens, H, E] -> the same, and the log-sum-exp with heads first."""
        assert ends_q.dtype == ends_k.dtype == torch.int32 and ends_q[-1] == q.shape[0] and ends_k[-1] == k.shape[0]
        outs, lses = [], []
        bounds = zip(*([*itertools.pairwise(ends.tolist())] for ends in (ends_q, ends_k)), strict=True)
        for (a, b), (c, d) in bounds:
            assert 0 <= b - a <= max_q and 0 <= d - c <= max_k
            out, lse = one(q[None, a:b], k[None, c:d], v[None, c:d], causal, window)
            outs.append(out[0]), lses.append(lse[0].T)
        return torch.cat(outs), torch.cat(lses, dim=1)

    def flash_attn_func(q, k, v, *, causal, window_size, deterministic, return_attn_probs):
        calls.append(("flash_attn_func", causal, window_size))
        out, lse = one(q, k, v, causal, window_size)
        return (out, lse.transpose(1, 2), None) if return_attn_probs else out

    def flash_attn_varlen_func(
        q, k, v, ends_q, ends_k, max_q, max_k, *, causal, window_size, deterministic, return_attn_probs
    ):
        calls.append(("flash_attn_varlen_func", causal, window_size, ends_q.tolist()))
        out, lse = packed(q, k, v, ends_q, ends_k, max_q, max_k, causal, window_size)
        return (out, lse, None) if return_attn_probs else out

    def varlen_attn(q, k, v, ends_q, ends_k, max_q, max_k, *, return_aux=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa == (q.shape[1] != k.shape[1])
        calls.append(("varlen_attn", window_size, ends_q.tolist()))
        out, lse = packed(q, k, v, ends_q, ends_k, max_q, max_k, False, window_size)
        return (out, lse) if return_aux is not None and return_aux.lse else out

    package = types.ModuleType("flash_attn")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(module, "_HAS_FLASH_ATTN", True)
    monkeypatch.setattr(module, "_why_not_flash", lambda q: "")
    return calls


@EACH
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("engine", ["flash_attn", "varlen"])
def test_calls_of_flash_kernels(gpu, engine, kv_heads, asked):
    q, k, v = inputs(kv_heads)
    for lse in (False, True):
        if "mask" in asked or ("document_ids_BT" in asked and "max_documents" not in asked):
            with pytest.raises(ValueError, match=f"engine='{engine}': (it takes no mask|documents need max_documents)"):
                rung_kernels.attention(q, k, v, **asked, return_lse=lse, engine=engine)
            continue
        found = rung_kernels.attention(q, k, v, **asked, return_lse=lse, engine=engine)
        assert_right(found, q, k, v, asked, **F64)
    assert len(gpu) == (0 if "mask" in asked or asked.keys() == {"document_ids_BT"} else 2)


def test_what_is_passed_on(gpu):
    q, k, v = inputs()
    rung_kernels.attention(q, k, v, window=3)
    rung_kernels.attention(q, k, v, document_ids_BT=IDS, max_documents=4)
    rung_kernels.attention(q, k, v, window=3, engine="varlen")
    rung_kernels.attention(q, k, v, engine="varlen")
    rung_kernels.attention(q, k, v, causal=False, engine="varlen")
    ends = [0, 3, 7, 9, 18, 18, 18, 18, 18]  # four documents of eight that there might be
    assert gpu == [
        ("flash_attn_func", True, (2, 0)),
        ("flash_attn_varlen_func", True, (-1, -1), ends),
        ("varlen_attn", (2, 0), [0, 9, 18]),
        ("varlen_attn", (-1, 0), [0, 9, 18]),
        ("varlen_attn", (-1, -1), [0, 9, 18]),
    ]


def test_more_documents_than_was_said_stop_the_program(gpu):
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match="a row has more than max_documents=2 documents"):
        rung_kernels.attention(q, k, v, document_ids_BT=IDS, max_documents=2)


def test_order_on_a_gpu(gpu, monkeypatch):
    q, k, v = inputs()
    packed = {"document_ids_BT": IDS, "max_documents": 4}
    assert attention_engine(q, k, v) == "sdpa"
    for asked in ({"window": 3}, packed, {"return_lse": True}, packed | {"window": 2}):
        assert attention_engine(q, k, v, **asked) == "flash_attn"
    assert attention_engine(q, k, v, document_ids_BT=IDS) == "masked"
    assert attention_engine(q, k, v, **ASKED["mask"]) == "masked"
    assert attention_engine(q, k, v, **ASKED["mask"], return_lse=True) == "blocks"
    assert attention_engine(*inputs(size=12), window=3) == "masked"
    assert attention_engine(*inputs(size=264), window=3) == "masked"
    monkeypatch.setattr(module, "_HAS_FLASH_ATTN", False)
    assert attention_engine(q, k, v, window=3) == "varlen"
    monkeypatch.setattr(module, "_varlen_groups_heads", lambda: False)  # as torch 2.11
    assert attention_engine(q, k, v, window=3) == "masked"
    assert attention_engine(*inputs(4), window=3) == "varlen"
    monkeypatch.setattr(module, "_HAS_VARLEN", False)
    assert attention_engine(*inputs(4), window=3) == "masked"


@pytest.mark.gpu
@EACH
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("engine", module.ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_cuda(engine, kv_heads, dtype, asked):
    """Every engine that does not refuse, against float64."""
    q, k, v = inputs(kv_heads, dtype, "cuda", size=64)
    wide = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    placed = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in asked.items()}
    expected = naive(*wide, **asked)
    outer = torch.randn(q.shape, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected[0], wide, outer)
    for lse in (False, True):
        try:
            found = rung_kernels.attention(q, k, v, **placed, return_lse=lse, engine=engine)
        except ValueError as error:
            assert str(error).startswith(f"engine={engine!r}")
            continue
        found = found if lse else (found,)
        grads = torch.autograd.grad(found[0], (q, k, v), outer.to("cuda", dtype))
        for ours, exact in zip((*found, *grads), (*expected[: len(found)], *expected_grads), strict=True):
            assert (ours.cpu().double() - exact).norm() <= 2e-2 * exact.norm()
