"""grouped_mm without a kernel of ours: the loop by definition, and how torch's own kernel is called."""

import sys

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import grouped_mm as cases
from law.workers import Workers

import rung_kernels
from rung_kernels import reference
from rung_kernels.dispatch import use_backend
from rung_kernels.reference.grouped_mm import grouped_mm_backward

module = sys.modules["rung_kernels.grouped_mm"]  # the package's attribute is the function
ENDS = [[3, 10, 18, 20], [0, 7, 7, 20], [4, 4, 4, 9], [0, 0, 0, 0]]


def tensors(ends, rows=20, inner=8, columns=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(ends))
    shapes = (rows, inner), (len(ends), inner, columns), (rows, columns)
    x, weights, outer = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x.requires_grad_(), weights.requires_grad_(), torch.tensor(ends), outer


def naive(x, weights, offsets):
    """Every row by itself: its group is the number of offsets that are not beyond it."""
    rows = []
    for row in range(x.shape[0]):
        group = int((offsets <= row).sum())
        rows.append(x[row] @ weights[group] if group < len(weights) else x[row].sum() * weights.sum((0, 1)) * 0)
    return torch.stack(rows)


@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_by_definition(ends):
    x, weights, offsets, outer = tensors(ends)
    y, expected = rung_kernels.grouped_mm(x, weights, offsets), naive(x, weights, offsets)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    grads = torch.autograd.grad(y, (x, weights), outer)
    expected_grads = torch.autograd.grad(expected, (x, weights), outer)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-12)
    explicit = grouped_mm_backward(outer, x.detach(), weights.detach(), offsets)
    torch.testing.assert_close(explicit, expected_grads, rtol=1e-10, atol=1e-12)
    turned = weights.detach().mT.contiguous().mT
    explicit = grouped_mm_backward(outer, x.detach(), turned, offsets)
    torch.testing.assert_close(explicit, expected_grads, rtol=1e-10, atol=1e-12)
    assert explicit[1].stride() == turned.stride()


def test_refusals():
    x, weights, offsets, _ = tensors([2, 20])
    with pytest.raises(ValueError, match=r"must be \[M, D\], \[X, D, F\] and \[X\]"):
        rung_kernels.grouped_mm(x, weights.mT, offsets)
    with pytest.raises(ValueError, match=r"must be \[M, D\], \[X, D, F\] and \[X\]"):
        rung_kernels.grouped_mm(x, weights, offsets[:1])
    with pytest.raises(ValueError, match="must have the same dtype"):
        rung_kernels.grouped_mm(x.float(), weights, offsets)
    with pytest.raises(ValueError, match="int32 or int64"):
        rung_kernels.grouped_mm(x, weights, offsets.double())


def test_compiled_whole_and_in_float64():
    """Lengths that only a run knows do not break the graph: the loop is one operator there."""
    x, weights, offsets, outer = tensors([3, 3, 18])
    y = torch.compile(rung_kernels.grouped_mm, fullgraph=True, backend="aot_eager")(x, weights, offsets)
    expected = reference.grouped_mm(x, weights, offsets)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grads, expected_grads = (torch.autograd.grad(out, (x, weights), outer) for out in (y, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-12, atol=1e-12)


def test_dtensors_on_two_ranks(workers: Workers):
    for differences in workers.run(2, cases.spread_over_two_ranks, "torch"):
        assert max(differences) < 1e-5


@pytest.fixture
def cutlass(monkeypatch):
    """Stands for torch's kernel: takes what that takes, leaves undefined what that leaves, counts its calls."""
    calls = []

    def fake(a, b, *, offs):
        assert offs.dtype == torch.int32
        # torch's own checks of strides, shapes and dtypes.
        F.grouped_mm(a.to("meta"), b.to("meta"), offs=offs.to("meta"))
        for operand in (a, b):
            assert operand.data_ptr() % 16 == 0
        calls.append((tuple(a.shape), tuple(b.shape)))
        bounds = list(zip([0, *offs.tolist()], offs.tolist(), strict=False))
        if b.ndim == 3:
            y = a.new_full((a.shape[0], b.shape[2]), float("nan"))
            for group, (start, end) in enumerate(bounds):
                y[start:end] = a[start:end] @ b[group]
            return y
        products = [a[:, s:e] @ b[s:e] if e > s else a.new_full((a.shape[0], b.shape[1]), 7.0) for s, e in bounds]
        return torch.stack(products)

    monkeypatch.setattr(module, "_cutlass", fake)
    monkeypatch.setattr(module, "grouped_mm_engine", lambda *tensors: "cutlass")
    monkeypatch.setattr(module, "_clears", lambda: False)
    return calls


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("layout", ["plain", "stored transposed", "offset", "x transposed"])
def test_call_of_torchs_kernel(cutlass, ends, layout):
    x, weights, offsets, outer = (t.detach() for t in tensors(ends, dtype=torch.bfloat16))
    if layout == "stored transposed":
        weights = weights.mT.contiguous().mT
    elif layout == "offset":  # starts at an odd address, and rows are no multiple of 16 bytes apart
        x = torch.cat((x, x), 1)[:, 1:9]
        weights = torch.cat((weights, weights), 2)[..., 3:19]
        outer = outer[:1].expand_as(outer)
    elif layout == "x transposed":
        x = torch.randn(8, 20).bfloat16().T
    leaves = x.requires_grad_(), weights.requires_grad_()
    y = rung_kernels.grouped_mm(*leaves, offsets)
    grads = torch.autograd.grad(y, leaves, outer)
    assert len(cutlass) == 3
    expected = reference.grouped_mm(*leaves, offsets)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, outer))
    assert (y[ends[-1] :] == 0).all() and (grads[0][ends[-1] :] == 0).all()
    if layout != "offset":
        assert grads[1].stride() == weights.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("ends", [[100, 100, 300, 515], [0, 513, 520, 600], [0, 0, 0, 0]], ids=str)
def test_on_cuda(backend, dtype, ends):
    """Whatever engine there is, against float64."""
    x, weights, offsets, outer = (t.detach().cuda() for t in tensors(ends, 600, 136, 264, dtype))
    results = []
    for kind in (dtype, torch.float64):
        leaves = x.detach().to(kind).requires_grad_(), weights.detach().to(kind).requires_grad_()
        with use_backend(backend):
            y = rung_kernels.grouped_mm(*leaves, offsets)
            results.append([y, *torch.autograd.grad(y, leaves, outer.to(kind))])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    for ours, exact in zip(*results, strict=True):
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()
    for ours in results[0][:2]:
        assert (ours[ends[-1] :] == 0).all()
    for group, size in enumerate(offsets.diff(prepend=offsets.new_zeros(1)).tolist()):
        assert size or (results[0][2][group] == 0).all()


@pytest.mark.gpu
def test_engine_on_cuda():
    """bfloat16 in rows of 16 bytes is torch's on Hopper and Blackwell; anything else goes group by group."""
    x, weights, offsets, _ = (t.detach().cuda() for t in tensors([3, 20], dtype=torch.bfloat16))
    fast = torch.cuda.get_device_capability()[0] in (9, 10)
    with use_backend("torch"):
        assert module.grouped_mm_engine(x, weights, offsets) == ("cutlass" if fast else "loop")
        assert module.grouped_mm_engine(x.float(), weights.float(), offsets) == "loop"
        assert module.grouped_mm_engine(x[:, :7], weights[:, :7], offsets) == "loop"
