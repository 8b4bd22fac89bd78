"""How long the phases of a step took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up wall-clock seconds by phase: `with clock("data"): ...`, then `clock.lap()` once a step.

    It reads the host's clock and never synchronises a device. On CUDA a phase is therefore the time the *host* spent
    in it: work it only queued appears in the phase in which the host next waits (usually where the loss is read), and
    only the step as a whole is true device time. A phase that waits on the device for its own sake would slow every
    step down; the profiler is there for that question.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lap_started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - started

    def lap(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last lap (or the start), and the seconds of each phase in them; starts the next lap."""
        now = time.perf_counter()
        total, phases = now - self._lap_started, self._seconds
        self._seconds, self._lap_started = {}, now
        return total, phases
