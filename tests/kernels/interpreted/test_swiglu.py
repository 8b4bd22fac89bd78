"""swiglu as a Triton kernel."""

import pytest
import torch
from kernel_cases import swiglu as cases
from kernel_cases.accuracy import DEVICE, DTYPES, check, randn, strided
from law.workers import Workers

import rung_kernels
from rung_kernels import reference
from rung_kernels.dispatch import use_backend
from rung_kernels.triton_kernels import launch

SHAPES = pytest.mark.parametrize(
    "shape",
    [(3, 64), (2, 5, 7, 16), (5, 123), (1, 3), (3, 2049), (7,), (0, 8), (2, 0, 3), (3, 0)],
    ids=str,
)


def _inputs(*shape: int) -> list[torch.Tensor]:
    return [randn(*shape, scale=3.0), randn(*shape, seed=1)]


@DTYPES
@SHAPES
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(rung_kernels.swiglu, reference.swiglu, _inputs(*shape), dtype)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)], ids=str)
def test_other_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(rung_kernels.swiglu, reference.swiglu, _inputs(4, 40), dtypes)


@DTYPES
def test_rows_that_are_not_contiguous(dtype: torch.dtype) -> None:
    check(rung_kernels.swiglu, reference.swiglu, _inputs(3, 4, 40), dtype, make=strided)
    check(rung_kernels.swiglu, reference.swiglu, _inputs(4, 6), dtype, make=lambda t: t.T.contiguous().T)


def _halves(op, both):
    return op(*both.chunk(2, -1))


@DTYPES
@pytest.mark.parametrize("shape", [(2, 3, 2 * 40), (33, 2 * 123), (2, 2 * 2049), (0, 8), (3, 0), (1, 2)], ids=str)
def test_halves_of_one_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(
        lambda both: _halves(rung_kernels.swiglu, both),
        lambda both: _halves(reference.swiglu, both),
        [randn(*shape, scale=3.0)],
        dtype,
    )


def test_halves_are_read_where_they_lie() -> None:
    both = torch.randn(2, 3, 2 * 40, device=DEVICE, requires_grad=True)
    with use_backend("triton"), launch.recording() as launches:
        _halves(rung_kernels.swiglu, both).sum().backward()
    assert len(launches) == 2  # one in each direction
    for arguments in (one.arguments for one in launches):
        assert arguments["gate"].data_ptr() == both.data_ptr() and arguments["gate_stride"] == 80
        assert arguments["up"].data_ptr() == both[..., 40:].data_ptr() and arguments["up_stride"] == 80


def test_a_gradient_that_is_one_number_everywhere() -> None:
    """What ``sum`` hands back: all strides are 0."""
    check(
        lambda *t: rung_kernels.swiglu(*t).sum(0, keepdim=True).sum(1),
        lambda *t: reference.swiglu(*t).sum(0, keepdim=True).sum(1),
        _inputs(4, 40),
        torch.float32,
    )


def test_a_single_number() -> None:
    """A tensor without dims."""
    gate, up = (t[0].float().to(DEVICE).requires_grad_() for t in _inputs(1))
    with use_backend("triton"):
        found = torch.autograd.grad(rung_kernels.swiglu(gate, up), (gate, up))
    expected = torch.autograd.grad(reference.swiglu(gate, up), (gate, up))
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's: exp(200) is inf, as it should be
def test_gates_far_from_zero() -> None:
    gate = torch.tensor([-1e30, -200.0, -89.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 1e30], dtype=torch.float64)
    check(rung_kernels.swiglu, reference.swiglu, [gate, torch.ones_like(gate)], torch.float32)


def test_inputs_and_gradients_may_be_read_again() -> None:
    """As a ladder does: nothing is overwritten."""

    def twice(op, gate, up):
        y = op(gate, up)
        return op(y, gate), y + up

    inputs = _inputs(4, 40)
    check(lambda *t: twice(rung_kernels.swiglu, *t), lambda *t: twice(reference.swiglu, *t), inputs, torch.float32)
    there = [t.float().to(DEVICE).requires_grad_() for t in inputs]
    outer = torch.randn(4, 40, device=DEVICE)
    before = [t.detach().clone() for t in (*there, outer)]
    with use_backend("triton"):
        torch.autograd.grad(rung_kernels.swiglu(*there), there, outer)
    assert all(torch.equal(a, b) for a, b in zip((*there, outer), before, strict=True))


def test_a_gradient_of_one_input() -> None:
    gate, up = _inputs(4, 40)
    up = up.float().to(DEVICE)
    check(lambda g: rung_kernels.swiglu(g, up), lambda g: reference.swiglu(g, up), [gate], torch.float32)


def test_float64_runs_the_reference() -> None:
    before = launch.counts.copy()
    with use_backend("triton"):
        rung_kernels.swiglu(randn(3, 8).to(DEVICE), randn(3, 8).to(DEVICE))
    assert launch.counts == before


def test_library_operators() -> None:
    both = randn(3, 2, 16).float().to(DEVICE)
    leaves = [half.clone().requires_grad_() for half in both.chunk(2, -1)]
    torch.library.opcheck(torch.ops.rung.swiglu.default, tuple(leaves))
    torch.library.opcheck(torch.ops.rung.swiglu.default, tuple(both.chunk(2, -1)))
    torch.library.opcheck(torch.ops.rung.swiglu.default, (both, both.bfloat16()))
    torch.library.opcheck(torch.ops.rung.swiglu_backward.default, (leaves[0].detach(), *both.chunk(2, -1)))


def test_compiled_whole() -> None:
    compiled = torch.compile(lambda both: _halves(rung_kernels.swiglu, both), fullgraph=True, backend="aot_eager")
    check(compiled, lambda both: _halves(reference.swiglu, both), [randn(4, 16)], torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks of the CPU")
def test_dtensors_on_two_ranks(workers: Workers) -> None:
    for differences, launches in workers.run(2, cases.spread_over_two_ranks):
        assert max(differences) < 1e-5
        assert launches > 0
