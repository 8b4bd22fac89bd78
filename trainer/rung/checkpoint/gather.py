"""Whole tensors out of a spread model, one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rung.layout import clean_name

__all__ = ["gathered_tensors"]


@torch.no_grad()
def gathered_tensors(model: nn.Module, *, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield (logical name, whole tensor on the CPU) for every parameter; ties once, under their first name.

    Collective: every rank must exhaust the iterator. Only ranks with ``keep`` receive the values; on the others the
    tensors are empty. At most one gathered tensor is alive at a time.
    """
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        yield clean_name(name), whole.detach().cpu() if keep else torch.empty(0)
