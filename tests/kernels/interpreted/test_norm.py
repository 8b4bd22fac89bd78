"""rms_norm and add_rms_norm as Triton kernels."""

import pytest
import torch
from kernel_cases import norm as cases
from kernel_cases.accuracy import DEVICE, DTYPES, check, randn, strided
from law.workers import Workers

import rung_kernels
from rung_kernels import reference
from rung_kernels.dispatch import use_backend
from rung_kernels.triton_kernels import launch

SHAPES = pytest.mark.parametrize(
    "shape", [(3, 64), (2, 5, 7, 16), (5, 123), (1, 3), (9, 1000), (0, 8), (2, 0, 3)], ids=str
)


@DTYPES
@SHAPES
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(rung_kernels.rms_norm, reference.rms_norm, [randn(*shape), 1 + randn(shape[-1], seed=1)], dtype, 1e-5)


@DTYPES
@SHAPES
@pytest.mark.parametrize("residual", [None, torch.float32], ids=["same", "float32"])
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, residual: torch.dtype | None) -> None:
    tensors = [randn(*shape), randn(*shape, seed=1), 1 + randn(shape[-1], seed=2)]
    dtypes = [dtype, residual or dtype, dtype]
    check(rung_kernels.add_rms_norm, reference.add_rms_norm, tensors, dtypes, 1e-5)


@DTYPES
def test_rows_that_are_not_contiguous(dtype: torch.dtype) -> None:
    tensors = [randn(4, 6, 40), randn(4, 6, 40, seed=1), randn(40, seed=2)]
    check(rung_kernels.add_rms_norm, reference.add_rms_norm, tensors, dtype, 1e-5, make=strided)
    check(rung_kernels.rms_norm, reference.rms_norm, [tensors[0], tensors[2]], dtype, 1e-5, make=strided)


def test_both_outputs_may_be_read_twice() -> None:
    """As a ladder does: the stream goes on, and its norm and itself are read by several sublayers."""

    def twice(x, residual, weight, op):
        y, stream = op(x, residual, weight, 1e-5)
        z, later = op(y, stream, weight, 1e-5)
        return y * z, stream + later, y + stream

    tensors = [randn(5, 32), randn(5, 32, seed=1), randn(32, seed=2)]
    check(
        lambda *t: twice(*t, rung_kernels.add_rms_norm),
        lambda *t: twice(*t, reference.add_rms_norm),
        tensors,
        torch.float32,
    )


def test_one_output_that_nobody_reads() -> None:
    for pick in (0, 1):
        tensors = [randn(5, 32), randn(5, 32, seed=1), randn(32, seed=2)]
        check(
            lambda *t: rung_kernels.add_rms_norm(*t, 1e-5)[pick],  # noqa: B023
            lambda *t: reference.add_rms_norm(*t, 1e-5)[pick],  # noqa: B023
            tensors,
            torch.float32,
        )


def test_many_rows_per_program_of_the_backward_pass() -> None:
    check(rung_kernels.rms_norm, reference.rms_norm, [randn(301, 24), randn(24, seed=1)], torch.float32, 1e-5)


def test_float64_runs_the_reference() -> None:
    before = launch.counts.copy()
    with use_backend("triton"):
        rung_kernels.rms_norm(randn(3, 8).to(DEVICE), randn(8).to(DEVICE), 1e-5)
    assert launch.counts == before


def test_library_operators() -> None:
    x, residual, weight = (t.float().to(DEVICE) for t in (randn(4, 3, 16), randn(4, 3, 16, seed=1), randn(16, seed=2)))
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
    torch.library.opcheck(torch.ops.rung.rms_norm.default, (leaves[0], leaves[2], 1e-5))
    torch.library.opcheck(torch.ops.rung.add_rms_norm.default, (*leaves, 1e-5))
    rstd = torch.rand(4, 3, device=DEVICE)
    torch.library.opcheck(torch.ops.rung.rms_norm_backward.default, (x, residual, weight, rstd))
    for narrow in (torch.float32, torch.bfloat16):
        arguments = (x, residual, residual, weight, rstd, narrow)
        torch.library.opcheck(torch.ops.rung.add_rms_norm_backward.default, arguments)


def test_compiled_whole() -> None:
    def both(x, residual, weight):
        y, stream = rung_kernels.add_rms_norm(x, residual, weight, 1e-5)
        return rung_kernels.rms_norm(y, weight, 1e-5), stream

    def plain(x, residual, weight):
        y, stream = reference.add_rms_norm(x, residual, weight, 1e-5)
        return reference.rms_norm(y, weight, 1e-5), stream

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    check(compiled, plain, [randn(4, 16), randn(4, 16, seed=1), randn(16, seed=2)], torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks of the CPU")
def test_dtensors_on_two_ranks(workers: Workers) -> None:
    for differences in workers.run(2, cases.spread_over_two_ranks):
        assert max(differences) < 1e-5
