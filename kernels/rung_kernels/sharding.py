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
import rung_kernels.attention
import rung_kernels.cross_entropy
import rung_kernels.grouped_mm
import rung_kernels.linear_cross_entropy
import rung_kernels.merge_lse
import rung_kernels.norm
import rung_kernels.permute
import rung_kernels.rope
import rung_kernels.router
import rung_kernels.swiglu  # noqa: F401

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
    every rank, "other" is no tensor, as is an input that was not given. ``outputs`` may depend on the arguments.
    """
    kinds: dict[str, Callable[[int], Placement | None]] = {
        ROWS: Shard,
        COPY: lambda dim: Replicate(),
        SUM: lambda dim: Partial(),
        OTHER: lambda dim: None,
    }

    def ways(*arguments: Any) -> list[Way]:
        results = outputs(*arguments) if callable(outputs) else outputs
        given = [OTHER if argument is None else kind for kind, argument in zip(inputs, arguments, strict=False)]
        whole: Way = ([Replicate() for _ in results], [None if kind == OTHER else Replicate() for kind in given])
        split = [([kinds[k](dim) for k in results], [kinds[k](dim) for k in given]) for dim in dims(*arguments)]
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


def _turned_heads(q: Any, k: Any, cos: Any, sin: Any) -> list[Way]:
    """Sequences and tokens are split with their tables, heads without; tables of batch 1 serve every sequence."""
    tables = {0: Replicate() if cos.shape[0] == 1 else Shard(0), 1: Shard(1), 2: Replicate()}
    split: list[Way] = [([Shard(dim)] * 2, [Shard(dim)] * 2 + [table] * 2) for dim, table in tables.items()]
    return [([Replicate()] * 2, [Replicate()] * 4), *split]


register_sharding([torch.ops.rung.rope.default, torch.ops.rung.rope_backward.default])(_turned_heads)


def every(x: Any, *_: Any) -> range:
    """Every dim of the first argument."""
    return range(x.ndim)


spread("swiglu", [ROWS], [ROWS, ROWS], every)
spread("swiglu_backward", [ROWS, ROWS], [ROWS, ROWS, ROWS], every)

spread("merge_lse", [ROWS] * 2, [ROWS] * 4, leading)
spread("merge_lse_backward", [ROWS] * 4, [ROWS] * 6, leading)

spread("router", [ROWS, ROWS, SUM, ROWS], [ROWS, COPY] + [OTHER] * 4, lambda *_: [0])
spread("router_backward", [ROWS], [ROWS] * 5 + [OTHER] * 3, lambda *_: [0])


def _grads_of_combined(_: Any, __: Any, ___: Any, weights: Any) -> list[str]:
    """The second output has no element where there are no weights."""
    return [ROWS, COPY if weights is None else SUM]


# Every rank needs all tokens to number their rows, but moves any part of the features.
spread("permute", [ROWS, COPY, COPY], [ROWS, COPY, OTHER], lambda *_: [1])
spread("permute_backward", [ROWS], [ROWS, COPY], lambda *_: [1])
spread("unpermute", [ROWS], [ROWS, COPY, COPY], lambda *_: [1])
spread("unpermute_backward", _grads_of_combined, [ROWS, ROWS, COPY, COPY], lambda *_: [1])


def _split_experts(*_: Any) -> list[Way]:
    """Each expert's weights are split by columns, or by rows along with the features of x; groups of rows stay whole,
    since the offsets count them."""
    whole: Way = ([Replicate()], [Replicate()] * 3)
    return [whole, ([Shard(1)], [Replicate(), Shard(2), Replicate()]), ([Partial()], [Shard(1), Shard(1), Replicate()])]


def _split_expert_grads(*_: Any) -> list[Way]:
    whole: Way = ([Replicate()] * 2, [Replicate()] * 4)
    columns: Way = ([Partial(), Shard(2)], [Shard(1), Replicate(), Shard(2), Replicate()])
    rows: Way = ([Shard(1), Shard(1)], [Replicate(), Shard(1), Shard(1), Replicate()])
    return [whole, columns, rows]


register_sharding(torch.ops.rung.grouped_mm.default)(_split_experts)
register_sharding(torch.ops.rung.grouped_mm_backward.default)(_split_expert_grads)


def first_dim(*_: Any) -> range:
    """The first dim."""
    return range(1)


spread("cross_entropy", [ROWS] * 3, [ROWS] * 2 + [OTHER] * 3, first_dim)
spread("cross_entropy_backward", [ROWS], [ROWS] * 5 + [OTHER] * 5, first_dim)


def _wanted(*arguments: Any) -> list[str]:
    """Gradients of x and of the weight have no element where they are not wanted, as the last two arguments say."""
    want_x, want_weight = arguments[-2:]
    return [ROWS if want_x else COPY, SUM if want_weight else COPY]


def _scaled_grads(_: Any, unit_x: Any, unit_weight: Any, *__: Any) -> list[Way]:
    grads = [Shard(0) if unit_x.ndim == 2 else Replicate(), Partial() if unit_weight.ndim == 2 else Replicate()]
    return [([Replicate()] * 2, [Replicate()] * 3 + [None]), (grads, [Replicate(), *grads, None])]


spread("linear_cross_entropy", [ROWS] * 3, [ROWS, COPY, ROWS] + [OTHER] * 4, first_dim)
spread("linear_cross_entropy_backward", _wanted, [ROWS, ROWS, COPY] + [ROWS] * 3 + [OTHER] * 6, first_dim)
spread("linear_cross_entropy_sum", lambda *a: [SUM, *_wanted(*a)], [ROWS, COPY, ROWS] + [OTHER] * 6, first_dim)
register_sharding(torch.ops.rung.linear_cross_entropy_sum_backward.default)(_scaled_grads)


def _placed_mask(mask: Any, dim: int) -> Placement | None:
    """The mask [B or 1, H or 1, T, S] beside queries [B, T, H, E] that are split along ``dim``; it may be missing."""
    if mask is None:
        return None
    at = {0: 0, 2: 1}[dim] - (4 - len(mask.shape))
    return Shard(at) if at >= 0 and mask.shape[at] > 1 else Replicate()


def _whole_groups(k: Any) -> tuple[int, ...]:
    """Dims to split: heads only if key/value heads divide evenly, or query heads would be parted from theirs."""
    return (0, 2) if all(k.shape[2] % size == 0 for size in k.mesh.shape) else (0,)


def _split_attention(q: Any, k: Any, v: Any, mask: Any, causal: bool) -> list[Way]:
    """Sequences, or heads along with the key/value heads that they read."""
    missing = None if mask is None else Replicate()
    whole: Way = ([Replicate()] * 2, [*[Replicate()] * 3, missing, None])
    split: list[Way] = [([Shard(d)] * 2, [*[Shard(d)] * 3, _placed_mask(mask, d), None]) for d in _whole_groups(k)]
    return [whole, *split]


def _split_attention_grads(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, mask: Any, causal: bool) -> list[Way]:
    missing = None if mask is None else Replicate()
    whole: Way = ([Replicate()] * 3, [*[Replicate()] * 6, missing, None])
    split: list[Way] = [([Shard(d)] * 3, [*[Shard(d)] * 6, _placed_mask(mask, d), None]) for d in _whole_groups(k)]
    return [whole, *split]


register_sharding(torch.ops.rung.attention_with_lse.default)(_split_attention)
register_sharding(torch.ops.rung.attention_with_lse_backward.default)(_split_attention_grads)
