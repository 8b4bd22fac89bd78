"""Give a spread model its storage and its start: every rank draws only the boxes it holds, from the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rung.layout import Box, local_view
from rung.parallel.spread import SpreadModel
from rung.random import name_key, normals_box

__all__ = ["initialize"]

SLAB_ELEMENTS = 2**24


@torch.no_grad()
def initialize(model: SpreadModel, device: torch.device, seed: int) -> None:
    """Give ``model``, spread on the meta device, storage on ``device`` and values by its ``init_rules()``.

    Element i of a logical tensor is number i of the stream (seed, name), so the bits depend on neither the layout nor
    the order of parameters. Products are made in float64 and rounded once to the parameter's dtype.
    """
    model.materialize(device)
    rules = model.parts[0].init_rules()
    logical = model.logical_tensors()
    for name, parameter in model.named_parameters():
        local = local_view(parameter)
        source = logical[name].source
        rule = rules[source]
        if rule.kind == "ones":
            local.fill_(1.0)
            continue
        assert rule.kind == "normal", f"no initialiser {rule.kind!r} for {name}"
        key = name_key(seed, f"init/{source}")
        for box, place, _owned in logical[name].pieces():
            for part in _slabs(box):
                values = torch.from_numpy(normals_box(key, logical[name].shape, part) * rule.std)
                local[place][part.within(box).slices()] = values.view(part.sizes).to(local.dtype)


def _slabs(box: Box) -> Iterator[Box]:
    """The box in slabs of rows, so that the float64 numbers of a large matrix never exist all at once."""
    if not box.numel:
        return
    rows = max(1, SLAB_ELEMENTS * box.sizes[0] // box.numel)
    for first in range(0, box.sizes[0], rows):
        size = min(rows, box.sizes[0] - first)
        yield Box((box.offsets[0] + first, *box.offsets[1:]), (size, *box.sizes[1:]))
