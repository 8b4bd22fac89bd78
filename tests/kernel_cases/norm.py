"""What two ranks do in test_norm.py: DTensors of every placement against whole tensors."""

import torch
from kernel_cases.accuracy import randn
from torch import distributed
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map

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
        differences += _mapped(mesh, whole, outer[0])
    return differences


def _mapped(mesh, whole, outer):
    """Through local_map: without in_grad_placements torch takes each rank's part of a copy's gradient for all of it."""
    x, _, weight = whole
    mapped = local_map(
        lambda x, weight: rung_kernels.rms_norm(x, weight, 1e-5),
        out_placements=[Shard(1)],
        in_placements=([Shard(1)], [Replicate()]),
        in_grad_placements=([Shard(1)], [Partial()]),
        device_mesh=mesh,
    )
    there = distribute_tensor(x.detach(), mesh, [Shard(1)]).requires_grad_()
    copied = distribute_tensor(weight.detach(), mesh, [Replicate()]).requires_grad_()
    found = torch.autograd.grad(mapped(there, copied), (there, copied), distribute_tensor(outer, mesh, [Shard(1)]))
    expected = torch.autograd.grad(rung_kernels.rms_norm(x, weight, 1e-5), (x, weight), outer)
    return [float((f.full_tensor() - e).abs().max()) for f, e in zip(found, expected, strict=True)]


def _run(inputs, outer, compiled=False):
    def both(x, residual, weight):
        y, stream = rung_kernels.add_rms_norm(x, residual, weight, 1e-5)
        return rung_kernels.rms_norm(y, weight, 1e-5), stream

    function = torch.compile(both, fullgraph=True, backend="aot_eager") if compiled else both
    outputs = function(*inputs)
    return [*outputs, *torch.autograd.grad(outputs, inputs, outer)]
