"""What every optimizer here receives, keeps and promises."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rung.layout import LogicalTensor

__all__ = ["Events", "LocalParameter", "OptimConfig", "Optimizer", "Packed", "StateTensor", "acts_as_matrix"]


@dataclass
class OptimConfig:
    """Settings that every optimizer has."""

    name: str = ""
    """Which optimizer."""
    lr: float = 1e-3
    """Peak learning rate; the schedule scales it."""
    weight_decay: float = 0.1
    """Decoupled decay per step, times the learning rate; parameters of one dimension (norms) are never decayed."""

    def validate(self) -> list[str]:
        """Problems with these settings, each with the value and what is legal."""
        problems = []
        if not (math.isfinite(self.lr) and self.lr >= 0):
            problems.append(f"optim.lr={self.lr} must be a finite number, 0 or more")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            problems.append(f"optim.weight_decay={self.weight_decay} must be a finite number, 0 or more")
        return problems


def adam_problems(betas: list[float], eps: float) -> list[str]:
    """Problems with Adam's coefficients, which several optimizers share."""
    problems = []
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        problems.append(f"optim.betas={list(betas)} must be two numbers in [0, 1), as [0.9, 0.95]")
    if not (math.isfinite(eps) and eps > 0):
        problems.append(f"optim.eps={eps} must be a finite number above zero")
    return problems


def is_count(value: object, least: int) -> bool:
    """Whether a setting is an integer, ``least`` or more, that a device can count to."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def acts_as_matrix(name: str, ndim: int) -> bool:
    """Whether a parameter is a linear map as a whole: matrices are, except the embedding and the output head, whose
    rows are looked up or compared one by one."""
    parts = name.split(".")
    return ndim == 2 and "embed_tokens" not in parts and "lm_head" not in parts


@dataclass(eq=False)
class LocalParameter:
    """One trainable parameter as this rank holds it."""

    name: str
    """Logical name, as ``layers.0.mlp.up_proj.weight``."""
    local: Tensor
    """The rank's plain, contiguous tensor: storage shared with the model. May have no element at all."""
    logical: LogicalTensor
    """Global shape, and where the local elements sit in it."""
    group: dist.ProcessGroup | None = None
    """Ranks that together hold the whole tensor; None where this rank holds all of it."""

    @property
    def grad(self) -> Tensor | None:
        """Summed gradient of the local elements, same shape and dtype as ``local``. None counts as zero."""
        return self.local.grad

    def gradient(self) -> Tensor:
        """``grad``, contiguous; zeros where there is none.

        Zeros rather than "not updated": whether a tensor got a gradient may differ between ranks, its update may not.
        """
        return torch.zeros_like(self.local) if self.local.grad is None else self.local.grad.contiguous()

    def state(self, state_name: str, tensor: Tensor | Packed) -> tuple[str, StateTensor]:
        """Checkpoint entry of a state shaped and spread like the parameter."""
        name, tied = f"{self.name}/{state_name}", self._tied(state_name)
        logical = dataclasses.replace(self.logical, name=name, dtype=tensor.dtype, tied_to=tied)
        return name, StateTensor(tensor, logical)

    def scalar_state(self, state_name: str, tensor: Tensor) -> tuple[str, StateTensor]:
        """Checkpoint entry of a 0-dim state of which every rank that shares the parameter has a copy."""
        name, spread = f"{self.name}/{state_name}", self.logical._spread
        logical = LogicalTensor.from_spec(
            name,
            (),
            tensor.dtype,
            {},
            spread.sizes,
            spread.coordinates,
            stage=spread.stages,
            tied_to=self._tied(state_name),
        )
        return name, StateTensor(tensor, logical)

    def _tied(self, state_name: str) -> str | None:
        """The state of a parameter that is an alias is an alias of the other's."""
        return None if self.logical.tied_to is None else f"{self.logical.tied_to}/{state_name}"


class Packed(ABC):
    """State of which only some elements are stored, in the place of the local tensor that it stands for.

    Reading an index makes the local tensor anew, with zeros for what is not stored. A checkpoint is loaded into such a
    tensor, and stored from there when all other state is loaded.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, device

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that are stored."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The local tensor, new."""

    @abstractmethod
    def store(self, dense: Tensor) -> None:
        """Keep what there is room for of a local tensor, on any device; the rest must be zero."""

    @abstractmethod
    def zero_(self) -> None:
        """Make every element zero."""

    def __getitem__(self, place: tuple[slice, ...]) -> Tensor:
        return self.dense()[place]


class StateTensor(NamedTuple):
    """A live tensor of state (load by copying into it) and what it is logically."""

    tensor: Tensor | Packed
    logical: LogicalTensor


class Events(NamedTuple):
    """What an optimizer tells of its last step, on the device."""

    spikes: Tensor
    """int64 []: gradient elements that were clipped, each because of its own size; 0 where the step was skipped."""
    resets: Tensor
    """int64 []: 1 where moments were reset, else 0; the same on every rank."""
    of_whole_tensors: bool
    """Whether ``spikes`` counts all of the tensors that this rank has a part of, the same on the ranks that share them;
    otherwise what this rank owns. Elements of aliases count for nothing in either."""


class Optimizer(ABC):
    """Updates local parameters in place. State exists from construction on, so that loading is copying."""

    def __init__(self, parameters: Iterable[LocalParameter]) -> None:
        self.parameters = list(parameters)
        scattered = [p.name for p in self.parameters if not p.local.is_contiguous()]
        if scattered:  # fused kernels read storage in order, whatever the strides say
            raise RuntimeError(f"local tensors must be contiguous; these are not: {', '.join(scattered)}")

    @abstractmethod
    def step(self, lr: float, grad_scale: Tensor | None = None, skip: Tensor | None = None) -> None:
        """Update every parameter from its gradient divided by ``grad_scale``, at learning rate ``lr``.

        grad_scale, skip: 0-dim floating tensors on the parameters' device, equal on every rank. Where ``skip`` is 1.0,
        weights and state keep every bit, and gradients may be NaN; the host never learns. Gradients are used up: what
        they hold afterwards is undefined. Collective over the parameters' groups.
        """

    @abstractmethod
    def named_state(self) -> dict[str, StateTensor]:
        """All state, as ``parameter name/state name``. States of a sharded parameter are sharded like it."""

    def events(self) -> Events | None:
        """What happened in the last step, for optimizers that clip elements and reset moments."""
        return None

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters:
            parameter.local.grad = None
