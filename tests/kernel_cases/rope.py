"""What two ranks do in test_rope.py: DTensors of every placement against whole tensors."""

import torch
from kernel_cases.accuracy import randn
from torch import distributed
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

import rung_kernels
import rung_kernels.sharding
from rung_kernels.dispatch import use_backend
from rung_kernels.triton_kernels import launch

PLACEMENTS = (Shard(0), Shard(1), Shard(2), Shard(3), Replicate())


def tables(*shape: int, seed: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [*shape] in float32, of shape[-1] / 2 angles twice."""
    angles = 3 * randn(*shape[:-1], shape[-1] // 2, seed=seed)
    angles = torch.cat((angles, angles), -1)
    return angles.cos().float(), angles.sin().float()


def spread_over_two_ranks() -> tuple[list[float], int]:
    """Largest differences between whole tensors and DTensors, outputs and gradients of every placement, and how often
    a kernel ran in the process."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    # One key head, so that a rank may have none; two sequences, or one table for both.
    whole = [t.float().requires_grad_() for t in (randn(2, 6, 4, 8), randn(2, 6, 2, 8, seed=1))]
    outer = [randn(2, 6, 4, 8, seed=2).float(), randn(2, 6, 2, 8, seed=3).float()]
    differences = []
    before = launch.counts.total()
    with use_backend("triton"):
        for batch in (1, 2):
            cos_sin = tables(batch, 6, 8)
            expected = _run(whole, cos_sin, outer)
            for placement in PLACEMENTS:
                heads = [distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() for t in whole]
                around = [distribute_tensor(t, mesh, [_of_table(placement, batch)]) for t in cos_sin]
                there = [distribute_tensor(g, mesh, [placement]) for g in outer]
                for compiled in (False, True) if (placement, batch) == (Shard(2), 1) else (False,):
                    found = _run(heads, around, there, compiled)
                    assert placement == Shard(3) or {f.placements for f in found[:2]} == {(placement,)}
                    differences += [
                        float((f.full_tensor() - e).abs().max()) for f, e in zip(found, expected, strict=True)
                    ]
        differences += _one_output_read(mesh, whole, cos_sin, outer)
    return differences, launch.counts.total() - before


def _of_table(placement: Placement, batch: int) -> Placement:
    is_split = placement in (Shard(0), Shard(1)) and (placement, batch) != (Shard(0), 1)
    return placement if is_split else Replicate()


def _one_output_read(mesh, whole, cos_sin, outer):
    """The gradient of the other one is nobody's business, on ranks as elsewhere."""
    for placement in (Shard(0), Shard(2)):
        heads = [distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() for t in whole]
        around = [distribute_tensor(t, mesh, [Replicate()]) for t in cos_sin]
        for i in range(2):
            (expected,) = torch.autograd.grad(rung_kernels.rope(*whole, *cos_sin)[i], whole[i], outer[i])
            there = distribute_tensor(outer[i], mesh, [placement])
            (found,) = torch.autograd.grad(rung_kernels.rope(*heads, *around)[i], heads[i], there)
            yield float((found.full_tensor() - expected).abs().max())


def _run(heads, cos_sin, outer, compiled=False):
    function = torch.compile(rung_kernels.rope, fullgraph=True, backend="aot_eager") if compiled else rung_kernels.rope
    outputs = function(*heads, *cos_sin)
    return [*outputs, *torch.autograd.grad(outputs, heads, outer)]
