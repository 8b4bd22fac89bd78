"""grouped_mm as Triton kernels."""

import pytest
import torch
from kernel_cases import grouped_mm as cases
from kernel_cases.accuracy import DEVICE, DTYPES, check, randn, strided
from law.workers import Workers

import rung_kernels
from rung_kernels import reference
from rung_kernels.dispatch import use_backend
from rung_kernels.grouped_mm import grouped_mm_engine
from rung_kernels.triton_kernels import grouped_mm as kernels
from rung_kernels.triton_kernels import launch

CASES = {
    "some": (20, 24, 40, [3, 10, 18, 20]),
    "odd sizes": (37, 19, 7, [5, 6, 30, 37]),
    "empty groups": (20, 16, 16, [0, 7, 7, 7, 20, 20]),
    "rows after the last": (50, 16, 33, [4, 4, 31]),
    "no row in a group": (9, 16, 8, [0, 0]),
    "no rows": (0, 16, 8, [0, 0, 0]),
    "no groups": (5, 16, 8, []),
    "no features": (5, 0, 8, [2, 5]),
    "no columns": (5, 8, 0, [2, 5]),
    "one group": (70, 70, 70, [70]),
    "several blocks each way": (150, 130, 300, [130, 150]),
}
SIZES = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@DTYPES
@SIZES
def test_product(case: tuple[int, int, int, list[int]], dtype: torch.dtype) -> None:
    rows, inner, columns, ends = case
    tensors = [randn(rows, inner), randn(len(ends), inner, columns, seed=1)]
    for kind in (torch.int32, torch.int64) if case is CASES["some"] else (torch.int32,):
        offsets = torch.tensor(ends, dtype=kind)
        check(rung_kernels.grouped_mm, reference.grouped_mm, tensors, dtype, offsets)


def test_more_groups_than_are_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_GROUPS", 4)
    monkeypatch.setattr(kernels, "_FOUND", 2)
    for ends in ([*range(9), 12, 18], [0, 5, 5, 20], [1, 1, 1, 1, 1, 1, 1, 20], [9, 20, 20]):
        tensors = [randn(20, 8), randn(len(ends), 8, 8, seed=1)]
        check(rung_kernels.grouped_mm, reference.grouped_mm, tensors, torch.float32, torch.tensor(ends))


def test_float16() -> None:
    tensors = [randn(20, 24), randn(4, 24, 40, seed=1)]
    check(rung_kernels.grouped_mm, reference.grouped_mm, tensors, torch.float16, torch.tensor([3, 10, 18, 20]))


@DTYPES
def test_what_is_not_contiguous_is_read_in_place(dtype: torch.dtype) -> None:
    """Weights stored the other way round, every second element, expanded gradients."""
    offsets = torch.tensor([3, 3, 17])
    tensors = [randn(20, 24), randn(3, 24, 10, seed=1)]
    check(rung_kernels.grouped_mm, reference.grouped_mm, tensors, dtype, offsets, make=strided)
    stored = [tensors[0], tensors[1].mT.contiguous()]
    check(
        lambda x, w: rung_kernels.grouped_mm(x, w.mT, offsets.to(DEVICE)),
        lambda x, w: reference.grouped_mm(x, w.mT, offsets.to(DEVICE)),
        stored,
        dtype,
    )
    check(
        lambda x, w: rung_kernels.grouped_mm(x, w, offsets.to(DEVICE)).sum(1),
        lambda x, w: reference.grouped_mm(x, w, offsets.to(DEVICE)).sum(1),
        tensors,
        dtype,
        ulps=8.0,
    )
    weights = torch.randn(3, 10, 24, device=DEVICE).mT.requires_grad_()
    with use_backend("triton"):
        y = rung_kernels.grouped_mm(torch.randn(20, 24, device=DEVICE), weights, offsets.to(DEVICE))
        (grad,) = torch.autograd.grad(y, weights, torch.ones_like(y))
    assert grad.stride() == weights.stride()  # otherwise its accumulation would copy it


def test_what_no_group_holds_is_exactly_zero_whatever_is_there() -> None:
    """Not 0 times what is there: rows after the last offset may be NaN, and so may neighbours of a group's rows."""
    x, weights = torch.randn(40, 16, device=DEVICE), torch.randn(4, 16, 20, device=DEVICE)
    outer = torch.randn(40, 20, device=DEVICE)
    offsets = torch.tensor([5, 5, 21, 30], device=DEVICE)
    x[30:], outer[30:] = float("nan"), float("inf")
    x[7], outer[9] = float("nan"), float("nan")  # of group 2
    with use_backend("triton"):
        leaves = x.requires_grad_(), weights.requires_grad_()
        y = rung_kernels.grouped_mm(*leaves, offsets)
        grad_x, grad_weights = torch.autograd.grad(y, leaves, outer)
    assert (y[30:] == 0).all() and (grad_x[30:] == 0).all() and (grad_weights[1] == 0).all()
    fine = torch.tensor([row not in (7, 9) for row in range(40)])
    assert y[fine].isfinite().all() and grad_x[fine].isfinite().all() and grad_weights[[0, 1, 3]].isfinite().all()


