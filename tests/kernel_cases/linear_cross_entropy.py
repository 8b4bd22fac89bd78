"""What two ranks do for the tests of linear_cross_entropy: rows as DTensors, and a vocabulary that the ranks share.

Legend: N rows, D features, V vocabulary.
"""

from __future__ import annotations

import torch
from kernel_cases.accuracy import close, randn
from kernel_cases.cross_entropy import IGNORED, SETTINGS, labels_of
from torch import Tensor, distributed
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import rung_kernels
import rung_kernels.sharding
from rung_kernels import reference
from rung_kernels.dispatch import use_backend
from rung_kernels.triton_kernels import launch


def case(num_rows: int, width: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, labels and a gradient of the losses, the same on every machine."""
    x_ND, weight_VD = randn(num_rows, width), randn(vocab_size, width, seed=1)
    return x_ND, weight_VD, labels_of(num_rows, vocab_size), randn(num_rows, seed=2)


def rows_over_two_ranks() -> list[float]:
    """Largest differences between whole tensors and DTensors: losses and gradients, both reductions."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    x_ND, weight_VD, labels_N, outer_N = (t.float() if t.is_floating_point() else t for t in case(6, 8, 33))
    differences = []
    with use_backend("triton"):
        for reduction, outer in (("none", outer_N), ("sum", outer_N[0])):
            for frozen in (None, "x", "weight"):
                expected = _run(x_ND, weight_VD, labels_N, outer, reduction, frozen)
                for of_rows, of_weight in ((Shard(0), Replicate()), (Shard(0), Shard(0)), (Replicate(), Replicate())):
                    if frozen is not None and of_rows == Replicate():
                        continue
                    there = [
                        distribute_tensor(t, mesh, [of_rows if t.ndim and t is not weight_VD else of_weight])
                        for t in (x_ND, weight_VD, labels_N)
                    ]
                    grad = distribute_tensor(outer, mesh, [of_rows if outer.ndim else Replicate()])
                    for compiled in (False, True)[: 1 + (frozen is None and of_weight == Shard(0))]:
                        found = _run(*there, grad, reduction, frozen, compiled=compiled)
                        differences += [
                            float((f.full_tensor() - e).abs().max()) for f, e in zip(found, expected, strict=True)
                        ]
    return differences


def _run(x_ND, weight_VD, labels_N, outer, reduction, frozen, compiled=False):
    x_ND = x_ND.detach().clone().requires_grad_(frozen != "x")
    weight_VD = weight_VD.detach().clone().requires_grad_(frozen != "weight")

    def loss(x, weight):
        return rung_kernels.linear_cross_entropy(x, weight, labels_N, reduction=reduction, chunk_size=2, **SETTINGS[3])

    losses = (torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss)(x_ND, weight_VD)
    if reduction == "sum" and hasattr(losses, "redistribute"):
        losses = losses.redistribute(placements=[Replicate()])
    leaves = [t for t in (x_ND, weight_VD) if t.requires_grad]
    return [losses.detach(), *torch.autograd.grad(losses, leaves, outer)]


def vocabulary_over_two_ranks(backend: str) -> None:
    """Every rank has some rows of the weight: against one process that has all of them."""
    wide = torch.float32 if backend == "triton" else torch.float64
    for sizes in ((21, 12), (33, 0)):
        for reduction in ("none", "sum"):
            for dtype, settings in ((wide, SETTINGS[0]), (wide, SETTINGS[3]), (torch.bfloat16, SETTINGS[3])):
                _check(sizes, dtype, reduction, settings, backend)


def _check(
    sizes: tuple[int, ...], dtype: torch.dtype, reduction: str, settings: dict[str, float], backend: str
) -> None:
    rank, group = distributed.get_rank(), distributed.group.WORLD
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x_ND, weight_VD, labels_N, outer_N = case(11, 8, sum(sizes))
    x_ND, weight_VD, outer_N = x_ND.to(dtype), weight_VD.to(dtype), outer_N.to(torch.promote_types(dtype, torch.float))
    outer = outer_N if reduction == "none" else outer_N[0]
    found = []
    before = launch.counts.copy()
    for chunk_size in (None, 4):
        with use_backend(backend):
            leaves = [x_ND.clone().requires_grad_(), weight_VD[mine].clone().requires_grad_()]
            losses = rung_kernels.linear_cross_entropy(
                *leaves, labels_N, IGNORED, group=group, first=mine.start, reduction=reduction, chunk_size=chunk_size,
                **settings,
            )  # fmt: skip
            grad_x, grad_weight = torch.autograd.grad(losses, leaves, outer)
        everyone = [torch.empty_like(losses) for _ in sizes]
        distributed.all_gather(everyone, losses.detach())
        assert torch.equal(everyone[0], everyone[1])
        assert grad_x.dtype == grad_weight.dtype == dtype
        summed = grad_x.to(outer.dtype)
        distributed.all_reduce(summed)  # what it says of summands: they are the caller's to add
        found.append((losses.detach(), summed, grad_weight))
    assert (launch.counts != before) == (backend == "triton")
    truth, same = (_alone(x_ND, weight_VD, labels_N, outer, reduction, settings, d) for d in (torch.float64, dtype))
    for losses, grad_x, grad_weight in found:
        what = f"{sizes} {dtype} {reduction} {settings}"
        ulps = 64 if dtype == torch.float64 else 2
        close(losses, same[0], truth[0], ulps=ulps, what=f"losses {what}")
        close(grad_x.to(dtype), same[1], truth[1], factor=4, ulps=ulps, what=f"gradient of x {what}")
        close(grad_weight, same[2][mine], truth[2][mine], factor=4, ulps=ulps, what=f"gradient of the weight {what}")


def _alone(x_ND, weight_VD, labels_N, outer, reduction, settings, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in (x_ND, weight_VD)]
    losses = reference.linear_cross_entropy(*leaves, labels_N, IGNORED, reduction=reduction, **settings)
    return [losses.detach(), *torch.autograd.grad(losses, leaves, outer.to(losses.dtype))]
