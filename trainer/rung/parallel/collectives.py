"""The collectives of tensor parallelism as differentiable functions on plain tensors.

Each is what its name says in the forward pass and its transpose in the backward pass. In eager mode they are calls on
the process group; under torch.compile the functional ops, which wait by themselves when they are traced, and which the
compiler can move and fuse with the products beside them. Groups travel by name: a compiled graph holds no objects.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

__all__ = [
    "all_gather_single",
    "all_reduce_backward",
    "all_reduce_forward",
    "gather",
    "group_by_name",
    "reduce_scatter",
]


# torch 2.13 renamed them, and warns about the old names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_by_name(name: str) -> dist.ProcessGroup:
    """The process group that torch registered under a name."""
    return _resolve_process_group(cast(Any, name))  # torch's type of names is newer than 2.11


def gather(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's part of ``dim`` (0 or more; of one shape on all ranks) -> the whole of it, parts in rank order, in
    the same dtype. The gradient is summed and split again."""
    return _Gather.apply(x, dim, group)


def reduce_scatter(x: Tensor, dim: int, group: str) -> Tensor:
    """Partial sums of one shape -> this rank's part of their sum along ``dim`` (0 or more; the number of ranks divides
    its size), in the same dtype. The gradient is gathered."""
    return _ReduceScatter.apply(x, dim, group)


def all_reduce_forward(x: Tensor, group: str) -> Tensor:
    """Partial sums -> their sum on every rank; the gradient, the same on every rank, passes as it is."""
    return _AllReduceForward.apply(x, group)


def all_reduce_backward(x: Tensor, group: str) -> Tensor:
    """The same tensor on every rank, of which each makes something else: the gradient is the sum of theirs."""
    return _AllReduceBackward.apply(x, group)


def _gather(x: Tensor, dim: int, name: str) -> Tensor:
    if torch.compiler.is_compiling():
        # Gathered in dim 0 and put in order here: the form that overlaps with products, and that torch 2.11 can trace.
        parts = functional.all_gather_tensor(x.contiguous(), 0, cast(Any, name))
        return torch.cat(parts.chunk(parts.shape[0] // x.shape[0]), dim)
    group = group_by_name(name)
    parts = x.new_empty((group.size(), *x.shape))
    all_gather_single(parts.flatten(0, 1), x.contiguous(), group=group)
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scatter(x: Tensor, dim: int, name: str) -> Tensor:
    if torch.compiler.is_compiling():
        return functional.reduce_scatter_tensor(x, "sum", dim, cast(Any, name))
    group = group_by_name(name)
    parts = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).contiguous()
    mine = x.new_empty(parts.shape[1:])
    _reduce_scatter_single(mine, parts.flatten(0, 1), group=group)
    return mine


def _all_reduce(x: Tensor, name: str) -> Tensor:
    if torch.compiler.is_compiling():
        return functional.all_reduce(x, "sum", cast(Any, name))
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group_by_name(name))
    return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, name: str) -> Tensor:
        ctx.dim, ctx.name = dim, name
        return _gather(x, dim, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grad, ctx.dim, ctx.name), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, name: str) -> Tensor:
        ctx.dim, ctx.name = dim, name
        return _reduce_scatter(x, dim, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.dim, ctx.name), None, None


class _AllReduceForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        return _all_reduce(x, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllReduceBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.name), None
