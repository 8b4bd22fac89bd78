"""What a real step holds and sends on this rank: what the ranks of test_report.py run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from rung.observe.traffic import Sent, Traffic

MEASURED_STEP = 2
"""In the first step a pipeline also tells its neighbours what it will send."""


@dataclass
class Found:
    """Measured on one rank."""

    parameter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    sent: dict[tuple[str, tuple[str, ...]], Sent] = field(default_factory=dict)


class Meter:
    """Stands where the monitor stands, listens to one step of the loop, from reading to the update, and then stops."""

    stop_requested = False

    def __init__(self, layout: Any) -> None:
        self._layout, self._traffic = layout, Traffic()
        self.sent: dict[tuple[str, tuple[str, ...]], Sent] = {}

    def begin(self, step: int) -> None:
        if step == MEASURED_STEP:
            self._traffic.__enter__()

    def end(self, step: int, *_: Any) -> None:
        if step == MEASURED_STEP:
            self._traffic.__exit__(None, None, None)
            self.sent = self._traffic.by_axes(self._layout)
            self.stop_requested = True

    def evaluated(self, *_: Any) -> None:
        pass

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        del name
        yield


class WeighingOptimizer:
    """Weighs the gradients that it is given."""

    def __init__(self, optimizer: Any, parameters: list[Any]) -> None:
        self._optimizer, self._parameters = optimizer, parameters
        self.gradient_bytes = 0

    def step(self, lr: float, **kwargs: Any) -> None:
        self.gradient_bytes = sum(p.gradient().nbytes for p in self._parameters)
        self._optimizer.step(lr, **kwargs)

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def events(self) -> Any:
        return self._optimizer.events()


def measure(config: Any, layout: Any) -> Found:
    """Train two steps with the real loop, which stops before it would evaluate."""
    from rung.data import open_data
    from rung.layout import local_view
    from rung.loop import train
    from rung.parallel import World
    from rung.recipes.pretrain import assemble

    world = World(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    meter = Meter(layout)
    # The same graphs without code generation, which takes long when ranks generate C++ side by side.
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        run = assemble(config, layout, world, open_data(config.data, config.run.seed), meter)  # type: ignore[arg-type]
    state = run.optimizer.named_state()
    run.optimizer = weighing = WeighingOptimizer(run.optimizer, run.parameters)  # type: ignore[assignment]
    train(run)
    return Found(
        parameter_bytes=sum(local_view(p).nbytes for _, p in run.model.named_parameters()),
        gradient_bytes=weighing.gradient_bytes,
        optimizer_bytes=sum(entry.tensor.nbytes for entry in state.values()),
        sent=meter.sent,
    )


def kept(config: Any, layout: Any) -> int:
    """Bytes that the forward pass of one micro-batch leaves behind for backward, as storages counted once.

    Parameters are left out, and what the loss keeps. What selective recomputation keeps is not seen from here.
    """
    from rung.data import open_data
    from rung.layout import local_view
    from rung.loop.step import StepReader
    from rung.parallel import World
    from rung.recipes.pretrain import assemble

    world = World(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    source = open_data(config.data, config.run.seed)
    run = assemble(config, layout, world, source, Meter(layout))  # type: ignore[arg-type]
    batch = StepReader(source, layout, world.rank, run.objective, config.train, world.device, run.start).read(1)
    run.model.train()
    storages: dict[int, int] = {}
    alive: list[torch.Tensor] = []
    parameters: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # no other storage gets its address
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def loss(outputs: torch.Tensor, _: Any) -> torch.Tensor:
        hooks.__exit__(None, None, None)
        for part in run.model.parts:  # gathered by now, and not freed yet
            parameters.update(local_view(p).untyped_storage().data_ptr() for p in part.parameters())
        return outputs.sum()

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    hooks.__enter__()
    run.model.forward_backward(batch.micro_batches, torch.ones((), dtype=torch.int64), loss)
    return sum(size for address, size in storages.items() if address not in parameters)


def one_of_each() -> list[tuple[str, tuple[int, ...], int]]:
    """Messages of 3 ranks of 4, and what was written down of them."""
    group = dist.new_group([0, 1, 3])
    alone = dist.new_group([2])
    if dist.get_rank() == 2:
        with Traffic() as traffic:
            dist.all_reduce(torch.zeros(6), group=alone)
        return [tuple(message) for message in traffic.messages]
    me = group.rank()
    part, whole = torch.zeros(2, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    with Traffic() as traffic:
        dist.all_reduce(whole, group=group)
        dist.all_gather([part.clone() for _ in range(3)], part, group=group)
        dist.all_gather_into_tensor(whole, part, group=group)
        dist.reduce_scatter_tensor(part, whole, group=group)
        sizes = [1, 2, 3]  # what each rank gets of everybody
        dist.all_to_all_single(torch.zeros(3 * sizes[me]), torch.zeros(6), [sizes[me]] * 3, sizes, group=group)
        dist.barrier(group)
        if me == 2:
            dist.send(part, 0)
        if me == 0:
            dist.recv(part, 3)
    return [tuple(message) for message in traffic.messages]
