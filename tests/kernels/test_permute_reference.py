"""permute and unpermute against loops, in float64 with every gradient."""

import pytest
import torch
from torch import Tensor

import rung_kernels


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def choose(num_tokens: int, top_k: int, num_experts: int, low: int = 0) -> Tensor:
    """Random experts, some of them elsewhere where low < 0."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(low, num_experts - low, (num_tokens, top_k), generator=generator)


def naive(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, list[int], list[list[int]]]:
    rows, ends, row_of = [], [], [[-1] * experts.shape[1] for _ in range(experts.shape[0])]
    slots = [(n, k) for n in range(experts.shape[0]) for k in range(experts.shape[1])]
    for expert in range(num_experts):
        for n, k in slots:
            if experts[n, k] == expert:
                row_of[n][k] = len(rows)
                rows.append(x[n])
        ends.append(len(rows))
    for n, k in slots:
        if not 0 <= experts[n, k] < num_experts:
            row_of[n][k] = -1 - len(rows)
            rows.append(torch.zeros_like(x[n]))
    return torch.stack(rows), ends, row_of


@pytest.mark.parametrize("low", [0, -1], ids=["all", "some elsewhere"])
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(9, 3, 5), (6, 1, 4), (5, 2, 1), (3, 2, 12)])
def test_permute(num_tokens: int, top_k: int, num_experts: int, low: int) -> None:
    x, experts = randn(num_tokens, 6).requires_grad_(), choose(num_tokens, top_k, num_experts, low)
    y, offsets, row_of = rung_kernels.permute(x, experts, num_experts)
    expected, ends, rows = naive(x, experts, num_experts)
    assert offsets.dtype == torch.int32 and row_of.dtype == torch.int64
    assert torch.equal(y, expected) and offsets.tolist() == ends and row_of.tolist() == rows
    outer = randn(*y.shape, seed=2)
    found, naively = (torch.autograd.grad(out, x, outer)[0] for out in (y, expected))
    torch.testing.assert_close(found, naively, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("low", [0, -1], ids=["all", "some elsewhere"])
@pytest.mark.parametrize("weighted", [True, False])
def test_unpermute(weighted: bool, low: int) -> None:
    experts = choose(7, 3, 4, low)
    _, offsets, row_of = rung_kernels.permute(randn(7, 5), experts, 4)
    y, weights = randn(21, 5).requires_grad_(), randn(7, 3, seed=1).requires_grad_()
    out = rung_kernels.unpermute(y, row_of, weights if weighted else None)
    expected = torch.stack(
        [
            sum(
                ((weights[n, k] if weighted else 1) * y[row_of[n, k]] for k in range(3) if row_of[n, k] >= 0),
                torch.zeros(5, dtype=torch.float64),
            )
            for n in range(7)
        ]
    )
    outer, inputs = randn(7, 5, seed=2), (y, weights) if weighted else (y,)
    grads = [torch.autograd.grad(o, inputs, outer) for o in (out, expected)]
    for found, naively in zip((out, *grads[0]), (expected, *grads[1]), strict=True):
        torch.testing.assert_close(found, naively, rtol=1e-12, atol=1e-14)
    assert not grads[0][0][offsets[-1] :].any()


def test_what_lies_in_rows_of_experts_elsewhere_is_never_read() -> None:
    x, weights, experts = randn(6, 4).requires_grad_(), randn(6, 2).requires_grad_(), choose(6, 2, 3, -1)
    y, offsets, row_of = rung_kernels.permute(x, experts, 3)
    assert offsets[-1] < 12
    spoilt = torch.where(torch.arange(12)[:, None] < offsets[-1], y, torch.nan)
    out = rung_kernels.unpermute(spoilt, row_of, weights)
    grads = torch.autograd.grad(out.square().sum(), (x, weights), retain_graph=True)
    assert all(t.isfinite().all() for t in (out, *grads)) and not grads[1][row_of < 0].any()
    there = torch.where(spoilt.isnan(), torch.nan, 1.0)
    assert torch.autograd.grad(y, x, there)[0].isfinite().all()


def test_there_and_back() -> None:
    x, experts = randn(8, 4), choose(8, 4, 5)
    weights = randn(8, 4, seed=1).softmax(-1)
    y, _, row_of = rung_kernels.permute(x, experts, 5)
    torch.testing.assert_close(rung_kernels.unpermute(y, row_of, weights), x, rtol=1e-12, atol=0)


def test_parts_of_the_experts_add_up() -> None:
    """Ranks that each hold some experts see the same rows as one that holds all, and their outputs add up to its."""
    x, experts, weights = randn(8, 4), choose(8, 3, 6), randn(8, 3, seed=1)
    whole, offsets, row_of = rung_kernels.permute(x, experts, 6)
    expected = rung_kernels.unpermute(whole.sin(), row_of, weights)
    found = torch.zeros_like(expected)
    for first in (0, 2, 4):
        y, ends, rows = rung_kernels.permute(x, experts - first, 2)
        begin = offsets[first - 1] if first else 0
        assert torch.equal(y[: ends[-1]], whole[begin : begin + ends[-1]])
        found += rung_kernels.unpermute(y.sin(), rows, weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_sums_are_rounded_once() -> None:
    x, experts = torch.ones(4, 3).bfloat16().requires_grad_(), torch.zeros(4, 6, dtype=torch.int64)
    y, _, row_of = rung_kernels.permute(x, experts, 1)
    grads = torch.tensor([1.0, 2**-8, 2**-8, 2**-8, 2**-8, 2**-8]).repeat(4)[:, None].expand(24, 3).bfloat16()
    (grad,) = torch.autograd.grad(y, x, grads)  # one by one in bfloat16, the small ones would be lost
    assert torch.equal(grad, torch.full((4, 3), 1 + 5 * 2**-8).bfloat16())
    assert torch.equal(rung_kernels.unpermute(grads, row_of), grad)


def test_no_tokens() -> None:
    x, experts = torch.zeros(0, 4).requires_grad_(), torch.zeros(0, 2, dtype=torch.int64)
    y, offsets, row_of = rung_kernels.permute(x, experts, 3)
    out = rung_kernels.unpermute(y, row_of, torch.zeros(0, 2))
    assert y.shape == (0, 4) and offsets.tolist() == [0, 0, 0] and row_of.shape == (0, 2) and out.shape == (0, 4)
    assert torch.autograd.grad(out.sum(), x)[0].shape == (0, 4)


def test_what_does_not_fit_is_refused() -> None:
    x, experts = torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int64)
    row_of, weights = torch.arange(6).view(3, 2), torch.zeros(3, 2)
    for call, says in [
        (lambda: rung_kernels.permute(x[:2], experts, 2), "x (2, 4) and experts (3, 2)"),
        (lambda: rung_kernels.permute(x, experts[:, :0], 2), "must have a slot"),
        (lambda: rung_kernels.permute(x, weights, 2), "experts must be integers, not torch.float32"),
        (lambda: rung_kernels.permute(x, experts, 0), "num_experts=0"),
        (lambda: rung_kernels.unpermute(x, row_of), "y (3, 4)"),
        (lambda: rung_kernels.unpermute(torch.zeros(6, 4), row_of, weights[:2]), "weights (2, 2) and row_of (3, 2)"),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert says in str(error.value)
