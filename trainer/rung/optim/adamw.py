"""AdamW: torch's fused kernels over local shards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rung.config import choice_problem
from rung.optim.base import LocalParameter, OptimConfig, adam_problems
from rung.optim.torch_optimizer import TorchOptimizer

__all__ = ["AdamW", "AdamWConfig"]


@dataclass
class AdamWConfig(OptimConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101)."""

    name: str = "adamw"
    """Which optimizer."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the first and the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def validate(self) -> list[str]:
        """Problems with these settings."""
        return [
            *choice_problem("optim.name", self.name, ("adamw",)),
            *super().validate(),
            *adam_problems(self.betas, self.eps),
        ]


class AdamW(TorchOptimizer):
    """``torch.optim.AdamW(fused=True)``; weight decay acts on tensors of two and more logical dimensions only.

    Elementwise, so no communication. The CPU kernel rounds the last few elements of a tensor otherwise than its
    vectorised body, hence shardings may differ by one unit in the last place of float32.
    """

    def __init__(
        self,
        parameters: Iterable[LocalParameter],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        parameters = list(parameters)
        decayed = [p.local for p in parameters if len(p.logical.shape) >= 2]
        others = [p.local for p in parameters if len(p.logical.shape) < 2]
        groups = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
        super().__init__(parameters, optimizer)
        for parameter in self.parameters:  # torch would create this at the first step: too late to load into
            optimizer.state[parameter.local] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.local.device),
                "exp_avg": torch.zeros_like(parameter.local),
                "exp_avg_sq": torch.zeros_like(parameter.local),
            }
        # The kernels read grad_scale as float32, and some round it to the parameter's dtype: good for float32 only.
        self._kernel_scales = all(p.local.dtype == torch.float32 for p in self.parameters)

    @torch.no_grad()
    def step(self, lr: float, grad_scale: Tensor | None = None, skip: Tensor | None = None) -> None:
        if not self.parameters:
            return
        if grad_scale is not None and not self._kernel_scales:
            gradients = [parameter.gradient() for parameter in self.parameters]
            torch._foreach_div_(gradients, grad_scale)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.local.grad = gradient
            grad_scale = None
        super().step(lr, None if grad_scale is None else grad_scale.float(), None if skip is None else skip.float())
