"""Stable-SPAM: Adam over gradients clipped and scaled by their own history (Huang et al., arXiv 2502.17055)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import rung_kernels
from rung.config import choice_problem
from rung.layout import Piece
from rung.optim.base import LocalParameter, OptimConfig, adam_problems, is_count
from rung.optim.exact_sum import LIMBS, exponent_above, power_of_two, square_limbs, to_float
from rung.optim.logical_optimizer import (
    LogicalOptimizer,
    Member,
    RunOptimizer,
    factors,
    flat_state,
    learning_rate,
    number,
    rows_at_once,
)
from rung_kernels.reference import Factor

__all__ = ["StableSPAM", "StableSpamConfig", "stable_spam_for_run"]


@dataclass
class StableSpamConfig(OptimConfig):
    """Stable-SPAM: Adam over gradients clipped and scaled by their own history (arXiv 2502.17055)."""

    name: str = "stable_spam"
    """Which optimizer."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the first and the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment, and to the average norm that gradients are divided by."""
    gamma1: float = 0.7
    """Decay rate of the average norm of a tensor's gradient."""
    gamma2: float = 0.9
    """Decay rate of the average squared norm."""
    gamma3: float = 0.999
    """Decay rate of the average largest element, above which elements are scaled down."""
    reset_interval: int = 1000
    """Steps between resets of the moments."""
    total_steps: int | None = None
    """Steps over which the first beta and gamma1 fall, along half a cosine, to eta_min times what they are. Unset:
    they stay."""
    eta_min: float = 0.5
    """See total_steps."""

    def validate(self) -> list[str]:
        """Problems with these settings."""
        return [
            *choice_problem("optim.name", self.name, ("stable_spam",)),
            *super().validate(),
            *adam_problems(self.betas, self.eps),
            *(f"optim.{problem}" for problem in _problems(vars(self))),
        ]


