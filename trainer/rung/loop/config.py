"""Settings of a run, its steps and its evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rung.config import positive_problems

__all__ = ["EvalConfig", "RunConfig", "TrainConfig"]


@dataclass
class RunConfig:
    """Where a run lives and what makes its draws."""

    name: str = "default"
    """Names the run in loggers, and its folder unless run.dir is given."""
    dir: str = "runs/${run.name}"
    """Everything a run writes is below this folder."""
    seed: int = 0
    """Seed of the start, the order of samples and every draw."""
    resume: str = "auto"
    """auto: continue from the newest checkpoint in checkpoint.dir that can be read, if there is one; never: start over,
    and move what is there aside; or a checkpoint, the folder of checkpoints or the run to begin from, which counts as
    long as this run has no checkpoint of its own."""
    allow_changes: list[str] = field(default_factory=list)
    """Keys that may differ from the run that run.dir already holds, as [data.seq_len, model.*]."""

    def validate(self) -> list[str]:
        """Problems with these settings."""
        problems = [] if self.resume.strip() else ["run.resume is empty; it is auto, never or a path"]
        if not 0 <= self.seed < 2**63:
            problems.append(f"run.seed={self.seed} must lie in [0, 2**63)")
        return problems


@dataclass
class TrainConfig:
    """Sizes of a step in sequences; gradient accumulation is derived from them and the layout."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    global_batch_size: int = 16
    """Sequences per step over all ranks."""
    micro_batch_size: int = 8
    """Sequences per forward pass on each data rank; 0 takes a rank's whole share of the global batch or, with a
    pipeline, the largest part of it that leaves a micro-batch for each pipeline rank."""
    clip_grad_norm: float = 1.0
    """Gradients are scaled down to this Euclidean norm; 0 turns clipping off."""
    deterministic: bool = False
    """Use deterministic kernels only (torch.use_deterministic_algorithms), also where slower."""
    max_skipped_steps: int = 5
    """Consecutive steps with a non-finite loss or gradient after which the run stops as failed."""
    first_timeout_seconds: float = 1800.0
    """Bound on collectives until the first step is done, and again after the last: compilation, communicators and
    writing the weights take their time."""
    timeout_seconds: float = 300.0
    """Bound on collectives in between."""

    def validate(self) -> list[str]:
        """Problems with these settings."""
        problems = positive_problems(
            train__steps=self.steps,
            train__global_batch_size=self.global_batch_size,
            train__max_skipped_steps=self.max_skipped_steps,
            train__first_timeout_seconds=self.first_timeout_seconds,
            train__timeout_seconds=self.timeout_seconds,
        )
        if self.micro_batch_size < 0:
            problems.append(f"train.micro_batch_size={self.micro_batch_size} must be 0 (a rank's whole share) or more")
        if not (self.clip_grad_norm >= 0 and math.isfinite(self.clip_grad_norm)):
            problems.append(f"train.clip_grad_norm={self.clip_grad_norm} must be a finite number, 0 (off) or more")
        return problems


@dataclass
class EvalConfig:
    """Evaluation on the held-out split, inside the run; the same number on every layout."""

    interval: int = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    batches: int = 0
    """Global batches of held-out sequences per evaluation, evenly spread over the split; 0 takes the whole split, its
    short last window included."""
    final_batches: int = 0
    """The same for the evaluation after the last step."""

    def due(self, step: int, last_step: int) -> float:
        """Global batches to evaluate on after ``step``; 0 when no evaluation is due, infinity for the whole split."""
        if step == last_step:
            return self.final_batches or math.inf
        if self.interval and step % self.interval == 0:
            return self.batches or math.inf
        return 0

    def validate(self) -> list[str]:
        """Problems with these settings."""
        return [
            f"eval.{name}={value} must be 0 or more"
            for name in ("interval", "batches", "final_batches")
            if (value := getattr(self, name)) < 0
        ]
