"""What rope is by definition, besides the formula in test_reference.py; and which shapes it takes."""

import pytest
import torch

import rung_kernels


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tables(batch: int, tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = randn(batch, tokens, size // 2).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def test_one_table_serves_every_sequence():
    q, k, (cos, sin) = randn(3, 5, 4, 6), randn(3, 5, 2, 6), tables(1, 5, 6)
    for one, each in zip(
        rung_kernels.rope(q, k, cos, sin),
        rung_kernels.rope(q, k, cos.repeat(3, 1, 1), sin.repeat(3, 1, 1)),
        strict=True,
    ):
        torch.testing.assert_close(one, each, rtol=0, atol=0)


def test_scores_depend_on_distances():
    """Su et al. 2021, equation 16: what the embedding is for."""
    q, k = randn(1, 1, 1, 6).expand(1, 9, 1, 6), randn(1, 1, 1, 6).expand(1, 9, 1, 6)
    angles = (torch.arange(9.0, dtype=torch.float64)[:, None] * randn(3)).repeat(1, 2)[None]
    q_turned, k_turned = rung_kernels.rope(q, k, angles.cos(), angles.sin())
    scores = q_turned[0, :, 0] @ k_turned[0, :, 0].T
    for distance in range(-8, 9):
        on_diagonal = scores.diagonal(distance)
        torch.testing.assert_close(on_diagonal, on_diagonal[:1].expand_as(on_diagonal))


def test_backward_turns_back():
    q, k, (cos, sin) = randn(2, 5, 4, 6).requires_grad_(), randn(2, 5, 2, 6).requires_grad_(), tables(2, 5, 6)
    outer = randn(2, 5, 4, 6), randn(2, 5, 2, 6)
    grads = torch.autograd.grad(rung_kernels.rope(q, k, cos, sin), (q, k), outer)
    torch.testing.assert_close(grads, rung_kernels.rope(*outer, cos, -sin))


def test_tables_may_be_learned():
    q, k, (cos, sin) = randn(2, 3, 2, 4), randn(2, 3, 1, 4), tables(1, 3, 4)
    assert torch.autograd.gradcheck(rung_kernels.rope, (q, k, cos.requires_grad_(), sin.requires_grad_()))


@pytest.mark.parametrize(
    ("q", "k", "cos", "sin"),
    [
        ((2, 3, 4, 5), (2, 3, 2, 5), (2, 3, 5), (2, 3, 5)),  # an odd head size
        ((2, 3, 4, 6), (2, 3, 2, 8), (2, 3, 6), (2, 3, 6)),
        ((2, 3, 4, 6), (2, 4, 2, 6), (2, 3, 6), (2, 3, 6)),
        ((2, 3, 4, 6), (2, 3, 2, 6), (3, 3, 6), (3, 3, 6)),
        ((2, 3, 4, 6), (2, 3, 2, 6), (2, 3, 6), (1, 3, 6)),
        ((2, 3, 4, 6), (2, 3, 2, 6), (2, 3, 3), (2, 3, 3)),  # angles once
        ((2, 3, 4, 6), (2, 3, 2, 6), (3, 6), (3, 6)),
        ((3, 4, 6), (3, 2, 6), (1, 3, 6), (1, 3, 6)),
    ],
)
def test_shapes_that_do_not_fit(q, k, cos, sin):
    with pytest.raises(ValueError, match=r"rope takes q .* these are q .*k .*cos .*sin"):
        rung_kernels.rope(randn(*q), randn(*k), randn(*cos), randn(*sin))
