"""SPAM: Adam that clips spikes by the second moment and resets its moments (Huang et al., arXiv 2501.06842)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rung_kernels
from rung.config import choice_problem
from rung.optim.base import LocalParameter, OptimConfig, Packed, acts_as_matrix, adam_problems, is_count
from rung.optim.logical_optimizer import (
    LogicalOptimizer,
    Member,
    RunOptimizer,
    factors,
    flat_state,
    learning_rate,
    number,
)
from rung.optim.sparse import PackedMoment, Subset, kept_elements
from rung.optim.torch_optimizer import MOMENTS
from rung.random import Key, name_key
from rung_kernels.reference import Factor

__all__ = ["SPAM", "SpamConfig", "spam_for_run"]


@dataclass
class SpamConfig(OptimConfig):
    """SPAM: Adam that clips spikes of gradients and resets its moments (arXiv 2501.06842)."""

    name: str = "spam"
    """Which optimizer."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the first and the second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment, which is not corrected for its bias."""
    spike_threshold: float = 5000.0
    """A gradient element is clipped where its square exceeds this times its second moment; 0 never clips."""
    reset_interval: int = 500
    """Steps between resets of the moments."""
    warmup_steps: int = 150
    """Steps after a reset in which the learning rate rises again, from a hundredth."""
    grace_steps: int = 20
    """Steps after a reset, and at the start, in which nothing is clipped."""
    density: float = 1.0
    """Part of the elements of hidden matrices that is updated between two resets; others keep their value, and memory
    for moments shrinks with it. Embeddings, output head and vectors are updated wholly."""

    def validate(self) -> list[str]:
        """Problems with these settings."""
        return [
            *choice_problem("optim.name", self.name, ("spam",)),
            *super().validate(),
            *adam_problems(self.betas, self.eps),
            *(f"optim.{problem}" for problem in _problems(vars(self))),
        ]


