"""Whole tensors out of a spread model, one at a time."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rung.layout import Box, LogicalTensor, clean_name, local_view, logical_tensors

__all__ = ["SpreadParameters", "gathered_tensors"]


class SpreadParameters(Protocol):
    """A model that knows how its parameters are spread."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Parameters of this rank."""

    def logical_tensors(self) -> Mapping[str, LogicalTensor]:
        """What they are logically, by the same names."""


@dataclass(frozen=True)
class _Entry:
    """What one rank has of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    owned: tuple[Box, ...]


@dataclass(frozen=True)
class _Plan:
    """What all ranks must know: the order of tensors, and whether they travel at all."""

    names: tuple[str, ...]
    dtypes: Mapping[str, torch.dtype]
    keep: bool


def gathered_tensors(
    parameters: Mapping[str, tuple[LogicalTensor, Tensor]] | SpreadParameters | nn.Module,
    *,
    keep: bool,
    order: Sequence[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor on the CPU) for every tensor that some rank holds, on every rank in the same order.

    Collective over all ranks: each must exhaust the iterator, which exchanges names at its start and then, tensor by
    tensor, sends what other ranks own to rank 0. One whole tensor and one rank's part of it are alive here at a time;
    bits and dtype are kept. The tensors are the caller's own.

    Args:
        parameters: per name, what it is logically and the rank's plain local tensor. Ranks may hold different names
            (stages of a pipeline); aliases (``tied_to``) are left out. Or a model that knows this of its parameters, or
            one whose DTensors say it all and whose plain parameters are the same on all ranks.
        keep: whether values are wanted. That of rank 0 counts, since only rank 0 receives any: elsewhere the tensors
            are empty, and so they are on rank 0 without ``keep``. No bytes are sent for nothing.
        order: names that come first, in this order. The others follow as each rank has them, layers by their numbers;
            in a decoder that is the order of the model.

    Raises:
        ValueError: on every rank, when ranks contradict one another about a tensor or an order, or when the boxes that
            ranks own do not make up a tensor.
    """
    if not isinstance(parameters, Mapping):
        parameters = _of_model(parameters)
    mine = [
        _Entry(name, logical.shape, local.dtype, tuple(box for box, _, owned in logical.pieces() if owned))
        for name, (logical, local) in parameters.items()
        if logical.tied_to is None
    ]
    plan, everyone = _agree(mine, keep, order or ())
    rank = dist.get_rank() if dist.is_initialized() else 0
    if not plan.keep:
        yield from ((name, torch.empty(0, dtype=plan.dtypes[name])) for name in plan.names)
    elif rank == 0:
        owners: dict[str, list[tuple[int, _Entry]]] = {name: [] for name in plan.names}
        for other, entries in enumerate(everyone):
            for entry in entries:
                if entry.owned or not owners[entry.name]:  # the first in any case: an empty tensor has no owner
                    owners[entry.name].append((other, entry))
        for name in plan.names:
            yield name, _receive(owners[name], parameters)
    else:
        has = {entry.name for entry in mine if entry.owned}
        for name in plan.names:
            if name in has:
                dist.send(_bytes(_owned_values(*parameters[name])), dst=0)
            yield name, torch.empty(0, dtype=plan.dtypes[name])


def _of_model(model: SpreadParameters | nn.Module) -> dict[str, tuple[LogicalTensor, Tensor]]:
    logical = logical_tensors(model) if isinstance(model, nn.Module) else model.logical_tensors()
    named = ((clean_name(name), parameter) for name, parameter in model.named_parameters())
    return {name: (logical[name], local_view(parameter)) for name, parameter in named}


@torch.no_grad()
def _owned_values(logical: LogicalTensor, local: Tensor) -> Tensor:
    """The elements that this rank owns, box after box, as one vector on the CPU."""
    parts = [local[place].reshape(-1) for _, place, owned in logical.pieces() if owned]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).detach().cpu()


@torch.no_grad()
def _receive(owners: list[tuple[int, _Entry]], parameters: Mapping[str, tuple[LogicalTensor, Tensor]]) -> Tensor:
    """One tensor out of what its owners hold, this rank among them."""
    first = owners[0][1]
    whole = torch.empty(first.shape, dtype=first.dtype)
    for rank, entry in owners:
        sizes = [box.numel for box in entry.owned]
        if not sizes:
            continue
        if rank == 0:
            values = _owned_values(*parameters[entry.name])
        else:
            values = torch.empty(sum(sizes), dtype=entry.dtype)
            dist.recv(_bytes(values), src=rank)
        for box, part in zip(entry.owned, values.split(sizes), strict=True):
            whole[box.slices()] = part.view(box.sizes)
        del values, part  # before the next rank's
    return whole


