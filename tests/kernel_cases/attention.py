"""What two ranks do in test_attention.py: sequences or heads that are spread, against whole ones."""

import torch
from kernel_cases.accuracy import randn
from torch import distributed
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import rung_kernels
import rung_kernels.sharding


def spread_over_two_ranks(return_lse: bool) -> list[float]:
    """Largest differences between whole tensors and DTensors: output, log-sum-exp, gradients."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    whole = [randn(2, 6, heads, 8, seed=heads).float().requires_grad_() for heads in (4, 2, 2)]
    ids = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    outer = randn(2, 6, 4, 8, seed=9).float()
    differences = []
    for placement in (Shard(0), Shard(2), Replicate()):
        spread = [distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() for t in whole]
        there = distribute_tensor(outer, mesh, [placement])
        placed_ids = distribute_tensor(ids, mesh, [placement if placement == Shard(0) else Replicate()])
        for options, placed in (
            ({}, {}),
            ({"window": 2}, {"window": 2}),
            ({"document_ids_BT": ids}, {"document_ids_BT": placed_ids}),
        ):
            expected = _run(whole, outer, options | {"return_lse": return_lse})
            for compiled in (False,) if return_lse else (False, True):
                found = _run(spread, there, placed | {"return_lse": return_lse}, compiled)
                assert found[0].placements == (placement,)
                differences += [
                    float((f.full_tensor() - e).detach().abs().max()) for f, e in zip(found, expected, strict=True)
                ]
    return differences


def _run(inputs, outer, options, compiled=False):
    def function(q, k, v):
        found = rung_kernels.attention(q, k, v, **options)
        return found if isinstance(found, tuple) else (found,)

    torch._dynamo.reset()  # compilations of one function are counted
    outputs = (torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function)(*inputs)
    return [*outputs, *torch.autograd.grad(outputs[0], inputs, outer)]
