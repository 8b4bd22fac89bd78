"""A window of steps under torch.profiler."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["ProfileConfig", "Profiler"]

_log = logging.getLogger("rung")


@dataclass
class ProfileConfig:
    """Which steps are profiled; none by default."""

    start_step: int = 0
    """The first profiled step (1-based); 0 means no profile. Choose one after warm-up and compilation."""
    num_steps: int = 3
    """How many steps are profiled."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write a trace."""
    with_stack: bool = False
    """Whether to record Python stacks, which slows the profiled steps down."""
    with_memory: bool = False
    """Whether to record allocations."""

    def validate(self) -> list[str]:
        """Problems a person can fix."""
        problems = []
        if self.start_step < 0:
            problems.append(f"profile.start_step={self.start_step} must be 0 (off) or a step, from 1")
        if self.num_steps < 1:
            problems.append(f"profile.num_steps={self.num_steps} must be at least 1")
        return problems


class Profiler:
    """Writes `profile/rank0-steps10-12.json.gz` (Chrome and Perfetto read it) and a `.txt` of the costliest operators.

    Call `before(step)` and `after(step)` around every step. The step before the window is profiled too and thrown
    away, since the first one pays for starting the device's tracer.
    """

    def __init__(self, config: ProfileConfig, run_dir: str | Path, rank: int = 0) -> None:
        self._config = config
        self._folder = Path(run_dir) / "profile"
        self._rank = rank
        self._wanted = config.start_step > 0 and rank in config.ranks
        self._last_step = config.start_step + config.num_steps - 1
        self._profile: Any = None
        self._recorded: tuple[int, int] | None = None

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def before(self, step: int) -> None:
        """Start profiling if the window begins here."""
        if not self._wanted or self._profile is not None:
            return
        if step > self._last_step:
            _log.warning(
                "profile.start_step=%d num_steps=%d ends before step %d, where this run starts: nothing is profiled",
                self._config.start_step, self._config.num_steps, step,
            )  # fmt: skip
            self._wanted = False
        elif step >= self._config.start_step - 1:
            self._start(warmup=1 if step < self._config.start_step else 0, active=self._last_step)

    def after(self, step: int) -> None:
        """Count the step; after the window's last one, write the trace."""
        if self._profile is None:
            return
        if step >= self._config.start_step:
            self._recorded = (self._recorded[0] if self._recorded else step, step)
        if step >= self._last_step:
            self.close()
        else:
            self._profile.step()

    def close(self) -> None:
        """Write what was recorded, if the run ends inside the window."""
        if self._profile is None:
            return
        profile, self._profile, self._wanted = self._profile, None, False
        profile.stop()
        if self._recorded is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank{self._rank}-steps{self._recorded[0]}-{self._recorded[1]}.json.gz"
        profile.export_chrome_trace(str(path))
        costliest = "self_device_time_total" if self._on_cuda else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=costliest, row_limit=40, max_name_column_width=80)
        path.with_name(path.name.replace(".json.gz", ".txt")).write_text(table + "\n", encoding="utf-8")
        print(f"profile written to {path} (open it in https://ui.perfetto.dev)", flush=True)

    def _start(self, warmup: int, active: int) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile, schedule

        self._on_cuda = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._on_cuda else [])
        self._profile = profile(
            activities=activities,
            # `active` is never used up: the window is closed by hand, also when a run ends early.
            schedule=schedule(wait=0, warmup=warmup, active=active + 1, repeat=1),
            with_stack=self._config.with_stack,
            profile_memory=self._config.with_memory,
            record_shapes=True,
        )
        self._profile.start()