class StableSPAM(LogicalOptimizer):
    """Stable-SPAM (Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", arXiv 2502.17055).

    In step t of a parameter group (t = 1, 2, …), for each logical tensor with gradient g; M, a and b are numbers, s
    counts the steps from the last reset on, that of the reset being the first::

        w = w - lr·weight_decay·w
        M = γ3·M + (1-γ3)·max|g|;   M̂ = M/(1-γ3^t)
        g = g/max|g|·M̂                                           where |g| > M̂                          (AdaClip)
        n = ‖g‖₂;   a = γ1q·a + (1-γ1q)·n;   b = γ2·b + (1-γ2)·n²
        g = g/n · (a/(1-(γ1q)^t)) / (√(b/(1-γ2^t)) + eps)                                               (AdaGN)
        m, v = 0                                                 if t mod reset_interval = 0
        m = β1q·m + (1-β1q)·g;   v = β2·v + (1-β2)·g²
        w = w - lr·(m/(1-(β1q)^s))/(√(v/(1-β2^s)) + eps)

    with q = eta_min + (1-eta_min)·(1 + cos(π·min(t, T+1)/(T+1)))/2 for T = total_steps, 1 where that is None.

    A step communicates twice, whatever the number of tensors and groups: max|g| of all tensors, then ‖g‖₂² of all. The
    sum of squares is exact up to a rounding of each square (see ``rung.optim.exact_sum``), so that the same gradients
    give the same bits on every sharding. This holds for tensors that are spread over the same ranks; each further mesh
    has two messages of its own, or two for each of its dims if it is smaller than the world.

    It departs from the released code where that is at odds with itself or the paper:
      - Moments are reset before the gradient of that step enters them. There the step of a reset updates and uses the
        old moments, which are then lost with its gradient.
      - M, a and b are corrected for their bias by all their steps. There the count starts over at each reset while the
        averages do not, which turns AdaClip off for hundreds of steps and shrinks AdaGN's gradients at first.
      - q stays at eta_min after total_steps. There it rises again.
      - All settings, the averages and the counter are in ``state_dict``. There total_steps is not.
      - A tensor is the logical tensor, of which a rank may have a part; a fused projection is one.
      - Moments of bfloat16 and float16 parameters are float32, the averages float64.

    Making one is collective over the ranks that tensors are spread over, which must hold them in the same order.

    Args:
        params: parameters, pairs of name and parameter, groups of them, or ``LocalParameter`` s. Plain tensors and
            DTensors of any sharding, float64, float32, bfloat16 or float16, on the CPU or CUDA.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to √v̂ and to √b̂.
        weight_decay: decoupled; per step, times lr.
        gamma1: decay rate of a. The released code's -1 means betas[0]; say that instead.
        gamma2: decay rate of b.
        gamma3: decay rate of M.
        reset_interval: steps between resets.
        total_steps: T; None leaves betas[0] and gamma1 as they are.
        eta_min: what they are multiplied by at the end.

    Raises:
        ValueError: a setting, a parameter or a gradient is none that this can work with.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        gamma3: float = 0.999,
        reset_interval: int = 1000,
        total_steps: int | None = None,
        eta_min: float = 0.5,
    ) -> None:
        self._counted: dict[Tensor, list[Piece]] = {}
        self._averages: dict[int, Tensor] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "gamma1": gamma1,
            "gamma2": gamma2,
            "gamma3": gamma3,
            "reset_interval": reset_interval,
            "total_steps": total_steps,
            "eta_min": eta_min,
        }
        super().__init__(params, defaults)

    def problems(self, group: Any) -> list[str]:
        return super().problems(group) + _problems(group, skip="reset_interval")

    def make_state(self, group: dict[str, Any]) -> None:
        super().make_state(group)
        for steps, members in self.members(group):
            if members[0].tensor in self._counted:
                continue
            averages = torch.zeros(len(_AVERAGES), len(members), dtype=torch.float64, device=steps.device)
            self._averages[id(steps)] = averages
            for index, member in enumerate(members):
                self.state[member.tensor] |= {name: averages[i, index] for i, name in enumerate(_AVERAGES)}
            self._counted |= _counted(members)

    def update(self, scale: Tensor | None, skip: Tensor | None) -> None:
        parts = [
            _Part(group, steps, members, self._averages[id(steps)], scale, skip)
            for group in self.param_groups
            for steps, members in self.members(group)
        ]
        everyone = [member for part in parts for member in part.members]
        rows = iter(_all_reduce(everyone, [row for part in parts for row in part.largest(self._counted)], "max"))
        for part in parts:
            part.set_levels(torch.stack([next(rows) for _ in part.members]))
        rows = iter(_all_reduce(everyone, [row for part in parts for row in part.sums(self._counted)], "sum"))
        for part in parts:
            part.set_gains(torch.stack([next(rows) for _ in part.members]))
            part.step([self.state[member.tensor] for member in part.members])
        if parts:
            device = parts[0].steps.device
            self.spikes = torch.stack([part.spikes.to(device) for part in parts]).sum()
            self.resets = torch.stack([part.reset.to(device) for part in parts]).amax().long()


_AVERAGES = ("average_max", "average_norm", "average_square")
"""States M, a and b."""


class _Part:
    """One step of the members of a parameter group that are on one device."""

    def __init__(
        self,
        group: dict[str, Any],
        steps: Tensor,
        members: list[Member],
        averages: Tensor,
        scale: Tensor | None,
        skip: Tensor | None,
    ) -> None:
        self._group, self.steps, self.members, self._averages = group, steps, members, averages
        device = steps.device
        self._device = device
        self._scale = number(1.0 if scale is None else scale, device)
        self._skip = number(0.0 if skip is None else skip, device) > 0
        self._gradients = [member.gradient() for member in members]
        self._t = (steps + 1).double()
        self._q = number(1.0, device)
        if group["total_steps"] is not None:
            period, least = group["total_steps"] + 1, group["eta_min"]
            self._q = least + (1 - least) * (1 + torch.cos(math.pi * self._t.clamp(max=period) / period)) / 2
        self.reset = ((steps + 1) % group["reset_interval"] == 0) & ~self._skip

    def largest(self, counted: dict[Tensor, list[Piece]]) -> Iterator[Tensor]:
        """Per member max|g| of what this rank counts, float64 []; -1 where there is no gradient."""
        for member, gradient in zip(self.members, self._gradients, strict=True):
            if gradient is None:
                yield number(-1.0, self._device)
                continue
            pieces = [gradient[piece.local] for piece in counted[member.tensor]]
            found = [torch.linalg.vector_norm(piece, math.inf) for piece in pieces]
            most = torch.stack(found).amax() if found else torch.zeros((), device=self._device)
            yield (most.to(_work(member)) / self._scale.to(_work(member))).double()

    def set_levels(self, largest: Tensor) -> None:
        """Advance M by max|g| of whole tensors, float64 [members]; what is above M̂ will be clipped."""
        gamma3 = self._group["gamma3"]
        self._present = (largest >= 0) & ~self._skip
        self._largest = largest.clamp(min=0)
        average = self._averages[0] * gamma3 + self._largest * (1 - gamma3)
        self._averages[0] = torch.where(self._present, average, self._averages[0])
        self._levels = average / (1 - gamma3**self._t)
        self._exponents = exponent_above(self._largest)
        self._inverses = power_of_two(-self._exponents)

    def sums(self, counted: dict[Tensor, list[Piece]]) -> Iterator[Tensor]:
        """Per member Σ g² of what this rank counts, after clipping, and the number of clipped elements: int64
        [LIMBS + 1]."""
        for index, (member, gradient) in enumerate(zip(self.members, self._gradients, strict=True)):
            spikes = torch.zeros((), dtype=torch.int64, device=self._device)
            parts: list[Tensor] = []
            if gradient is not None:
                parts = [part for piece in counted[member.tensor] for part in _rows(gradient[piece.local])]
            clipped = (self._clip(index, part, spikes) for part in parts)
            limbs = square_limbs(clipped, self._inverses[index], self._device)
            yield torch.cat([limbs, spikes[None]])

    def _clip(self, index: int, gradient: Tensor, spikes: Tensor) -> Tensor:
        """Part of a member's gradient as ``adamw_step`` will clip it; counts what is clipped, unless in an alias."""
        member = self.members[index]
        numbers = (self._scale, self._levels[index], self._largest[index])
        scale, level, largest = (number.to(_work(member)) for number in numbers)
        g = gradient.to(_work(member)) / scale
        above = g.abs() > level
        if member.logical.tied_to is None:
            spikes += above.sum()
        return torch.where(above, g / largest * level, g)

    def set_gains(self, sums: Tensor) -> None:
        """Advance a and b by Σ g² of whole tensors, and take note of their spikes: int64 [members, LIMBS + 1]."""
        gamma1, gamma2 = self._group["gamma1"] * self._q, self._group["gamma2"]
        self.spikes = torch.where(self._skip, 0, sums[:, LIMBS].sum())
        norm = to_float(sums[:, :LIMBS]).sqrt() * power_of_two(self._exponents)
        average = self._averages[1] * gamma1 + norm * (1 - gamma1)
        square = self._averages[2] * gamma2 + norm * norm * (1 - gamma2)
        for index, value in ((1, average), (2, square)):
            self._averages[index] = torch.where(self._present, value, self._averages[index])
        wanted = average / (1 - gamma1**self._t)
        usual = (square / (1 - gamma2**self._t)).sqrt() + self._group["eps"]
        self._gains = torch.where(norm > 0, wanted / usual / norm, 1.0)

    def step(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Update the members and their moments, and count the step."""
        chosen: list[int] = []
        tensors: list[tuple[Tensor, ...]] = []
        scattered: list[tuple[Tensor, Tensor]] = []
        for index, (member, gradient, state) in enumerate(zip(self.members, self._gradients, states, strict=True)):
            moments = flat_state(state["exp_avg"]), flat_state(state["exp_avg_sq"])
            if gradient is None:
                for moment in moments:
                    moment.masked_fill_(self.reset, 0.0)
                continue
            local = member.local
            param = local.reshape(-1)
            if not local.is_contiguous():
                scattered.append((local, param))
            chosen.append(index)
            tensors.append((param, gradient.reshape(-1).contiguous(), *moments))
        if tensors:
            options = {"levels": self._levels, "maxima": self._largest, "gains": self._gains}
            if len(chosen) < len(self.members):
                options = {name: torch.stack([x[i] for i in chosen]) for name, x in options.items()}
            params, grads, exp_avgs, exp_avg_sqs = zip(*tensors, strict=True)
            rung_kernels.adamw_step(params, grads, exp_avgs, exp_avg_sqs, self._factors(), **options)
        for local, param in scattered:
            local.copy_(param.view(local.shape))
        self.steps += (~self._skip).long()

    def _factors(self) -> Tensor:
        """What ``adamw_step`` reads."""
        group, t = self._group, self.steps + 1
        beta1, beta2 = group["betas"][0] * self._q, group["betas"][1]
        interval = group["reset_interval"]
        s = torch.where(t < interval, t, t % interval + 1).double()
        lr = learning_rate(group, self._device)
        values = {
            Factor.GRAD_SCALE: self._scale,
            Factor.SKIP: self._skip,
            Factor.RESET: (t % interval == 0).double(),
            Factor.BETA1: beta1,
            Factor.COMPLEMENT1: 1 - beta1,
            Factor.BETA2: beta2,
            Factor.COMPLEMENT2: 1 - beta2,
            Factor.STEP_SIZE: lr / (1 - beta1**s),
            Factor.DIVISOR: (1 - beta2**s).sqrt(),
            Factor.EPS: group["eps"],
            Factor.DECAY: 1 - lr * group["weight_decay"],
        }
        return factors(self._device, values)


def stable_spam_for_run(parameters: Sequence[LocalParameter], config: StableSpamConfig) -> RunOptimizer:
    """Stable-SPAM as the optimizer of a run: vectors are not decayed. Collective over the parameters' groups."""
    found: dict[float, list[LocalParameter]] = {}
    for p in parameters:
        found.setdefault(config.weight_decay if len(p.logical.shape) >= 2 else 0.0, []).append(p)
    groups = [{"params": members, "weight_decay": decay} for decay, members in found.items()]
    optimizer = StableSPAM(
        groups or [{"params": []}],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        gamma1=config.gamma1,
        gamma2=config.gamma2,
        gamma3=config.gamma3,
        reset_interval=config.reset_interval,
        total_steps=config.total_steps,
        eta_min=config.eta_min,
    )
    return RunOptimizer(list(parameters), optimizer, of_whole_tensors=True)


def _problems(settings: Any, skip: str = "") -> list[str]:
    """What is wrong with the settings that only Stable-SPAM has, of a group or a config."""
    problems = []
    for name in ("gamma1", "gamma2", "gamma3"):
        hint = "; the released code's -1 stands for the first beta: say that" if settings[name] == -1 else ""
        if not 0 <= settings[name] < 1:
            problems.append(f"{name}={settings[name]} must lie in [0, 1){hint}")
    for name, optional in (("reset_interval", False), ("total_steps", True)):
        value = settings[name]
        if name == skip or (optional and value is None):
            continue
        if not is_count(value, 1):
            problems.append(f"{name}={value} must be an integer, 1 or more, below 2^63{'; or None' * optional}")
    if not 0 <= settings["eta_min"] <= 1:
        problems.append(f"eta_min={settings['eta_min']} must lie in [0, 1]")
    return problems


def _work(member: Member) -> torch.dtype:
    """What arithmetic on a member is done in."""
    return torch.promote_types(member.tensor.dtype, torch.float32)


def _rows(tensor: Tensor) -> Sequence[Tensor]:
    """Parts of a tensor small enough to work on."""
    return tensor.split(rows_at_once(tensor)) if tensor.dim() else [tensor]


def _all_reduce(members: Sequence[Member], rows: list[Tensor], operation: str) -> list[Tensor]:
    """Combine each member's row over the ranks that it is spread over; one message for all that share these ranks."""
    routes: dict[Any, list[int]] = {}
    for index, member in enumerate(members):
        if member.groups:
            routes.setdefault((member.groups, member.tensor.device), []).append(index)
    for (groups, _), indices in routes.items():
        packed = torch.stack([rows[index] for index in indices])
        for group in groups:
            dist.all_reduce(packed, dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM, group=group)
        for index, row in zip(indices, packed.unbind(), strict=True):
            rows[index] = row
    return rows


def _counted(members: Sequence[Member]) -> dict[Tensor, list[Piece]]:
    """What of each member this rank counts: of the ranks that hold an element, the first. Collective.

    Not what it owns: of copies that are updated side by side, by groups of ranks that need not talk, one owns all.
    """
    counted: dict[Tensor, list[Piece]] = {}
    routes: dict[tuple[dist.ProcessGroup, ...], list[Member]] = {}
    for member in members:
        routes.setdefault(member.groups, []).append(member)
    for groups, along in routes.items():
        everyone = [[(m.name, m.logical.shape, m.logical.boxes) for m in along]]
        place = 0
        for group in groups:
            gathered: list[Any] = [None] * group.size()
            dist.all_gather_object(gathered, everyone, group=group)
            place += dist.get_rank(group) * len(everyone)
            everyone = [rank for ranks in gathered for rank in ranks]
        order = [[(name, shape) for name, shape, _ in rank] for rank in everyone]
        if any(names != order[0] for names in order):
            raise ValueError(f"ranks must hold the same parameters in the same order: {order[0]} against {order}")
        for index, member in enumerate(along):
            boxes = {box: rank for rank in range(len(everyone) - 1, -1, -1) for box in everyone[rank][index][2]}
            number_held, number_there = sum(box.numel for box in boxes), math.prod(member.logical.shape)
            if number_held != number_there:
                raise ValueError(
                    f"{member.name}: the ranks of its group hold {number_held} of {number_there} elements; "
                    "they must hold each, and copies only of whole parts"
                )
            counted[member.tensor] = [
                piece for piece in member.logical.pieces() if piece.box.numel and boxes[piece.box] == place
            ]
    return counted
