"""The training loop, on one page. Everything that is not the mathematics of a step is a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rung.checkpoint import Checkpointer
from rung.data import DataSource
from rung.layout import Layout
from rung.loop.config import EvalConfig, TrainConfig
from rung.loop.evaluate import evaluate
from rung.loop.monitor import Monitor
from rung.loop.step import Progress, StepReader, forward_backward
from rung.objectives import Objective
from rung.optim import LocalParameter, Optimizer
from rung.parallel import SpreadModel, World, all_reduce_sums, squared_norm

__all__ = ["Outcome", "Stateful", "Training", "train"]


class Stateful(Protocol):
    """Something of a recipe's that a checkpoint must hold. Small, and the same on every rank and every layout."""

    def state(self) -> Any:
        """What JSON can hold."""

    def load(self, state: Any) -> None:
        """Go on from what ``state`` returned."""


@dataclass
class Training:
    """Everything a loop needs, put together by a recipe."""

    world: World
    layout: Layout
    model: SpreadModel
    objective: Objective
    parameters: list[LocalParameter]
    optimizer: Optimizer
    learning_rate: Callable[[int], float]
    source: DataSource
    monitor: Monitor
    settings: TrainConfig
    evaluation: EvalConfig
    start: Progress = field(default_factory=Progress)
    """Where a checkpoint that was loaded left off."""
    checkpoints: Checkpointer | None = None
    """None: nothing is saved."""
    recipe_state: Mapping[str, Stateful] = field(default_factory=dict)
    """By name, what checkpoints hold of the recipe."""

    def progress(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of how far the run is after ``step``."""
        after = self.start.after(step, self.settings.global_batch_size)
        known = {"step": after.step, "consumed_samples": after.consumed_samples, **self.monitor.state(step)}
        recipe = {name: part.state() for name, part in self.recipe_state.items()}
        return known | ({"recipe": recipe} if recipe else {})


@dataclass(frozen=True)
class Outcome:
    """How a loop ended: completed or stopped by a signal, after which step, with which last evaluation."""

    state: str
    step: int
    evaluation: dict[str, float]


def train(run: Training) -> Outcome:
    """Run optimizer steps until ``settings.steps`` are done; collective, the same control flow on every rank."""
    settings, monitor, device = run.settings, run.monitor, run.world.device
    reader = StepReader(run.source, run.layout, run.world.rank, run.objective, settings, device, run.start)
    results: dict[str, float] = {}
    first, last = run.start.step + 1, max(settings.steps, run.start.step)
    run.model.train()
    for step in range(first, last + 1):
        monitor.begin(step)
        with monitor.clock("data"):
            batch = reader.read(step, stop=monitor.stop_requested)
        if batch.stop:
            return Outcome("stopped", step - 1, results)
        with monitor.clock("forward_backward"):
            number = torch.full((), step, device=device)  # filled there: a copy from the host would make it wait
            sums = forward_backward(run.model, run.objective, batch, number)
        if run.checkpoints is not None:
            with monitor.clock("checkpoint"):
                run.checkpoints.join()  # the update must not meet the copy of what it changes
                monitor.saved(run.checkpoints)
        with monitor.clock("optimizer"):
            lr = run.learning_rate(step)
            loss, norm, skipped = update(run, sums, batch.counts, lr)
            events = optimizer_events(run)
        monitor.end(step, batch, lr, loss, norm, skipped, events)
        if step == first:
            run.world.set_timeout(settings.timeout_seconds)
        if batches := run.evaluation.due(step, settings.steps):
            with monitor.clock("evaluation"):
                results = _evaluate(run, batches)
            monitor.evaluated(step, results)
        if run.checkpoints is not None and run.checkpoints.due(step) and step < last:
            with monitor.clock("checkpoint"):
                run.checkpoints.save(run.progress(step))
    return Outcome("completed", last, results)


def update(run: Training, sums: dict[str, Tensor], counts: dict[str, int], lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step from summed gradients; returns (loss, gradient norm before clipping, 1.0 where skipped).

    All three are 0-dim float64 on the device and equal on every rank, so that ranks agree on clipping and on skipping a
    step with a non-finite loss or gradient without asking the host.
    """
    run.model.finish_gradients(run.parameters)
    totals = all_reduce_sums({**sums, "norm²": squared_norm(run.parameters, run.world.device)}, run.world.device)
    norm = totals.pop("norm²").sqrt()
    loss = torch.stack([run.objective.weights[k] / max(counts[k], 1) * total for k, total in totals.items()]).sum()
    skipped = (~(torch.isfinite(norm) & torch.isfinite(loss))).double()
    clip = run.settings.clip_grad_norm
    scale = torch.where(skipped > 0, 1.0, (norm / clip).clamp(min=1.0)) if clip else None
    run.optimizer.step(lr, grad_scale=scale, skip=skipped)
    run.model.zero_grad()
    run.optimizer.zero_grad()
    return loss, norm, skipped


def optimizer_events(run: Training) -> dict[str, Tensor]:
    """What the optimizer tells of its last step: ``spikes``, over the whole model, and ``optimizer_resets``, int64 [].

    Collective over the world where the optimizer counts what each rank owns, over pipeline stages otherwise; nothing is
    sent for optimizers without events.
    """
    events = run.optimizer.events()
    if events is None:
        return {}
    spikes = events.spikes.to(run.world.device).clone()
    if events.of_whole_tensors:
        group = run.model.groups.group("pp")
        if group is not None:
            dist.all_reduce(spikes, group=group)
    else:
        spikes = all_reduce_sums({"spikes": spikes}, run.world.device)["spikes"]
    return {"spikes": spikes, "optimizer_resets": events.resets.to(run.world.device)}


def _evaluate(run: Training, batches: float) -> dict[str, float]:
    """Evaluate on ``batches`` global batches of held-out windows; infinity takes all."""
    return evaluate(
        run.model,
        run.objective,
        run.source,
        run.layout,
        run.world.rank,
        micro_batch_size=run.settings.micro_batch_size,
        max_windows=batches * run.settings.global_batch_size,
        device=run.world.device,
    )
