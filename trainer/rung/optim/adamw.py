"""AdamW: torch's fused kernels over local shards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import rung_kernels
from rung.config import choice_problem
from rung.optim.base import LocalParameter, OptimConfig, adam_problems
from rung.optim.logical_optimizer import factors
from rung.optim.torch_optimizer import TorchOptimizer
from rung_kernels.dispatch import uses_triton
from rung_kernels.reference import Factor

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
    """``torch.optim.AdamW(fused=True)``, or ``rung_kernels.adamw_step`` where kernels are to run; weight decay acts on
    tensors of two and more logical dimensions only.

    Elementwise, so no communication. torch's CPU kernel rounds the last few elements of a tensor otherwise than its
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
        if uses_triton("adamw_step", *(parameter.local for parameter in self.parameters)):
            self._kernel_step(lr, grad_scale, skip)
            return
        if grad_scale is not None and not self._kernel_scales:
            gradients = [parameter.gradient() for parameter in self.parameters]
            torch._foreach_div_(gradients, grad_scale)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.local.grad = gradient
            grad_scale = None
        super().step(lr, None if grad_scale is None else grad_scale.float(), None if skip is None else skip.float())

    def _kernel_step(self, lr: float, grad_scale: Tensor | None, skip: Tensor | None) -> None:
        """``step`` by one launch for each parameter group."""
        gradients = {parameter.local: parameter.gradient() for parameter in self.parameters}
        for group in self.inner.param_groups:
            params = group["params"]
            if not params:
                continue
            states = [self.inner.state[p] for p in params]
            steps = [state["step"] for state in states]
            done = steps[0].double() + 1
            beta1, beta2 = group["betas"]
            values = {
                Factor.GRAD_SCALE: 1.0 if grad_scale is None else grad_scale,
                Factor.SKIP: 0.0 if skip is None else skip,
                Factor.BETA1: beta1,
                Factor.COMPLEMENT1: 1 - beta1,
                Factor.BETA2: beta2,
                Factor.COMPLEMENT2: 1 - beta2,
                Factor.STEP_SIZE: lr / (1 - beta1**done),
                Factor.DIVISOR: (1 - beta2**done).sqrt(),
                Factor.EPS: group["eps"],
                Factor.DECAY: 1 - lr * group["weight_decay"],
            }
            rung_kernels.adamw_step(
                params,
                [gradients[p] for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                factors(params[0].device, values),
            )
            torch._foreach_add_(steps, 1.0 if skip is None else 1 - skip.float())
