"""merge_lse as Triton kernels."""

import math

import pytest
import torch
from kernel_cases import merge_lse as cases
from kernel_cases.accuracy import DEVICE, DTYPES, check, randn, strided
from law.workers import Workers
from torch import Tensor

import rung_kernels
from rung_kernels import reference
from rung_kernels.dispatch import use_backend
from rung_kernels.triton_kernels import launch

SHAPES = pytest.mark.parametrize(
    "shape",
    [(2, 5, 3, 16), (7, 12), (1, 3), (2, 65, 8), (2, 2, 3, 2, 8), (1, 2, 40, 300), (0, 3, 8), (2, 3, 0)],
    ids=str,
)


def tensors(*shape: int) -> list[Tensor]:
    """Log-sum-exps between which much lies, where one side all but vanishes."""
    lses = randn(*shape[:-1], seed=2, scale=4.0), randn(*shape[:-1], seed=3, scale=4.0)
    return [randn(*shape), lses[0], randn(*shape, seed=1), lses[1]]


@DTYPES
@SHAPES
def test_merge(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """As the ring calls it: what was merged so far is float32, and so is every log-sum-exp."""
    dtypes = [torch.float32, torch.float32, dtype, torch.float32]
    check(rung_kernels.merge_lse, reference.merge_lse, tensors(*shape), dtypes)


def test_all_of_it_narrow() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        check(rung_kernels.merge_lse, reference.merge_lse, tensors(2, 5, 3, 16), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_queries_that_saw_nothing(dtype: torch.dtype) -> None:
    """Of one set, of the other, of both."""
    out_a, lse_a, out_b, lse_b = tensors(4, 8, 2, 16)
    lse_a[0], lse_b[1], lse_a[2], lse_b[2] = -math.inf, -math.inf, -math.inf, -math.inf
    dtypes = [torch.float32, torch.float32, dtype, torch.float32]
    check(rung_kernels.merge_lse, reference.merge_lse, [out_a, lse_a, out_b, lse_b], dtypes)
    with use_backend("triton"):
        leaves = [t.float().to(DEVICE).requires_grad_() for t in (out_a, lse_a, out_b, lse_b)]
        out, lse = rung_kernels.merge_lse(*leaves)
        assert (out[2] == 0).all() and (lse[2] == -math.inf).all()
        assert torch.equal(out[0], leaves[2][0]) and torch.equal(lse[1], leaves[1][1])
        grads = torch.autograd.grad(out.square().sum() + torch.where(lse.isfinite(), lse, 0).sum(), leaves)
    assert all(g.isfinite().all() and (g[2] == 0).all() for g in grads)


def test_of_two_far_apart_the_larger_counts() -> None:
    out_a, _, out_b, _ = tensors(3, 8)
    for offset in (0.0, 3e4, -3e4):
        lse_a, lse_b = torch.tensor([[200.0, -200.0, 1e-3], [-200.0, 150.0, 1e-3]], dtype=torch.float64) + offset
        check(rung_kernels.merge_lse, reference.merge_lse, [out_a, lse_a, out_b, lse_b], torch.float32)


def test_views_are_read_in_place() -> None:
    """Rows of an accumulator beside a kernel's heads-first results; every second element; expanded gradients."""
    given = tensors(2, 6, 4, 8)
    check(rung_kernels.merge_lse, reference.merge_lse, given, torch.float32, make=strided)

    def ring(op, wide_out, wide_lse, out_BHTE, lse_BHT):
        return op(wide_out[:, 2:8], wide_lse[:, 2:8], out_BHTE.transpose(1, 2), lse_BHT.transpose(1, 2))

    wide = [randn(2, 10, 4, 8), randn(2, 10, 4, seed=1), randn(2, 4, 6, 8, seed=2), randn(2, 4, 6, seed=3)]
    check(
        lambda *t: ring(rung_kernels.merge_lse, *t),
        lambda *t: ring(reference.merge_lse, *t),
        wide,
        [torch.float32, torch.float32, torch.bfloat16, torch.float32],
    )

    def summed(op, *inputs):
        out, lse = op(*inputs)
        return out.sum(-1), lse.sum(-1)

    check(
        lambda *t: summed(rung_kernels.merge_lse, *t),
        lambda *t: summed(reference.merge_lse, *t),
        given,
        torch.float32,
        ulps=8.0,
    )


def test_one_output_that_nobody_reads() -> None:
    for pick in (0, 1):
        check(
            lambda *t: rung_kernels.merge_lse(*t)[pick],  # noqa: B023
            lambda *t: reference.merge_lse(*t)[pick],  # noqa: B023
            tensors(5, 3, 16),
            torch.float32,
        )


def test_inputs_stay_as_they_were() -> None:
    leaves = [t.float().to(DEVICE).requires_grad_() for t in tensors(5, 3, 16)]
    before = [t.detach().clone() for t in leaves]
    with use_backend("triton"):
        outputs = rung_kernels.merge_lse(*leaves)
        outer = [torch.ones_like(o) for o in outputs]
        torch.autograd.grad(outputs, leaves, outer)
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True)) and all((g == 1).all() for g in outer)


def test_float64_and_very_wide_rows_run_the_reference() -> None:
    before = launch.counts.copy()
    with use_backend("triton"):
        rung_kernels.merge_lse(*(t.to(DEVICE) for t in tensors(3, 8)))
        rung_kernels.merge_lse(*(t.float().to(DEVICE) for t in tensors(1, 4097)))
    assert launch.counts == before


def test_shapes_that_do_not_fit() -> None:
    out_a, lse_a, out_b, lse_b = tensors(3, 8)
    with pytest.raises(ValueError, match=r"lse_a \(3,\) and lse_b \(2,\)"):
        rung_kernels.merge_lse(out_a, lse_a, out_b, lse_b[:2])


def test_library_operators() -> None:
    leaves = [t.float().to(DEVICE).requires_grad_() for t in tensors(4, 3, 16)]
    plain = [t.detach() for t in leaves]
    torch.library.opcheck(torch.ops.rung.merge_lse.default, leaves)
    torch.library.opcheck(torch.ops.rung.merge_lse_backward.default, (plain[0] + 1, plain[1] + 1, *plain))


def test_compiled_whole() -> None:
    compiled = torch.compile(rung_kernels.merge_lse, fullgraph=True, backend="aot_eager")
    check(compiled, reference.merge_lse, tensors(4, 3, 16), torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks of the CPU")
def test_dtensors_on_two_ranks(workers: Workers) -> None:
    for differences in workers.run(2, cases.spread_over_two_ranks):
        assert max(differences) < 1e-5
