"""What two ranks do in test_norm.py: DTensors of every placement against whole tensors."""

import torch
from kernel_cases.accuracy import randn
from torch import distributed
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import rung_kernels
import rung_kernels.sharding
from rung_kernels.dispatch import use_backend


def spread_over_two_ranks() -> list[float]:
    """Largest differences between whole tensors and DTensors: outputs and gradients of every placement."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    whole = [t.float().requires_grad_() for t in (randn(4, 6, 16), randn(4, 6, 16, seed=1), randn(16, seed=2))]
    outer = randn(4, 6, 16, seed=3).float(), randn(4, 6, 16, seed=4).float()
    differences = []
    with use_backend("triton"):
        expected = _run(whole, outer)
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            spread = [
                distribute_tensor(t.detach(), mesh, [placement if t.ndim > 1 else Replicate()]).requires_grad_()
                for t in whole
            ]
            there = [distribute_tensor(g, mesh, [placement]) for g in outer]
            for compiled in (False, True):
                found = _run(spread, there, compiled)
                assert placement == Shard(2) or found[0].placements == (placement,)
                differences += [float((f.full_tensor() - e).abs().max()) for f, e in zip(found, expected, strict=True)]
    return differences


def _run(inputs, outer, compiled=False):
    def both(x, residual, weight):
        y, stream = rung_kernels.add_rms_norm(x, residual, weight, 1e-5)
        return rung_kernels.rms_norm(y, weight, 1e-5), stream

    function = torch.compile(both, fullgraph=True, backend="aot_eager") if compiled else both
    outputs = function(*inputs)
    return [*outputs, *torch.autograd.grad(outputs, inputs, outer)]
