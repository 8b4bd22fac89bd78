"""Whole matrices for one rank each, out of sharded ones, and back: two all-to-all messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from rung.layout import Box
from rung.optim.base import LocalParameter
from rung.optim.newton_schulz import orthogonalize_cost

__all__ = ["MatrixExchange", "assign_owners"]


@dataclass(frozen=True)
class Part:
    """What one rank holds of one matrix."""

    name: str
    matrix_shape: tuple[int, int]
    local_shape: tuple[int, ...]
    places: tuple[tuple[Box, Box], ...]
    """Pairs of boxes, in the matrix and in the local tensor; none that is empty."""

    @classmethod
    def of(cls, parameter: LocalParameter) -> Part:
        logical = parameter.logical
        rows, columns = logical.shape
        places = zip(logical.boxes, logical.local_boxes, strict=True)
        return cls(
            parameter.name,
            (rows, columns),
            tuple(parameter.local.shape),
            tuple((box, local_box) for box, local_box in places if box.numel),
        )


class MatrixExchange:
    """Gives every matrix of a list to one rank of the group that it is spread over, and brings results home.

    A rank's parts of all matrices travel as one flat vector: local tensors in the order of ``parameters``, which is the
    order of owners. Any boxes will do, as long as the ranks' boxes cover each matrix; parts that several ranks hold are
    taken from the last of them.
    """

    def __init__(self, parameters: Sequence[LocalParameter]) -> None:
        """Collective over the group, which all of ``parameters`` share."""
        self._group = parameters[0].group
        parameters = sorted(parameters, key=lambda p: p.name)
        by_rank = _gather([Part.of(p) for p in parameters], self._group)
        rank = dist.get_rank(self._group) if self._group is not None else 0
        _check(by_rank)
        owners = assign_owners([orthogonalize_cost(*part.matrix_shape) for part in by_rank[0]], len(by_rank))
        order = sorted(range(len(parameters)), key=lambda i: (owners[i], parameters[i].name))
        self.parameters = [parameters[i] for i in order]
        """In the order of the flat vector."""
        # What this rank sends of its own to each owner, and what it receives of the matrices that it owns itself.
        self._outgoing = [
            sum(prod(by_rank[rank][i].local_shape) for i in order if owners[i] == owner)
            for owner in range(len(by_rank))
        ]
        mine = [i for i in order if owners[i] == rank]
        self._owned_shapes = [by_rank[rank][i].matrix_shape for i in mine]
        self._owned_parts = [[parts[i] for i in mine] for parts in by_rank]
        self._incoming = [sum(prod(part.local_shape) for part in parts) for parts in self._owned_parts]

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat vector, shaped like the local tensors of ``parameters``."""
        shapes = [p.local.shape for p in self.parameters]
        return [v.view(s) for v, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]

    def to_owners(self, flat: Tensor) -> list[Tensor]:
        """The whole matrices that this rank owns, from every rank's flat vector. Collective."""
        received = self._all_to_all(flat, self._outgoing, self._incoming)
        matrices = [flat.new_empty(shape) for shape in self._owned_shapes]
        in_matrices, in_flat = self._places(matrices, received)
        if in_flat:
            torch._foreach_copy_(in_matrices, in_flat)
        return matrices

    def to_holders(self, matrices: Sequence[Tensor], like: Tensor) -> Tensor:
        """The inverse: this rank's flat vector, from every rank's owned matrices; dtype and device of ``like``."""
        outgoing = like.new_zeros(sum(self._incoming))
        in_matrices, in_flat = self._places(matrices, outgoing)
        if in_flat:
            torch._foreach_copy_(in_flat, in_matrices)
        return self._all_to_all(outgoing, self._incoming, self._outgoing)

    def _places(self, matrices: Sequence[Tensor], flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The same elements twice: as views of the owned matrices, and as views of what all ranks hold of them."""
        in_matrices, in_flat = [], []
        parts = [(matrix, part) for parts in self._owned_parts for matrix, part in zip(matrices, parts, strict=True)]
        ends = list(accumulate(prod(part.local_shape) for _, part in parts))
        for (matrix, part), end in zip(parts, ends, strict=True):
            local = flat[end - prod(part.local_shape) : end].view(part.local_shape)
            for box, local_box in part.places:
                in_matrices.append(matrix[box.slices()])
                in_flat.append(local[local_box.slices()])
        return in_matrices, in_flat

    def _all_to_all(self, flat: Tensor, outgoing: list[int], incoming: list[int]) -> Tensor:
        if self._group is None:
            return flat
        received = flat.new_empty(sum(incoming))
        dist.all_to_all_single(received, flat, incoming, outgoing, group=self._group)
        return received


def assign_owners(costs: Sequence[int], num_ranks: int) -> list[int]:
    """Longest processing time first: each item, the costly ones first, goes to the rank with the least work so far."""
    loads = [0] * num_ranks
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[item] = loads.index(min(loads))
        loads[owners[item]] += costs[item]
    return owners


def _gather(parts: list[Part], group: dist.ProcessGroup | None) -> list[list[Part]]:
    if group is None:
        return [parts]
    by_rank: list[list[Part]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(by_rank, parts, group=group)
    return by_rank


def _check(by_rank: list[list[Part]]) -> None:
    """Every rank must know the same matrices, and together they must hold all of each."""
    names = [[(part.name, part.matrix_shape) for part in parts] for parts in by_rank]
    if any(other != names[0] for other in names):
        raise RuntimeError(f"ranks of one group have different matrices: {names}")
    for parts in zip(*by_rank, strict=True):
        covered = sum(box.numel for box in {box for part in parts for box, _ in part.places})
        if covered != prod(parts[0].matrix_shape):
            raise RuntimeError(
                f"{parts[0].name}: the {len(parts)} ranks of its group hold {covered} of the elements of its shape "
                f"{parts[0].matrix_shape}"
            )
