"""What two ranks do in test_grouped_mm.py: experts whose weights are split, against whole ones."""

import torch
from kernel_cases.accuracy import randn
from torch import distributed
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

import rung_kernels
import rung_kernels.sharding
from rung_kernels.dispatch import use_backend


def spread_over_two_ranks(backend: str) -> list[float]:
    """Largest differences between whole tensors and DTensors: outputs and gradients of every placement."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    x, weights, outer = randn(9, 8).float(), randn(3, 8, 6, seed=1).float(), randn(9, 6, seed=2).float()
    offsets = torch.tensor([4, 4, 7])
    ways = {
        Shard(1): (Replicate(), Shard(2), Shard(1)),
        Partial(): (Shard(1), Shard(1), Replicate()),
        Replicate(): (Replicate(), Replicate(), Replicate()),
    }
    differences = []
    with use_backend(backend):
        expected = _run([x.requires_grad_(), weights.requires_grad_()], offsets, outer)
        for result, placements in ways.items():
            *spread, there = (
                distribute_tensor(t.detach(), mesh, [placement])
                for t, placement in zip((x, weights, outer), placements, strict=True)
            )
            spread = [t.requires_grad_() for t in spread]
            where = distribute_tensor(offsets, mesh, [Replicate()])
            for compiled in (False, True):
                found = _run(spread, where, there, compiled)
                assert found[0].placements == (result,)
                differences += [float((f.full_tensor() - e).abs().max()) for f, e in zip(found, expected, strict=True)]
    return differences


def _run(inputs, offsets, outer, compiled=False):
    function = rung_kernels.grouped_mm
    y = (torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function)(*inputs, offsets)
    return [y, *torch.autograd.grad(y, inputs, outer)]