class SPAM(LogicalOptimizer):
    """SPAM (Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", arXiv 2501.06842).

    In step k of a parameter group (k = 1, 2, …), with c = k mod reset_interval, for every element by itself::

        m, v = 0                                             if c = 0
        g = sign(g)·√(spike_threshold·v)                     if c >= grace_steps and g² > spike_threshold·v and v > 0
        m = β1·m + (1-β1)·g;   v = β2·v + (1-β2)·g²
        w = w - lr·scale(k)·√(1-β2^k)/(1-β1^k)·m/(√v + eps)
        w = w - lr·weight_decay·w

    with scale(k) = 1 - 0.99·(1 + cos(π·c/(warmup_steps + 1)))/2 for k >= reset_interval and c < warmup_steps, else 1.
    The bias correction is that of step k and not of the steps since the reset: updates grow to 2.7 times Adam's in the
    steps after a reset, and are 1.9 times Adam's on average, with the settings below and a constant gradient.

    Elementwise, so without communication, and with the same bits on every sharding.

    With density < 1 only a random subset of each tensor's elements is updated or decayed, and has moments; each reset
    draws another one (see ``rung.optim.sparse``). Moments of a subset are no tensors in ``state``; ``state_dict`` holds
    them with zeros for all other elements.

    It departs from the released code where that is at odds with itself or the paper:
      - An element whose v is 0 has no spikes. There its gradient is clipped to 0 and it stays until the next reset.
      - Weight decay acts with density < 1, too. There it decays a copy.
      - All tensors of a group share one counter, moments are reset whether or not a tensor has a gradient in that step,
        and the counter and all settings are in ``state_dict``.
      - Subsets are drawn element by element, from the first one on, and depend on seed and name alone.
      - Moments of bfloat16 and float16 parameters are float32.

    Args:
        params: parameters, pairs of name and parameter, groups of them, or ``LocalParameter`` s. Plain tensors and
            DTensors of any sharding, float64, float32, bfloat16 or float16, on the CPU or CUDA. Subsets are drawn by
            name; without names, tensors are called param.0, param.1 and so on.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to √v, which is not corrected for its bias.
        weight_decay: decoupled; per step, times lr but not times scale.
        spike_threshold: see above; 0 never clips.
        reset_interval: steps between resets.
        warmup_steps: of scale, after each reset but not at the start.
        grace_steps: steps without clipping at the start and after each reset.
        density: in (0, 1].
        seed: of the subsets.

    Raises:
        ValueError: a setting, a parameter or a gradient is none that this can work with.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        spike_threshold: float = 5000.0,
        reset_interval: int = 500,
        warmup_steps: int = 150,
        grace_steps: int = 20,
        density: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._subsets: dict[Tensor, list[Subset]] = {}
        self._runs: dict[Tensor, list[tuple[int, int, bool]]] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "spike_threshold": spike_threshold,
            "reset_interval": reset_interval,
            "warmup_steps": warmup_steps,
            "grace_steps": grace_steps,
            "density": density,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def problems(self, group: Any) -> list[str]:
        return super().problems(group) + _problems(group, skip="reset_interval")

    def make_state(self, group: dict[str, Any]) -> None:
        density = group["density"]
        for tensor in group["params"]:
            member, subsets = self._members[tensor], self._subsets.get(tensor, [])
            if tensor not in self._runs:
                self._runs[tensor] = _runs(member, member.local)
            if density == 1:
                self._subsets.pop(tensor, None)
                continue
            for name in MOMENTS:
                self.state[tensor].pop(name, None)
            if tensor not in self._subsets or any(subset.density != density for subset in subsets):
                dtype = torch.promote_types(tensor.dtype, torch.float32)
                places = [(first, last) for first, last, _ in self._runs[tensor]]
                self._subsets[tensor] = [Subset(*place, density, dtype, tensor.device) for place in places]
        if density == 1:
            super().make_state(group)

    def live_state(self, tensor: Tensor) -> dict[str, Tensor | Packed]:
        state = super().live_state(tensor)
        if tensor in self._subsets:
            member, subsets = self._members[tensor], self._subsets[tensor]
            group = next(g for g in self.param_groups if any(t is tensor for t in g["params"]))
            how = member.logical, member.local, _key(group, member), member.steps, group["reset_interval"]
            state["exp_avg"] = PackedMoment("exp_avg", subsets, *how)
            state["exp_avg_sq"] = PackedMoment("exp_avg_sq", subsets, *how)
        return state

    def update(self, scale: Tensor | None, skip: Tensor | None) -> None:
        spikes, resets = [], []
        for group in self.param_groups:
            for steps, members in self.members(group):
                f, reset = _factors(group, steps, scale, skip)
                spikes.append(self._update(group, steps, members, f, reset))
                resets.append(reset)
                steps += (f[Factor.SKIP] <= 0).long()
        if spikes:
            device = spikes[0].device
            self.spikes = torch.stack([x.to(device) for x in spikes]).sum()
            self.resets = torch.stack([x.to(device) for x in resets]).amax().long()

    def _update(
        self, group: dict[str, Any], steps: Tensor, members: Sequence[Member], f: Tensor, reset: Tensor
    ) -> Tensor:
        """Update the members of a group on one device; the number of spikes among what this rank owns."""
        dense: list[tuple[bool, tuple[Tensor, Tensor, Tensor, Tensor]]] = []
        scattered: list[tuple[Tensor, Tensor]] = []
        spikes = torch.zeros((), dtype=torch.int64, device=steps.device)
        for member in members:
            gradient, subsets = member.gradient(), self._subsets.get(member.tensor)
            state = self.state[member.tensor]
            if gradient is None:
                moments = (
                    [x for subset in subsets for x in (subset.exp_avg, subset.exp_avg_sq)]
                    if subsets is not None
                    else [flat_state(state[name]) for name in ("exp_avg", "exp_avg_sq")]
                )
                for moment in moments:
                    moment.masked_fill_(reset, 0.0)
                continue
            local = member.local
            param, grad = local.reshape(-1), gradient.reshape(-1).contiguous()
            if not local.is_contiguous():
                scattered.append((local, param))
            if subsets is not None:
                spikes += self._update_subsets(group, steps, member, subsets, param, grad, f)
                continue
            tensors = (param, grad, flat_state(state["exp_avg"]), flat_state(state["exp_avg_sq"]))
            for first, last, owned in self._runs[member.tensor]:
                dense.append((owned, tuple(x[first:last] for x in tensors)))  # type: ignore[arg-type]
        dense.sort(key=lambda run: not run[0])  # what is counted, first
        if dense:
            counts = torch.zeros(len(dense), dtype=torch.int64, device=steps.device)
            params, grads, exp_avgs, exp_avg_sqs = zip(*(tensors for _, tensors in dense), strict=True)
            rung_kernels.spam_step(params, grads, exp_avgs, exp_avg_sqs, f, counts=counts)
            spikes += counts[: sum(owned for owned, _ in dense)].sum()
        for local, param in scattered:
            local.copy_(param.view(local.shape))
        return spikes

    def _update_subsets(
        self,
        group: dict[str, Any],
        steps: Tensor,
        member: Member,
        subsets: Sequence[Subset],
        param: Tensor,
        grad: Tensor,
        f: Tensor,
    ) -> Tensor:
        """``_update`` of one tensor with density < 1; ``param`` and ``grad`` are all its local elements, flat."""
        epoch = (steps + 1) // group["reset_interval"]
        spikes = torch.zeros((), dtype=torch.int64, device=steps.device)
        if not subsets:
            return spikes
        density = subsets[0].density
        kept = kept_elements(_key(group, member), epoch, density, member.logical, member.local.shape).view(-1)
        for subset, (first, last, owned) in zip(subsets, self._runs[member.tensor], strict=True):
            places, some = subset.places(kept)
            here = param[first:last]
            new = here[places]
            old_first = new[:1].clone()
            gradient = torch.where(some, grad[first:last][places], 0.0)
            count = torch.zeros(1, dtype=torch.int64, device=steps.device)
            rung_kernels.spam_step([new], [gradient], [subset.exp_avg], [subset.exp_avg_sq], f, counts=count)
            # Several places may be the first: all of them must say what becomes of it.
            here.index_copy_(0, places, torch.where(some, new, torch.where(some[:1], new[:1], old_first)))
            if owned:
                spikes += count[0]
        return spikes


def spam_for_run(parameters: Sequence[LocalParameter], config: SpamConfig, seed: int) -> RunOptimizer:
    """SPAM as the optimizer of a run: vectors are not decayed, and density is that of hidden matrices."""
    found: dict[tuple[float, float], list[LocalParameter]] = {}
    for p in parameters:
        decay = config.weight_decay if len(p.logical.shape) >= 2 else 0.0
        density = config.density if acts_as_matrix(p.name, len(p.logical.shape)) else 1.0
        found.setdefault((decay, density), []).append(p)
    groups = [
        {"params": members, "weight_decay": decay, "density": density} for (decay, density), members in found.items()
    ]
    optimizer = SPAM(
        groups or [{"params": []}],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        spike_threshold=config.spike_threshold,
        reset_interval=config.reset_interval,
        warmup_steps=config.warmup_steps,
        grace_steps=config.grace_steps,
        seed=seed,
    )
    return RunOptimizer(list(parameters), optimizer, of_whole_tensors=False)


def _problems(settings: Any, skip: str = "") -> list[str]:
    """What is wrong with the settings that only SPAM has, of a group or a config."""
    problems = []
    threshold, density = settings["spike_threshold"], settings["density"]
    if not threshold >= 0:
        problems.append(f"spike_threshold={threshold} must be 0 (never clip) or more; 5000 is usual")
    for name, least in (("reset_interval", 1), ("warmup_steps", 0), ("grace_steps", 0)):
        value = settings[name]
        if name != skip and not is_count(value, least):
            problems.append(f"{name}={value} must be an integer, {least} or more, below 2^63")
    if not 0 < density <= 1:
        problems.append(f"density={density} must lie in (0, 1]; 1 updates every element")
    return problems


def _factors(group: dict[str, Any], steps: Tensor, scale: Tensor | None, skip: Tensor | None) -> tuple[Tensor, Tensor]:
    """What ``spam_step`` reads in the step after ``steps``, and whether it resets moments: bool []."""
    device = steps.device
    beta1, beta2 = group["betas"]
    k = steps + 1
    c = k % group["reset_interval"]
    rise = 1 - 0.99 * (1 + torch.cos(math.pi * c.double() / (group["warmup_steps"] + 1))) / 2
    ramp = torch.where((k >= group["reset_interval"]) & (c < group["warmup_steps"]), rise, 1.0)
    lr = learning_rate(group, device)
    correction = (1 - beta2 ** k.double()).sqrt() / (1 - beta1 ** k.double())
    threshold = number(group["spike_threshold"] or math.inf, device)
    values = {
        Factor.GRAD_SCALE: 1.0 if scale is None else scale,
        Factor.SKIP: 0.0 if skip is None else skip,
        Factor.RESET: (c == 0).double(),
        Factor.THRESHOLD: torch.where(c >= group["grace_steps"], threshold, math.inf),
        Factor.BETA1: beta1,
        Factor.COMPLEMENT1: 1 - beta1,
        Factor.BETA2: beta2,
        Factor.COMPLEMENT2: 1 - beta2,
        Factor.STEP_SIZE: lr * ramp * correction,
        Factor.DIVISOR: 1.0,
        Factor.EPS: group["eps"],
        Factor.DECAY: 1 - lr * group["weight_decay"],
    }
    f = factors(device, values)
    return f, (c == 0) & (f[Factor.SKIP] <= 0)


def _key(group: dict[str, Any], member: Member) -> Key:
    return name_key(group["seed"], f"spam/{member.name}")


def _runs(member: Member, local: Tensor) -> list[tuple[int, int, bool]]:
    """The local elements as runs [first, last), each owned by this rank or not; one where all are alike."""
    pieces = [piece for piece in member.logical.pieces() if piece.box.numel]
    number = sum(piece.box.numel for piece in pieces if piece.owned)
    if not local.numel():
        return []
    if number in (0, local.numel()):
        return [(0, local.numel(), number > 0)]
    owned = np.zeros(local.shape, bool)
    for piece in pieces:
        if piece.owned:
            owned[piece.local] = True
    cuts = [0, *(np.flatnonzero(np.diff(owned.reshape(-1))) + 1).tolist(), local.numel()]
    return [(first, last, bool(owned.reshape(-1)[first])) for first, last in pairwise(cuts)]