def test_again_is_the_same_bit_for_bit() -> None:
    x, weights = torch.randn(90, 33, device=DEVICE), torch.randn(3, 33, 17, device=DEVICE)
    offsets = torch.tensor([40, 41, 88], device=DEVICE)

    def run() -> list[torch.Tensor]:
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = rung_kernels.grouped_mm(*leaves, offsets)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    with use_backend("triton"):
        first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_offsets_beyond_the_rows_touch_no_memory_that_is_not_theirs() -> None:
    """Such offsets are a mistake of the caller; the rows that exist still belong to somebody."""
    x, weights = torch.randn(10, 16, device=DEVICE), torch.randn(3, 16, 16, device=DEVICE)
    with use_backend("triton"):
        y = rung_kernels.grouped_mm(x, weights, torch.tensor([4, 12, 99], device=DEVICE))
    torch.testing.assert_close(y, reference.grouped_mm(x, weights, torch.tensor([4, 10, 10])), rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits() -> None:
    """Rows far apart and experts far apart; only the pages that are touched take memory."""
    far = torch.empty(2**31 + 2**26, dtype=torch.bfloat16, device=DEVICE)
    x, weights = far.as_strided((140, 16), (2**24 - 2**20, 1)), far.as_strided((3, 16, 16), (2**30, 16, 1), 64)
    whole_x, whole_weights = torch.randn(140, 16).to(x), torch.randn(3, 16, 16).to(x)
    x.copy_(whole_x), weights.copy_(whole_weights)
    offsets, outer = torch.tensor([3, 5, 140], device=DEVICE), torch.randn(140, 16).to(x)

    def run(x: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
        y = rung_kernels.grouped_mm(x, weights, offsets)
        return [y, *torch.autograd.grad(y, (x, weights), outer)]

    with use_backend("triton"):
        ours = run(x.requires_grad_(), weights.requires_grad_())
        expected = run(whole_x.requires_grad_(), whole_weights.requires_grad_())
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_rows_too_far_apart_for_a_block_are_copied() -> None:
    """A block's own offsets are 32-bit numbers."""
    x = torch.empty_strided((20, 16), (2**23, 1), device="meta")
    y, offsets = torch.empty(20, 8, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    with launch.recording() as launches:
        kernels.forward(x, torch.empty(3, 16, 8, device="meta"), offsets, y)
        kernels.forward(x[:, :8], torch.empty(3, 8, 8, device="meta"), offsets, y)
        kernels.weights_backward(x, y, offsets, torch.empty(3, 16, 8, device="meta"))
    assert [entry.arguments["x_rows"] for entry in launches if "x_rows" in entry.arguments] == [16, 8, 16]


def test_clearing() -> None:
    """What torch's own kernel leaves undefined: rows after the last offset, gradients of empty groups."""
    for ends, rows in (([2, 2, 5], 11), ([0, 0, 0], 5), ([1, 3, 5], 5)):
        offsets = torch.tensor(ends, device=DEVICE)
        y = torch.full((rows, 1030), 7.0, device=DEVICE)
        kernels.clear_rows(y, offsets)
        assert (y[: ends[-1]] == 7).all() and (y[ends[-1] :] == 0).all()
        grads = torch.full((3, 25, 400), 7.0, device=DEVICE)
        kernels.clear_weights(grads, offsets, rows)
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        assert [float(g.unique()) for g in grads] == [7.0 if size else 0.0 for size in sizes]


def test_float64_runs_the_reference() -> None:
    before = launch.counts.copy()
    x, weights = randn(9, 8).to(DEVICE), randn(2, 8, 8).to(DEVICE)
    with use_backend("triton"):
        rung_kernels.grouped_mm(x, weights, torch.tensor([4, 9], device=DEVICE))
        assert grouped_mm_engine(x.float(), weights.float(), torch.tensor([4, 9])) == "triton"
    assert launch.counts == before


def test_library_operators() -> None:
    x, weights = randn(9, 8).float().to(DEVICE), randn(3, 8, 6, seed=1).float().to(DEVICE)
    offsets, outer = torch.tensor([4, 4, 7], device=DEVICE), torch.randn(9, 6, device=DEVICE)
    leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
    torch.library.opcheck(torch.ops.rung.grouped_mm.default, (*leaves, offsets))
    for laid in (weights, weights.mT.contiguous().mT):
        torch.library.opcheck(torch.ops.rung.grouped_mm_backward.default, (outer, x, laid, offsets))


def test_compiled_whole() -> None:
    compiled = torch.compile(rung_kernels.grouped_mm, fullgraph=True, backend="aot_eager")
    tensors = [randn(9, 8), randn(3, 8, 6, seed=1)]
    check(compiled, reference.grouped_mm, tensors, torch.float32, torch.tensor([4, 4, 7]))


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks of the CPU")
def test_dtensors_on_two_ranks(workers: Workers) -> None:
    for differences in workers.run(2, cases.spread_over_two_ranks, "triton"):
        assert max(differences) < 1e-5
