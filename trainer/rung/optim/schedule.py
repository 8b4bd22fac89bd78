"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rung.config import choice_problem

__all__ = ["ScheduleConfig", "lr_at"]

NAMES = ("cosine", "wsd", "linear", "constant")


@dataclass
class ScheduleConfig:
    """Linear warm-up to the peak, then what ``name`` says, down to min_lr_ratio at the very last step."""

    name: str = "cosine"
    """cosine: half a cosine. wsd: warm up, stay, decay (arXiv 2404.06395). linear: a straight line. constant: stay."""
    warmup_steps: int = 0
    """The first so many steps climb to the peak in equal stairs; the first step already learns."""
    min_lr_ratio: float = 0.1
    """Learning rate of the last step over the peak; not with constant."""
    decay_steps: int | None = None
    """wsd only: the last so many steps decay. Unset: decay_fraction of the run."""
    decay_fraction: float = 0.2
    """wsd only, where decay_steps is unset: part of the run that decays."""
    decay_shape: str = "linear"
    """wsd only: linear, or sqrt, one minus the square root of progress (arXiv 2405.18392)."""

    def num_decay_steps(self, total_steps: int) -> int:
        """Steps of a wsd run that decay."""
        return round(self.decay_fraction * total_steps) if self.decay_steps is None else self.decay_steps

    def validate(self, total_steps: int | None = None) -> list[str]:
        """Problems with these settings, also against the length of the run where it is given."""
        problems = choice_problem("schedule.name", self.name, NAMES)
        problems += choice_problem("schedule.decay_shape", self.decay_shape, ("linear", "sqrt"))
        if self.warmup_steps < 0:
            problems.append(f"schedule.warmup_steps={self.warmup_steps} must be 0 or more")
        if self.decay_steps is not None and self.decay_steps < 0:
            problems.append(f"schedule.decay_steps={self.decay_steps} must be 0 or more")
        for key in ("min_lr_ratio", "decay_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                problems.append(f"schedule.{key}={getattr(self, key)} must lie in [0, 1]")
        unused = [] if self.name == "wsd" else ["decay_steps", "decay_fraction", "decay_shape"]
        unused += ["min_lr_ratio"] if self.name == "constant" else []
        for key in unused:
            if getattr(self, key) != getattr(ScheduleConfig, key):
                problems.append(f"schedule.{key}={getattr(self, key)} has no effect on schedule={self.name}; remove it")
        if total_steps is not None and not problems:
            problems += self._length_problems(total_steps)
        return problems

    def _length_problems(self, total_steps: int) -> list[str]:
        decay = self.num_decay_steps(total_steps) if self.name == "wsd" else 0
        if self.warmup_steps + decay <= total_steps:
            return []
        parts = f"schedule.warmup_steps={self.warmup_steps}" + (f" and {decay} steps of decay" if decay else "")
        return [f"{parts} do not fit into train.steps={total_steps}; lower them, or train longer"]


def lr_at(config: ScheduleConfig, step: int, total_steps: int, lr: float) -> float:
    """Learning rate of ``step`` (1-based) of a run of ``total_steps`` with peak ``lr``; a pure function.

    Step ``warmup_steps`` has exactly ``lr``, the last step exactly ``lr * min_lr_ratio``, as has every step after it.
    """
    if step <= config.warmup_steps:
        return lr * (step / config.warmup_steps)
    if config.name == "constant":
        return lr
    decay = total_steps - config.warmup_steps if config.name != "wsd" else config.num_decay_steps(total_steps)
    past = step - (total_steps - decay)
    if past <= 0:
        return lr
    progress = past / decay if past < decay else 1.0
    if config.name == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.name == "wsd" and config.decay_shape == "sqrt":
        height = 1 - math.sqrt(progress)
    else:
        height = 1 - progress
    return lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * height)
