"""Sums over logical gradients: what several ranks have of an element is added, and every element is counted once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rung.optim import LocalParameter
from rung.parallel.tensor import PartialGradient

__all__ = ["Partial", "add_partial_gradients", "squared_norm"]


class Partial(NamedTuple):
    """A parameter of this rank, and how its gradient is spread as summands over tp."""

    parameter: LocalParameter
    spread: PartialGradient

    def gradients(self) -> list[Tensor]:
        """What is to be summed: views of the gradient."""
        gradient, first_row = self.parameter.grad, self.spread.first_row
        if gradient is None or first_row == 0:
            return [] if gradient is None else [gradient]
        return [gradient[place] for box, place, _ in self.parameter.logical.pieces() if box.offsets[0] >= first_row]


def add_partial_gradients(partial: Sequence[Partial], group: dist.ProcessGroup) -> None:
    """Sum each gradient over the ranks that hold the same part: one all-reduce for each dtype, in place.

    Parts of which there are several along the group travel side by side in one buffer, each rank filling its own: more
    bytes than a group per part would need, for K/V heads only and once a step, but no further process groups.
    """
    size, rank = group.size(), group.rank()
    by_dtype: dict[torch.dtype, list[tuple[Tensor, int]]] = {}
    for one in partial:
        for gradient in one.gradients():
            if gradient.numel():  # the ranks that share it have as much
                by_dtype.setdefault(gradient.dtype, []).append((gradient, one.spread.replicas))
    for dtype, gradients in by_dtype.items():
        sizes = [gradient.numel() * (size // replicas) for gradient, replicas in gradients]
        buffer = torch.zeros(sum(sizes), dtype=dtype, device=gradients[0][0].device)
        mine = [
            part.view(size // replicas, -1)[rank // replicas]
            for (_, replicas), part in zip(gradients, buffer.split(sizes), strict=True)
        ]
        originals = [gradient.reshape(-1) for gradient, _ in gradients]
        torch._foreach_copy_(mine, originals)
        dist.all_reduce(buffer, group=group)
        for (gradient, _), total in zip(gradients, mine, strict=True):
            gradient.copy_(total.view(gradient.shape))


def squared_norm(parameters: Sequence[LocalParameter], device: torch.device) -> Tensor:
    """Σ g² over the elements that this rank owns, 0-dim float64 on ``device``. Add over ranks for the whole."""
    whole, parts = [], []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        pieces = list(parameter.logical.pieces())
        if len(pieces) == 1 and pieces[0][2] and pieces[0][0].numel == parameter.grad.numel():
            whole.append(parameter.grad)
        else:
            parts += [parameter.grad[place] for box, place, owned in pieces if owned and box.numel]
    gradients = [g for g in whole + parts if g.numel()]
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(gradients, 2.0, dtype=torch.promote_types(gradients[0].dtype, torch.float32))
    return torch.stack(norms).double().square().sum()
