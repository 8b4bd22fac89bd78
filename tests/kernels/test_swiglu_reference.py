"""swiglu beyond the formula in test_reference.py."""

import pytest
import torch

import rung_kernels


def test_gradients():
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(rung_kernels.swiglu, (gate, up))


def test_shapes_that_differ():
    with pytest.raises(ValueError, match=r"gate \(3, 7\) and up \(3, 1\) must have the same shape"):
        rung_kernels.swiglu(torch.randn(3, 7), torch.randn(3, 1))
