"""How DTensor spreads these operations: importing this registers a rule for every operator, forward and backward.

Eager calls with DTensors import it by themselves; import it before compiling a model of DTensors. A rule lists the ways
in which a tensor can lie along one mesh axis; what lies otherwise is gathered first, by DTensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

# The operators exist once their modules are imported.
import rung_kernels.norm  # noqa: F401

__all__: list[str] = []

Way = tuple[Sequence[Placement], Sequence[Placement | None]]
"""Placements of the outputs, and of the inputs; None for what is no tensor."""

ROWS = "rows"
COPY = "copy"
SUM = "sum"
OTHER = "other"


def spread(
    operator: str,
    outputs: Sequence[str] | Callable[..., Sequence[str]],
    inputs: Sequence[str],
    dims: Callable[..., Sequence[int]],
) -> None:
    """Let ``rung::operator`` be split along each of ``dims(*arguments)``.

    For each output and input: "rows" is split along that dim, "copy" is the same on every rank, "sum" has a summand on
    every rank, "other" is no tensor. ``outputs`` may depend on the arguments.
    """
    kinds: dict[str, Callable[[int], Placement | None]] = {
        ROWS: Shard,
        COPY: lambda dim: Replicate(),
        SUM: lambda dim: Partial(),
        OTHER: lambda dim: None,
    }

    def ways(*arguments: Any) -> list[Way]:
        results = outputs(*arguments) if callable(outputs) else outputs
        whole: Way = ([Replicate() for _ in results], [None if kind == OTHER else Replicate() for kind in inputs])
        split = [([kinds[k](dim) for k in results], [kinds[k](dim) for k in inputs]) for dim in dims(*arguments)]
        return [whole, *split]  # type: ignore[list-item]

    register_sharding(getattr(torch.ops.rung, operator).default)(ways)


def leading(x: Any, *_: Any) -> range:
    """Every dim of the first argument but the last."""
    return range(x.ndim - 1)


spread("rms_norm", [ROWS, ROWS], [ROWS, COPY, OTHER], leading)
spread("rms_norm_backward", [ROWS, SUM], [ROWS, ROWS, COPY, ROWS], leading)
spread("add_rms_norm", [ROWS, ROWS, ROWS], [ROWS, ROWS, COPY, OTHER], leading)


def _grads_of_sum(_: Any, __: Any, stream: Any, *others: Any) -> list[str]:
    """The second output has no element where dtypes are equal."""
    return [ROWS, COPY if others[-1] == stream.tensor_meta.dtype else ROWS, SUM]


spread("add_rms_norm_backward", _grads_of_sum, [ROWS, ROWS, ROWS, COPY, ROWS, OTHER], leading)
