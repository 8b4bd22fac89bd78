"""What one rank does in test_dtensor.py: optimizers as a stranger uses them, over FSDP2's and other DTensors."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from rung.layout import LogicalTensor, local_view
from rung.optim import SPAM, StableSPAM

MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "spam": lambda params: SPAM(
        params,
        betas=(0.9, 0.95),
        reset_interval=3,
        warmup_steps=2,
        grace_steps=1,
        spike_threshold=20.0,
        weight_decay=0.1,
    ),
    "sparse_spam": lambda params: SPAM(params, reset_interval=3, density=0.4, seed=2),
    "stable_spam": lambda params: StableSPAM(params, reset_interval=3, gamma3=0.9, total_steps=3),
}
STEPS = 5


class Net(nn.Module):
    """Shapes of which few divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 3, bias=False)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(draw(seed, parameter.shape))


def draw(seed: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain() -> nn.Module:
    return Net()


def fsdp(size: int) -> nn.Module:
    net = Net()
    fully_shard(net, mesh=mesh((size,), ("dp",)))
    return net


def tensor_parallel(size: int) -> nn.Module:
    net = Net()
    over = mesh((size,), ("tp",))
    net.up.weight = nn.Parameter(distribute_tensor(net.up.weight.detach(), over, [Shard(0)]))
    net.up.bias = nn.Parameter(distribute_tensor(net.up.bias.detach(), over, [Replicate()]))
    net.down.weight = nn.Parameter(distribute_tensor(net.down.weight.detach(), over, [Shard(1)]))
    return net


def both() -> nn.Module:
    net = Net()
    whole = mesh((2, 2), ("dp", "tp"))
    for module, placement in ((net.up, Shard(0)), (net.down, Shard(1))):
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), whole["tp"], [placement]))
    net.up.bias = nn.Parameter(distribute_tensor(net.up.bias.detach(), whole["tp"], [Replicate()]))
    fully_shard(net, mesh=whole["dp"])
    return net


@functools.cache
def mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def give_gradients(net: nn.Module, step: int, *, gathered: bool) -> None:
    """The same to every sharding; ``gathered``: not yet spread as the parameters are."""
    for seed, (name, p) in enumerate(net.named_parameters()):
        logical = LogicalTensor.from_tensor(name, p)
        gradient = draw(1000 * step + seed, torch.Size(logical.shape))
        if gathered:
            p.grad = distribute_tensor(gradient, p.device_mesh, [Replicate()] * p.device_mesh.ndim)  # type: ignore[attr-defined]
            continue
        p.grad = torch.zeros_like(p)
        for piece in logical.pieces():
            local_view(p.grad)[piece.local] = gradient[piece.box.slices()]


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, numbers: range, *, gathered: bool = False) -> None:
    for step in numbers:
        give_gradients(net, step, gathered=gathered)
        optimizer.step()
        optimizer.zero_grad()


def found(net: nn.Module) -> Iterator[tuple[str, tuple[slice, ...], Any]]:
    for name, p in net.named_parameters():
        for piece in LogicalTensor.from_tensor(name, p).pieces():
            yield name, piece.box.slices(), local_view(p.detach())[piece.local].numpy()


def every_case(size: int) -> dict[str, list[Any]]:
    """By optimizer and way, what this rank has of the parameters after ``STEPS`` steps."""
    ways: dict[str, Callable[[], nn.Module]] = {
        "plain": plain,
        "fsdp": lambda: fsdp(size),
        "tensor_parallel": lambda: tensor_parallel(size),
    } | ({"both": both} if size == 4 else {})
    results = {}
    for kind, make in MAKERS.items():
        for way, build in ways.items():
            net = build()
            steps(net, make(net.named_parameters()), range(STEPS), gathered=way == "tensor_parallel")
            results[f"{kind} {way}"] = list(found(net))
        results[f"{kind} resumed"] = list(found(resumed(make, lambda: fsdp(size))))
        results[f"{kind} full"] = list(found(resumed(make, lambda: fsdp(size), full=True)))
    return results


def resumed(
    make: Callable[[Any], torch.optim.Optimizer], build: Callable[[], nn.Module], *, full: bool = False
) -> nn.Module:
    """Half of the steps, state out and in by torch's distributed state dicts, and the other half."""
    first = build()
    before = make(first.named_parameters())
    steps(first, before, range(2))
    options = dcp.StateDictOptions(full_state_dict=full)
    held = dcp.get_state_dict(first, before, options=options)
    if not full:
        file = io.BytesIO()
        torch.save(held, file)
        file.seek(0)
        held = torch.load(file, weights_only=False)
    second = build()
    with torch.no_grad():
        for p in second.parameters():
            local_view(p).zero_()
    after = make(second.named_parameters())
    dcp.set_state_dict(second, after, model_state_dict=held[0], optim_state_dict=held[1], options=options)
    steps(second, after, range(2, STEPS))
    return second
