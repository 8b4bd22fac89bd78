"""Sums and counts travel between ranks in one message."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_reduce_sums"]


def all_reduce_sums(sums: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Sum each 0-dim tensor over all ranks: one float64 all-reduce on ``device``, exact for counts below 2**53."""
    if not sums:
        return {}
    packed = torch.stack([value.detach().to(device=device, dtype=torch.float64) for value in sums.values()])
    if dist.get_world_size() > 1:
        dist.all_reduce(packed)
    return dict(zip(sums, packed.unbind(), strict=True))
