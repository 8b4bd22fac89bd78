"""What two ranks do in test_swiglu.py: DTensors of every placement against whole tensors."""

import torch
from kernel_cases.accuracy import randn
from torch import distributed
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import rung_kernels
import rung_kernels.sharding
from rung_kernels.dispatch import use_backend
from rung_kernels.triton_kernels import launch


def spread_over_two_ranks() -> tuple[list[float], int]:
    """Largest differences between whole tensors and DTensors, outputs and gradients of every placement, and how often
    a kernel ran in the process."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    whole = [t.float().requires_grad_() for t in (randn(4, 3, 6), randn(4, 3, 6, seed=1))]
    outer = randn(4, 3, 6, seed=2).float()
    differences = []
    before = launch.counts.total()
    with use_backend("triton"):
        expected = _run(whole, outer)
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            spread = [distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() for t in whole]
            there = distribute_tensor(outer, mesh, [placement])
            for compiled in (False, True) if placement == Shard(2) else (False,):
                found = _run(spread, there, compiled)
                assert {f.placements for f in found} == {(placement,)}
                differences += [float((f.full_tensor() - e).abs().max()) for f, e in zip(found, expected, strict=True)]
    return differences, launch.counts.total() - before


def _run(inputs, outer, compiled=False):
    op = rung_kernels.swiglu
    output = (torch.compile(op, fullgraph=True, backend="aot_eager") if compiled else op)(*inputs)
    return [output, *torch.autograd.grad(output, inputs, outer)]
