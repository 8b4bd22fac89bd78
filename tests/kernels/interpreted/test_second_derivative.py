"""Nobody gets a second derivative that is wrong: backward passes are not differentiable."""

from collections.abc import Callable

import pytest
import torch
from kernel_cases.accuracy import DEVICE
from torch import Tensor

import rung_kernels

LABELS = torch.tensor([0, 2, 1])
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: rung_kernels.rms_norm(x, torch.ones(8, device=x.device), 1e-5),
    "swiglu": lambda x: rung_kernels.swiglu(x, x),
    "cross_entropy": lambda x: rung_kernels.cross_entropy(x, LABELS.to(x.device)),
    "linear_cross_entropy": lambda x: rung_kernels.linear_cross_entropy(x, x.detach(), LABELS.to(x.device)),
    "its sum": lambda x: rung_kernels.linear_cross_entropy(x, x.detach(), LABELS.to(x.device), reduction="sum"),
}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("op", OPS)
def test_it_is_refused(op: str, backend: str) -> None:
    if backend == "torch" and op in ("rms_norm", "swiglu"):
        pytest.skip("torch's own, which is differentiable twice")
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    with rung_kernels.use_backend(backend), pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(OPS[op](x).sum(), x, create_graph=True)
        grad.square().sum().backward()
