"""What two ranks do in test_merge_lse.py: DTensors of every placement against whole tensors."""

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
    shape = (2, 6, 4)
    whole = [randn(*shape, *size, seed=seed).float().requires_grad_() for seed, size in enumerate([(8,), (), (8,), ()])]
    outer = randn(*shape, 8, seed=7).float(), randn(*shape, seed=8).float()
    differences = []
    with use_backend("triton"):
        expected = _run(whole, outer)
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            spread = [distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() for t in whole]
            there = [distribute_tensor(g, mesh, [placement]) for g in outer]
            for compiled in (False, True):
                found = _run(spread, there, compiled)
                assert all(f.placements == (placement,) for f in found)
                differences += [float((f.full_tensor() - e).abs().max()) for f, e in zip(found, expected, strict=True)]
    return differences


def _run(inputs, outer, compiled=False):
    function = rung_kernels.merge_lse
    outputs = (torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function)(*inputs)
    return [*outputs, *torch.autograd.grad(outputs, inputs, outer)]
