"""What two ranks do in test_router.py: DTensors of every placement against whole tensors."""

import torch
from kernel_cases.accuracy import randn
from torch import distributed
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import rung_kernels
import rung_kernels.sharding
from rung_kernels.dispatch import use_backend


def spread_over_two_ranks() -> list[float]:
    """Largest differences between whole tensors and DTensors: outputs and gradients of every placement."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    logits, bias = randn(7, 12).float(), randn(12, seed=1).float()
    differences = []
    with use_backend("triton"):
        for options in ({}, {"bias": bias, "score": "sigmoid"}):
            expected = _run(logits.clone().requires_grad_(), options)
            for placement in (Shard(0), Shard(1), Replicate()):
                spread = distribute_tensor(logits, mesh, [placement]).requires_grad_()
                there = {k: distribute_tensor(v, mesh, [Replicate()]) if k == "bias" else v for k, v in options.items()}
                for compiled, backend in ((False, "triton"), (True, "triton"), (False, "torch")):
                    with use_backend(backend):
                        found = _run(spread, there, compiled)
                    if placement == Shard(0) and backend == "triton":
                        assert found[0].placements == found[1].placements == (placement,)
                        assert found[2].placements[0].is_partial()
                    whole = [f.full_tensor().double() for f in found]
                    differences += [float((f - e).abs().max()) for f, e in zip(whole, expected, strict=not compiled)]
    return differences


def _run(logits, options, compiled=False):
    def route(logits):
        weights, experts, counts, scores = rung_kernels.router(logits, 3, **options)
        balance = counts * scores.sum(0) / 49  # either is a sum over all tokens, wherever they are
        return weights, experts, counts, scores, balance

    outputs = (torch.compile(route, fullgraph=True, backend="aot_eager") if compiled else route)(logits)
    weights, _, _, scores, balance = outputs
    reads = [(weights,), (balance,), (weights, scores, balance)]
    losses = [sum(_sum(out.square()) for out in read) for read in (reads[2:] if compiled else reads)]
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses]
    return [*(out.detach() for out in outputs), *grads[-1:], *grads[:-1]]


def _sum(x):
    return x.sum().full_tensor() if isinstance(x, DTensor) else x.sum()
