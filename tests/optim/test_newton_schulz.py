"""Orthogonalisation against torch's, batched and one by one."""

import pytest
import torch
from torch.optim import _muon

from rung.optim.newton_schulz import orthogonalize

SHAPES = [(24, 16), (16, 24), (16, 16), (24, 16), (1, 7), (24, 16)]


def matrices(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in SHAPES]


def test_bfloat16_equals_torch() -> None:
    given = matrices(torch.bfloat16)
    for matrix, result in zip(given, orthogonalize(given, 5), strict=True):
        expected = _muon._zeropower_via_newtonschulz(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7)
        torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)


def test_singular_values_go_near_one() -> None:
    for matrix in orthogonalize(matrices(torch.float64)[:4], 5):
        values = torch.linalg.svdvals(matrix)
        assert values.min() > 0.3
        assert values.max() < 1.3


@pytest.mark.parametrize("batch", [2, 8])
def test_batches_give_what_single_matrices_give(batch: int) -> None:
    given = matrices(torch.float64)
    for one, many in zip(orthogonalize(given, 5), orthogonalize(given, 5, batch=batch), strict=True):
        torch.testing.assert_close(one, many, rtol=0, atol=1e-12)


def test_zero_stays_zero() -> None:
    (result,) = orthogonalize([torch.zeros(3, 5)], 5)
    assert torch.equal(result, torch.zeros(3, 5))
