"""Parameters as each rank holds them, and sums over logical gradients: every element counted exactly once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rung.layout import clean_name, local_view, logical_tensors
from rung.optim import LocalParameter

__all__ = ["attach_gradients", "local_parameters", "squared_norm"]


def local_parameters(model: nn.Module) -> list[LocalParameter]:
    """What the optimizer updates: this rank's part of each trainable parameter, plain tensors on its storage."""
    logical = logical_tensors(model)
    found = []
    for raw_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = clean_name(raw_name)
        group = None
        if isinstance(parameter, DTensor):
            sharded = [axis for axis, place in enumerate(parameter.placements) if not place.is_replicate()]
            assert len(sharded) <= 1, f"{name} is sharded over {len(sharded)} mesh axes"
            if sharded and parameter.device_mesh.size(sharded[0]) > 1:
                group = parameter.device_mesh.get_group(sharded[0])
        found.append(LocalParameter(name, local_view(parameter).detach(), logical[name], group))
    return found


def attach_gradients(model: nn.Module, parameters: Sequence[LocalParameter]) -> None:
    """Point every local parameter's ``grad`` at the local part of its model parameter's gradient."""
    trainable = (parameter for parameter in model.parameters() if parameter.requires_grad)
    for parameter, local in zip(trainable, parameters, strict=True):
        local.local.grad = None if parameter.grad is None else local_view(parameter.grad)


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
