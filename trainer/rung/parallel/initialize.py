"""Give a spread model its storage and its start: every rank draws only the boxes it holds, from the same numbers."""

from __future__ import annotations

import torch
from torch import nn

from rung.layout import clean_name, local_view, logical_tensors
from rung.random import name_key, normals_box

__all__ = ["initialize"]


@torch.no_grad()
def initialize(model: nn.Module, device: torch.device, seed: int) -> None:
    """Give ``model``, built on the meta device, storage on ``device`` and values by ``model.init_rules()``.

    Element i of a logical tensor is number i of the stream (seed, name), so the bits depend on neither the layout nor
    the order of parameters. Products are made in float64 and rounded once to the parameter's dtype.
    """
    model.to_empty(device=device)
    model.tie_weights()  # type: ignore[operator]  # to_empty gives tied names storage of their own
    rules = model.init_rules()  # type: ignore[operator]
    logical = logical_tensors(model)
    for raw_name, parameter in model.named_parameters():
        name = clean_name(raw_name)
        local = local_view(parameter)
        rule = rules[name]
        if rule.kind == "ones":
            local.fill_(1.0)
            continue
        assert rule.kind == "normal", f"no initialiser {rule.kind!r} for {name}"
        key = name_key(seed, f"init/{name}")
        for box, place, _owned in logical[name].pieces():
            if box.numel:
                values = torch.from_numpy(normals_box(key, logical[name].shape, box) * rule.std)
                local[place].copy_(values.view(box.sizes))
