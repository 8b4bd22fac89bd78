"""What two ranks do in test_permute.py: DTensors of every placement against whole tensors."""

import torch
from kernel_cases.accuracy import randn
from torch import distributed
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import rung_kernels
import rung_kernels.sharding
from rung_kernels.dispatch import use_backend


def random_experts(*shape: int, num_experts: int, elsewhere: int = 0) -> torch.Tensor:
    """Of which ``elsewhere`` at either end are none."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-elsewhere, num_experts + elsewhere, shape, generator=generator)


def spread_over_two_ranks() -> list[float]:
    """Largest differences between whole tensors and DTensors: outputs and gradients of every placement."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    x, weights = randn(6, 8).float(), randn(6, 2, seed=1).float()
    experts = random_experts(6, 2, num_experts=3, elsewhere=1)
    differences = []
    with use_backend("triton"):
        expected = _run(x.clone().requires_grad_(), experts, weights.clone().requires_grad_())
        for placement in (Shard(0), Shard(1), Replicate()):
            spread = distribute_tensor(x, mesh, [placement]).requires_grad_()
            copies = [distribute_tensor(t, mesh, [Replicate()]) for t in (experts, weights)]
            for compiled, backend in ((False, "triton"), (True, "triton"), (False, "torch")):
                with use_backend(backend):
                    found = _run(spread, copies[0], copies[1].requires_grad_(), compiled)
                wanted = (Replicate() if placement == Shard(0) else placement,)
                assert backend == "torch" or found[0].placements == found[3].placements == wanted
                whole = [f.full_tensor().double() for f in found]
                differences += [float((f - e).abs().max()) for f, e in zip(whole, expected, strict=True)]
    return differences


def _run(x, experts, weights, compiled=False):
    def there_and_back(x, experts, weights):
        y, offsets, row_of = rung_kernels.permute(x, experts, 3)
        y = y * 2
        return y, offsets, row_of, rung_kernels.unpermute(y, row_of, weights), rung_kernels.unpermute(y, row_of)

    function = torch.compile(there_and_back, fullgraph=True, backend="aot_eager") if compiled else there_and_back
    outputs = function(x, experts, weights)
    loss = sum(_sum(out.square()) for out in (outputs[0], *outputs[3:]))
    return [*outputs, *torch.autograd.grad(loss, (x, weights))]


def _sum(x):
    return x.sum().full_tensor() if isinstance(x, DTensor) else x.sum()