def _bytes(values: Tensor) -> Tensor:
    """The same memory as a vector of bytes: what carries them need not know the dtype."""
    return values.view(torch.uint8)


def _agree(mine: list[_Entry], keep: bool, order: Sequence[str]) -> tuple[_Plan, list[list[_Entry]]]:
    """The plan; and, on rank 0, what each rank has."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return _plan([mine], keep, order), [mine]
    everyone: list[list[_Entry]] = [[] for _ in range(dist.get_world_size())]
    # Objects travel over gloo, which the default group has on CUDA too.
    dist.gather_object(mine, everyone if dist.get_rank() == 0 else None, dst=0)
    outcome: list[_Plan | str] = [""]
    if dist.get_rank() == 0:
        try:
            outcome[0] = _plan(everyone, keep, order)
        except ValueError as error:
            outcome[0] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    plan = outcome[0]
    if isinstance(plan, str):
        raise ValueError(plan)
    return plan, everyone


def _plan(everyone: list[list[_Entry]], keep: bool, order: Sequence[str]) -> _Plan:
    known: dict[str, _Entry] = {}
    owned: dict[str, list[Box]] = {}
    problems = []
    for entry in (entry for entries in everyone for entry in entries):
        first = known.setdefault(entry.name, entry)
        if (entry.shape, entry.dtype) != (first.shape, first.dtype):
            problems.append(
                f"{entry.name}: {first.dtype} of shape {first.shape} on one rank, {entry.dtype} of shape {entry.shape} "
                "on another"
            )
        owned.setdefault(entry.name, []).extend(entry.owned)
    for name, boxes in owned.items():
        total = sum(box.numel for box in boxes)
        if total != prod(known[name].shape) or len(set(boxes)) != len(boxes):
            problems.append(f"{name}: ranks own {total} elements of shape {known[name].shape}, in boxes {boxes}")
    if problems:
        raise ValueError("; ".join(problems))
    sequences = dict.fromkeys(tuple(entry.name for entry in entries) for entries in everyone)
    names = _merged(sequences, [name for name in order if name in known])
    return _Plan(tuple(names), {name: entry.dtype for name, entry in known.items()}, keep)


def _merged(sequences: Mapping[tuple[str, ...], None], order: Sequence[str]) -> list[str]:
    """One order of all names: ``order``, then one in which every sequence and the numbers in names keep theirs.

    The same parameter of layers follows their numbers, whichever rank has them; this also keeps an embedding before
    layers that other ranks have. What is left open goes by name, numbers by value.
    """
    placed = set(order)
    rest = dict.fromkeys(name for names in sequences for name in names if name not in placed)
    before: dict[str, set[str]] = {name: set() for name in rest}
    chains = [[name for name in names if name in rest] for names in sequences]
    of_layers: dict[str, list[str]] = {}
    for name in rest:
        of_layers.setdefault(re.sub(r"\d+", "#", name, count=1), []).append(name)
    chains += [sorted(names, key=_by_number) for names in of_layers.values()]
    for chain in chains:
        for earlier, later in pairwise(chain):
            before[later].add(earlier)
    after: dict[str, list[str]] = {name: [] for name in rest}
    for later, earlier_names in before.items():
        for earlier in earlier_names:
            after[earlier].append(later)
    waiting = {name: len(names) for name, names in before.items()}
    ready = [(_by_number(name), name) for name, number in waiting.items() if not number]
    heapq.heapify(ready)
    merged = list(order)
    while ready:
        _, name = heapq.heappop(ready)
        merged.append(name)
        for later in after[name]:
            waiting[later] -= 1
            if not waiting[later]:
                heapq.heappush(ready, (_by_number(later), later))
    if len(merged) < len(order) + len(rest):
        left = sorted(rest.keys() - set(merged))
        raise ValueError(f"ranks have these tensors in different orders; give the order explicitly: {left}")
    return merged


def _by_number(name: str) -> list[tuple[str, int]]:
    """A sorting key that has layer 2 before layer 10."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]
