"""Everything around the mathematics of a step: time, metrics, the console, signals, the heartbeat, the profiler."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rung.loop.step import StepBatch, samples_digest
from rung.observe import (
    GarbageCollector,
    GarbageConfig,
    Heartbeat,
    HeartbeatConfig,
    LoggingConfig,
    MemoryConfig,
    MemorySettings,
    MetricsLog,
    ProfileConfig,
    Profiler,
    Progress,
    RankLost,
    StepMetrics,
    StopSignals,
    Stopwatch,
    explain_out_of_memory,
    memory_gib,
    model_flops_utilization,
    write_status,
)

if TYPE_CHECKING:
    from rung.checkpoint import Checkpointer
    from rung.parallel import World

__all__ = ["Monitor", "MonitorConfig", "RunFacts"]


@dataclass
class MonitorConfig:
    """Settings of what watches a run."""

    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    heartbeat: HeartbeatConfig = field(default_factory=HeartbeatConfig)
    garbage: GarbageConfig = field(default_factory=GarbageConfig)


@dataclass(frozen=True)
class RunFacts:
    """What a monitor must know of a run to say how fast it is and what it is."""

    run_dir: str
    total_steps: int
    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None
    memory: MemorySettings
    max_skipped_steps: int
    gzip_bits_per_byte: float | None
    """What gzip -9 needs for the held-out text: stands beside every evaluation."""
    title: str
    lines: Mapping[str, str]
    settings: Mapping[str, object]


class _Pending(NamedTuple):
    """A step whose numbers may still be on their way from the device."""

    step: int
    digest: str
    lr: float
    numbers: Tensor
    """loss, gradient norm, skipped, events; on the host once ``ready`` has passed."""
    ready: torch.cuda.Event | None
    seconds: float
    phases: dict[str, float]
    extra: dict[str, float]
    events: tuple[str, ...]
    """Names of the events."""


class Monitor:
    """Watches a run from its first step to its end; a context manager around the loop.

    On CUDA a step's numbers are copied to the host without waiting and written when the *next* step has been queued, so
    that looking at a run never makes the device wait; on CPU they are written at once.
    """

    def __init__(self, config: MonitorConfig, world: World, facts: RunFacts) -> None:
        self._world, self._facts = world, facts
        self._stack = ExitStack()
        self._step = 0
        self._skipped = self._skipped_in_a_row = 0
        self._pending: _Pending | None = None
        self._extra: dict[str, float] = {}
        self._first_tokens = 0
        self.clock = Stopwatch()
        self._signals = StopSignals(rank=world.rank)
        self._heartbeat = Heartbeat.start(config.heartbeat, self._lost)
        self._profiler = Profiler(config.profile, facts.run_dir, world.rank)
        self._garbage = GarbageCollector(config.garbage)
        self._metrics = MetricsLog(facts.run_dir, config.logging, world.is_main, run_settings=facts.settings)
        self._progress = Progress(config.logging.console, facts.total_steps, world.is_main)
        self._memory = explain_out_of_memory(config.memory, facts.memory, facts.run_dir, world.rank)

    def __enter__(self) -> Monitor:
        self._status("running")
        self._progress.header(self._facts.title, self._facts.lines)
        self._stack.callback(self._metrics.close)
        for part in (self._signals, self._heartbeat, self._progress, self._garbage, self._profiler, self._memory):
            self._stack.enter_context(part)
        self.clock.lap()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.__exit__(kind, error, trace)
        except BaseException as better:  # the heartbeat names the ranks that died
            error = better
            raise
        finally:
            if isinstance(error, RankLost):  # rank 0 may be the one that is gone: whoever is left says so
                write_status(self._facts.run_dir, "failed", self._step, str(error))
            elif error is not None:
                self._status("failed", f"{type(error).__name__}: {error}")

    @property
    def stop_requested(self) -> bool:
        """This rank received a signal to stop."""
        return self._signals.requested != 0

    def start(self, step: int, state: Mapping[str, Any], *, keep_metrics: bool = True) -> None:
        """The run goes on after ``step``, where ``state`` was saved: metrics of later steps are written again."""
        self._step = step
        self._metrics.truncate_to(step if keep_metrics else 0)
        self._skipped = state.get("skipped_steps", 0)
        self._skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self._first_tokens = state.get("consumed_tokens", 0) - step * self._facts.tokens_per_step
        self._status("running")

    def state(self, step: int) -> dict[str, int]:
        """What ``start`` needs to go on after ``step``, the last one done. Waits for its numbers."""
        self._write()
        return {
            "skipped_steps": self._skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "consumed_tokens": self._first_tokens + step * self._facts.tokens_per_step,
        }

    def begin(self, step: int) -> None:
        """A step starts."""
        self._step = step
        self._heartbeat.at(step)
        self._profiler.before(step)

    def end(
        self,
        step: int,
        batch: StepBatch,
        lr: float,
        loss: Tensor,
        norm: Tensor,
        skipped: Tensor,
        events: Mapping[str, Tensor],
    ) -> None:
        """A step is queued; its numbers are 0-dim tensors. ``events``: what the optimizer counted in it, by name.

        Raises FloatingPointError after too many steps in a row were skipped.
        """
        numbers, ready = torch.stack([loss, norm, skipped, *(count.double() for count in events.values())]), None
        on_device = self._world.device.type == "cuda"
        if on_device:
            numbers = numbers.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
            self._write()
        seconds, phases = self.clock.lap()
        digest, self._extra, extra = samples_digest(batch.sample_ids), {}, self._extra
        self._pending = _Pending(step, digest, lr, numbers, ready, seconds, phases, extra, tuple(events))
        if not on_device or step == self._facts.total_steps:
            self._write()
        self._profiler.after(step)
        self._garbage.step(step)

    def evaluated(self, step: int, results: Mapping[str, float]) -> None:
        """An evaluation made after ``step``."""
        self._write()
        if results and self._world.is_main:
            loss, bits = results["eval_loss"], results.get("bits_per_byte")
            gzip_bits = self._facts.gzip_bits_per_byte
            extra = {} if gzip_bits is None else {"gzip_bits_per_byte": gzip_bits}
            self._metrics.log_evaluation(step, loss, bits, **extra)
            self._progress.evaluation(step, loss, bits)
        self.clock.lap()

    def saved(self, checkpoints: Checkpointer) -> None:
        """Tell what became of checkpoints, and what they cost: with this step's numbers, on rank 0."""
        if seconds := checkpoints.take_stall_seconds():
            self._extra["checkpoint_stall_seconds"] = seconds
        for report in checkpoints.poll():
            if report.error is not None:
                where = "" if self._world.is_main else f"[rank {self._world.rank}] "
                text = f"{where}no checkpoint of step {report.step}: {report.error}"
                print(text, file=sys.stderr, flush=True) if where else self._progress.message(text)
                continue
            speed = report.num_bytes / report.seconds / 1e9
            self._extra |= {
                "checkpoint_step": report.step,
                "checkpoint_bytes": report.num_bytes,
                "checkpoint_seconds": report.seconds,
                "checkpoint_gb_per_second": speed,
            }
            self._progress.message(
                f"checkpoint of step {report.step}: {report.num_bytes / 1e6:.1f} MB in {report.seconds:.2f} s"
            )

    def message(self, text: str) -> None:
        """Show a line on rank 0."""
        self._progress.message(text)

    def finish(self, state: str, step: int, facts: Mapping[str, str]) -> None:
        """The loop ended in good order: last numbers, summary, status."""
        self._write()
        self._progress.finish(f"{state} at step {step}", facts)
        self._status(state, step=step)

    def _write(self) -> None:
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if pending.ready is not None:
            pending.ready.synchronize()
        loss, norm, skipped, *counts = pending.numbers.tolist()
        events = {name: int(count) for name, count in zip(pending.events, counts, strict=True)}
        self._skipped += int(skipped)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._world.is_main:
            rate = self._facts.tokens_per_step / pending.seconds
            metrics = StepMetrics(
                step=pending.step,
                loss=loss,
                grad_norm=norm,
                lr=pending.lr,
                tokens=self._first_tokens + pending.step * self._facts.tokens_per_step,
                samples_digest=pending.digest,
                step_seconds=pending.seconds,
                tokens_per_second=rate,
                mfu=model_flops_utilization(
                    rate, self._facts.flops_per_token, self._world.size, self._facts.peak_flops
                ),
                memory_gib=memory_gib(self._world.device),
                phase_seconds=pending.phases,
                skipped_steps=self._skipped,
                extra=pending.extra | events,
            )
            self._metrics.log_step(metrics)
            self._progress.step(metrics)
            self._status("running", step=pending.step)
        if self._skipped_in_a_row >= self._facts.max_skipped_steps:
            raise FloatingPointError(
                f"{self._skipped_in_a_row} steps in a row had a non-finite loss or gradient (last: {pending.step}) "
                "and were skipped. Lower optim.lr, lengthen schedule.warmup_steps or look at the data"
            )

    def _status(self, state: str, error: str | None = None, step: int | None = None) -> None:
        if not self._world.is_main:
            return
        try:
            write_status(self._facts.run_dir, state, self._step if step is None else step, error)
        except OSError as problem:  # a full disk must not end a run
            if state != "running":
                raise
            self._progress.message(f"cannot write status.json: {problem}")

    def _lost(self, message: str, step: int) -> None:
        """Other ranks fell silent and this process is about to end; called from the heartbeat's thread."""
        write_status(self._facts.run_dir, "failed", step, message)
