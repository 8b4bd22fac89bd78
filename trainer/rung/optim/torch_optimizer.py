"""A ``torch.optim.Optimizer`` as the optimizer of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rung.optim.base import LocalParameter, Optimizer, Packed, StateTensor

__all__ = ["MOMENTS", "TorchOptimizer"]

MOMENTS = ("exp_avg", "exp_avg_sq")
"""States that are shaped and spread like their parameter. All others are scalars."""


class TorchOptimizer(Optimizer):
    """Runs an optimizer of torch over local tensors, by the protocol of ``torch.amp.GradScaler``: it divides gradients
    by ``grad_scale`` and changes nothing where ``found_inf`` is 1.0. State must be there from construction on."""

    def __init__(self, parameters: Iterable[LocalParameter], optimizer: torch.optim.Optimizer) -> None:
        super().__init__(parameters)
        self.inner = optimizer

    def step(self, lr: float, grad_scale: Tensor | None = None, skip: Tensor | None = None) -> None:
        for parameter in self.parameters:
            parameter.local.grad = parameter.gradient()
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.grad_scale, self.inner.found_inf = grad_scale, skip  # type: ignore[attr-defined]
        self.inner.step()

    def named_state(self) -> dict[str, StateTensor]:
        entries = {}
        for parameter in self.parameters:
            for name, tensor in self.state_of(parameter).items():
                if name in MOMENTS:
                    key, entry = parameter.state(name, tensor)
                else:
                    assert isinstance(tensor, Tensor), name
                    key, entry = parameter.scalar_state(name, tensor)
                entries[key] = entry
        return entries

    def state_of(self, parameter: LocalParameter) -> Mapping[str, Tensor | Packed]:
        """Live state by name."""
        state: Mapping[str, Tensor | Packed] = self.inner.state[parameter.local]
        return state
