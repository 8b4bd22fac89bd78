"""Muon: momentum, orthogonalised per logical matrix (Keller Jordan, https://kellerjordan.github.io/posts/muon/)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rung.config import choice_problem
from rung.optim.adamw import AdamW
from rung.optim.base import LocalParameter, OptimConfig, Optimizer, StateTensor, acts_as_matrix, adam_problems
from rung.optim.exchange import MatrixExchange
from rung.optim.newton_schulz import orthogonalize

__all__ = ["Muon", "MuonConfig", "is_hidden_matrix"]


@dataclass
class MuonConfig(OptimConfig):
    """Muon for hidden matrices, AdamW for embeddings, output head and vectors."""

    name: str = "muon"
    """Which optimizer."""
    momentum: float = 0.95
    """Decay rate of the average of gradients."""
    nesterov: bool = True
    """Look ahead: blend the newest gradient into the average once more before orthogonalising."""
    ns_steps: int = 5
    """Newton–Schulz steps."""
    adjust_lr: str = "match_rms_adamw"
    """What scales an update: match_rms_adamw, 0.2·√max(rows, columns), gives it AdamW's usual size, so that AdamW's
    learning rates and decay carry over (arXiv 2502.16982); original is √max(1, rows/columns)."""
    adamw_lr: float | None = None
    """Peak learning rate of what AdamW updates; follows the same schedule. Unset: lr."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay rates of the first and the second moment."""
    eps: float = 1e-8
    """AdamW's addition to the root of the second moment."""

    def validate(self) -> list[str]:
        """Problems with these settings."""
        problems = choice_problem("optim.name", self.name, ("muon",)) + super().validate()
        if not 0 <= self.momentum < 1:
            problems.append(f"optim.momentum={self.momentum} must lie in [0, 1)")
        if not 1 <= self.ns_steps <= 100:
            problems.append(f"optim.ns_steps={self.ns_steps} must lie in [1, 100]; 5 is usual")
        problems += choice_problem("optim.adjust_lr", self.adjust_lr, ("match_rms_adamw", "original"))
        if self.adamw_lr is not None and not (math.isfinite(self.adamw_lr) and self.adamw_lr >= 0 and self.lr > 0):
            problems.append(
                f"optim.adamw_lr={self.adamw_lr} must be a finite number, 0 or more, beside an optim.lr above zero"
            )
        return problems + adam_problems(self.betas, self.eps)


def is_hidden_matrix(parameter: LocalParameter) -> bool:
    """Whether Muon updates this parameter."""
    return acts_as_matrix(parameter.name, len(parameter.logical.shape))


class Muon(Optimizer):
    """Momentum is elementwise and stays sharded; each logical matrix is then orthogonalised whole, by one rank.

    Per step and process group two all-to-alls, none for matrices that are whole here. The iteration runs in bfloat16 on
    CUDA, in float32 on the CPU, in float64 on float64 parameters. Given the same gradients and CPU threads per rank,
    results have the same bits on every sharding: everything elementwise is written as separate products and sums, since
    a fused multiply-add is rounded otherwise in a vectorised loop than at its ragged end, and matrix products have the
    same sizes whatever a rank owns (see orthogonalize).
    """

    def __init__(self, parameters: Iterable[LocalParameter], config: MuonConfig) -> None:
        """Collective over the parameters' groups."""
        super().__init__(parameters)
        by_group: dict[object, list[LocalParameter]] = {}
        for parameter in filter(is_hidden_matrix, self.parameters):
            by_group.setdefault((parameter.group, parameter.local.dtype, parameter.local.device), []).append(parameter)
        self._spreads = [_Matrices(members, config) for members in by_group.values()]
        self._adamw = AdamW(
            [p for p in self.parameters if not is_hidden_matrix(p)],
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self._adamw_ratio = 1.0 if config.adamw_lr is None else config.adamw_lr / config.lr

    def step(self, lr: float, grad_scale: Tensor | None = None, skip: Tensor | None = None) -> None:
        for matrices in self._spreads:
            matrices.step(lr, grad_scale, skip)
        self._adamw.step(lr * self._adamw_ratio, grad_scale, skip)

    def named_state(self) -> dict[str, StateTensor]:
        entries = self._adamw.named_state()
        for matrices in self._spreads:
            entries.update(matrices.named_state())
        return entries


class _Matrices:
    """The hidden matrices that are spread over one process group: momentum and gradients as one flat vector each."""

    def __init__(self, parameters: Sequence[LocalParameter], config: MuonConfig) -> None:
        self._config = config
        self._exchange = MatrixExchange(parameters)
        self._parameters = self._exchange.parameters
        example = self._parameters[0].local
        self._momentum = example.new_zeros(sum(p.local.numel() for p in self._parameters))
        if example.device.type == "cuda" and example.dtype != torch.float64:
            self._dtype = torch.bfloat16
        else:
            self._dtype = torch.promote_types(example.dtype, torch.float32)
        self._by_factor: dict[float, list[int]] = {}
        for index, parameter in enumerate(self._parameters):
            if parameter.local.numel():
                factor = _lr_factor(config.adjust_lr, *parameter.logical.shape)
                self._by_factor.setdefault(factor, []).append(index)

    def named_state(self) -> dict[str, StateTensor]:
        parts = zip(self._parameters, self._exchange.split(self._momentum), strict=True)
        return dict(parameter.state("momentum_buffer", part) for parameter, part in parts)

    @torch.no_grad()
    def step(self, lr: float, grad_scale: Tensor | None, skip: Tensor | None) -> None:
        skip = None if skip is None else skip > 0
        direction = self._direction(grad_scale, skip).to(self._dtype)
        matrices = orthogonalize(self._exchange.to_owners(direction), self._config.ns_steps)
        update = self._exchange.to_holders(matrices, like=direction).to(self._momentum.dtype)
        if skip is not None:
            update.masked_fill_(skip, 0.0)
        self._apply(self._exchange.split(update), lr, skip)

    def _direction(self, grad_scale: Tensor | None, skip: Tensor | None) -> Tensor:
        """Advance the momentum; returns what is to be orthogonalised."""
        momentum = self._config.momentum
        gradient = torch.cat([p.gradient().view(-1) for p in self._parameters])
        if grad_scale is not None:
            gradient /= grad_scale
        gradient *= 1 - momentum
        average = (self._momentum * momentum).add_(gradient)
        if skip is None:
            self._momentum.copy_(average)
        else:
            torch.where(skip, self._momentum, average, out=self._momentum)
        if not self._config.nesterov:
            return average
        # (1 - μ)·gradient + μ·average, with the factor (1 - μ) already in `gradient`
        return gradient.add_(average.mul_(momentum))

    def _apply(self, updates: Sequence[Tensor], lr: float, skip: Tensor | None) -> None:
        decay: float | Tensor = 1 - lr * self._config.weight_decay
        if skip is not None:
            decay = (1 - lr * self._config.weight_decay * (~skip).double()).to(self._momentum.dtype)
        for factor, indices in self._by_factor.items():
            locals_ = [self._parameters[i].local for i in indices]
            changes = [updates[i] for i in indices]
            # A skipped update is +0 and becomes -0 here; adding -0 keeps every bit, adding +0 would turn -0 into +0.
            torch._foreach_mul_(changes, -lr * factor)
            torch._foreach_mul_(locals_, decay)
            torch._foreach_add_(locals_, changes)


def _lr_factor(rule: str, rows: int, columns: int) -> float:
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
