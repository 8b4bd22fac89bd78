"""permute and unpermute as Triton kernels."""

import pytest
import torch
from kernel_cases import permute as cases
from kernel_cases.accuracy import DEVICE, DTYPES, check, randn, strided
from kernel_cases.permute import random_experts
from law.workers import Workers

import rung_kernels
from rung_kernels import reference
from rung_kernels.dispatch import use_backend
from rung_kernels.triton_kernels import launch
from rung_kernels.triton_kernels import permute as kernels

SIZES = pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "num_features"),
    [(17, 2, 4, 16), (9, 3, 130, 5), (5, 1, 1, 33), (3, 16, 7, 1000), (0, 2, 3, 8), (1, 1, 6, 1), (600, 2, 5, 3)],
)


@DTYPES
@SIZES
@pytest.mark.parametrize("elsewhere", [0, 1])
def test_permute(
    num_tokens: int, top_k: int, num_experts: int, num_features: int, elsewhere: int, dtype: torch.dtype
) -> None:
    experts = random_experts(num_tokens, top_k, num_experts=num_experts, elsewhere=elsewhere)
    check(rung_kernels.permute, reference.permute, [randn(num_tokens, num_features)], dtype, experts, num_experts)


@DTYPES
@SIZES
@pytest.mark.parametrize("elsewhere", [0, 1])
def test_unpermute(
    num_tokens: int, top_k: int, num_experts: int, num_features: int, elsewhere: int, dtype: torch.dtype
) -> None:
    experts = random_experts(num_tokens, top_k, num_experts=num_experts, elsewhere=elsewhere)
    row_of = reference.permute(torch.zeros(num_tokens, 1), experts, num_experts)[2].to(DEVICE)
    y, weights = randn(num_tokens * top_k, num_features), randn(num_tokens, top_k, seed=1)
    for of_weights in {dtype, torch.float32}:
        check(
            lambda y, weights: rung_kernels.unpermute(y, row_of, weights),
            lambda y, weights: reference.unpermute(y, row_of, weights),
            [y, weights],
            [dtype, of_weights],
        )
    check(rung_kernels.unpermute, reference.unpermute, [y], dtype, row_of)


def test_all_tokens_to_one_expert() -> None:
    experts = torch.full((300, 2), 3)
    check(rung_kernels.permute, reference.permute, [randn(300, 4)], torch.float32, experts, 5)


def test_no_expert_is_here() -> None:
    experts = torch.full((70, 2), -1)
    check(rung_kernels.permute, reference.permute, [randn(70, 4)], torch.float32, experts, 5)
    with use_backend("triton"):
        y, offsets, row_of = rung_kernels.permute(torch.ones(70, 4, device=DEVICE), experts.to(DEVICE), 5)
        out = rung_kernels.unpermute(y + torch.nan, row_of, torch.ones(70, 2, device=DEVICE))
    assert not y.any() and not offsets.any() and not out.any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_narrow_integers(dtype: torch.dtype) -> None:
    experts = random_experts(21, 3, num_experts=4, elsewhere=1).to(dtype)
    check(rung_kernels.permute, reference.permute, [randn(21, 4)], torch.float32, experts, 4)


@DTYPES
def test_rows_that_are_not_contiguous(dtype: torch.dtype) -> None:
    experts = strided(random_experts(9, 2, num_experts=4, elsewhere=1)).to(DEVICE)
    row_of = strided(reference.permute(torch.zeros(9, 1, device=DEVICE), experts, 4)[2])
    x, y, weights = randn(9, 12), randn(18, 12, seed=1), randn(9, 2, seed=2)
    for make in (strided, lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]]):
        check(rung_kernels.permute, reference.permute, [x], dtype, experts, 4, make=make)
        check(
            lambda y, weights: rung_kernels.unpermute(y, row_of, weights),
            lambda y, weights: reference.unpermute(y, row_of, weights),
            [y, weights],
            dtype,
            make=make,
        )


def test_gradients_that_lie_in_memory_once() -> None:
    experts = random_experts(9, 2, num_experts=4).to(DEVICE)

    def sums(op, x, weights):
        y, _, row_of = op.permute(x, experts, 4)
        return (y.sum() + op.unpermute(y * 2, row_of, weights).sum()).reshape(1)

    tensors = [randn(9, 6), randn(9, 2, seed=1)]
    check(lambda *t: sums(rung_kernels, *t), lambda *t: sums(reference, *t), tensors, torch.float32)


def test_what_lies_in_rows_of_experts_elsewhere_is_never_read() -> None:
    x, weights = (t.float().to(DEVICE).requires_grad_() for t in (randn(30, 4), randn(30, 2, seed=1)))
    with use_backend("triton"):
        y, offsets, row_of = rung_kernels.permute(x, random_experts(30, 2, num_experts=3, elsewhere=1).to(DEVICE), 3)
        there = torch.arange(60, device=DEVICE)[:, None] < offsets[-1]
        assert not there.all()
        out = rung_kernels.unpermute(torch.where(there, y, torch.nan), row_of, weights)
        grads = torch.autograd.grad(out.square().sum(), (x, weights), retain_graph=True)
        grads += torch.autograd.grad(y, x, torch.where(there, y, torch.nan).detach())
    assert all(t.isfinite().all() for t in (out, *grads)) and not grads[1][row_of < 0].any()


def test_more_elements_than_32_bits_count() -> None:
    """Rows beyond 2³¹ elements; memory is handed out where it is touched, which is in a few rows."""
    num_features, top_k = 16384, 2
    num_rows = 2**31 // num_features + 16
    x, weights = randn(2, num_features).half().to(DEVICE), randn(2, top_k, seed=1).half().to(DEVICE)
    y = torch.empty(num_rows, num_features, dtype=torch.float16, device=DEVICE)
    row_of = torch.tensor([[num_rows - 1, 3], [num_rows - 6, -num_rows + 1]], device=DEVICE)
    kernels.copy(x, row_of, None, None, y, None)
    assert torch.equal(y[[num_rows - 1, 3, num_rows - 6]], x[[0, 0, 1]]) and not y[num_rows - 2].any()
    out, grad, sums = torch.empty_like(x), torch.empty_like(y), torch.empty(2, top_k, device=DEVICE)
    kernels.combine(y, row_of, None, out)
    torch.testing.assert_close(out, x * torch.tensor([[2.0], [1.0]], device=DEVICE).half())
    kernels.copy(x, row_of, weights, y, grad, sums)
    torch.testing.assert_close(grad[num_rows - 1], x[0] * weights[0, 0])
    squares = x.float().square().sum(1)
    torch.testing.assert_close(sums, torch.stack((squares, squares * torch.tensor([1.0, 0.0], device=DEVICE)), 1))


def test_what_the_kernel_does_not_take_runs_the_reference() -> None:
    before = launch.counts.copy()
    with use_backend("triton"):
        for x, top_k in [
            (randn(3, 4), 2),
            (torch.zeros(3, 0), 2),
            (torch.zeros(2, kernels.MAX_FEATURES + 1), 1),
            (torch.zeros(2, 4), kernels.MAX_SLOTS + 1),
        ]:
            experts = torch.zeros(len(x), top_k, dtype=torch.int64, device=DEVICE)
            y, _, row_of = rung_kernels.permute(x.to(DEVICE), experts, 1)
            assert rung_kernels.unpermute(y, row_of).shape == x.shape
    assert launch.counts == before


def test_library_operators() -> None:
    x, weights = randn(5, 6).float().to(DEVICE), randn(5, 2, seed=1).float().to(DEVICE)
    experts = random_experts(5, 2, num_experts=3, elsewhere=1).to(DEVICE)
    leaf, leaf_weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    torch.library.opcheck(torch.ops.rung.permute.default, (leaf, experts, 3))
    y, _, row_of = reference.permute(x, experts, 3)
    torch.library.opcheck(torch.ops.rung.permute_backward.default, (y, row_of))
    leaf_y = y.clone().requires_grad_()
    for given in (leaf_weights, None):
        torch.library.opcheck(torch.ops.rung.unpermute.default, (leaf_y, row_of, given))
    torch.library.opcheck(torch.ops.rung.unpermute_backward.default, (x, y, row_of, weights))
    torch.library.opcheck(torch.ops.rung.unpermute_backward.default, (x, None, row_of, None))


def test_a_layer_compiled_whole() -> None:
    def layer(op, x, logits):
        weights, experts, _, scores = op.router(logits, 2)
        y, _, row_of = op.permute(x, experts, 4)
        return op.unpermute(y * y, row_of, weights), scores.sum(0)

    tensors = [randn(7, 6), randn(7, 4, seed=1)]
    compiled = torch.compile(lambda *t: layer(rung_kernels, *t), fullgraph=True, backend="aot_eager")
    check(compiled, lambda *t: layer(reference, *t), tensors, torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks of the CPU")
def test_dtensors_on_two_ranks(workers: Workers) -> None:
    for differences in workers.run(2, cases.spread_over_two_ranks):
        assert max(differences) < 1e-5
