"""Garbage collection at times of our choosing."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from types import TracebackType

__all__ = ["GarbageCollector", "GarbageConfig"]


@dataclass
class GarbageConfig:
    """When Python looks for reference cycles."""

    enabled: bool = True
    """Whether collections happen at fixed steps instead of whenever Python likes."""
    interval: int = 100
    """Steps between collections."""

    def validate(self) -> list[str]:
        """Problems a person can fix."""
        return [] if self.interval >= 1 else [f"garbage.interval={self.interval} must be at least 1"]


class GarbageCollector:
    """Collects every `interval` steps, at the same step on every rank, and at no other time.

    Python's own collections come at a different moment on every rank, and each makes all the others wait in the next
    collective. What exists after the first step (modules, compiled code, imports) lives as long as the run: it is
    frozen, so that later collections look at the little that is new and take milliseconds.
    """

    def __init__(self, config: GarbageConfig) -> None:
        self._config = config
        self._frozen = False

    def __enter__(self) -> GarbageCollector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, step: int) -> None:
        """Call at the end of every step. The first call freezes what the run is made of."""
        if not self._config.enabled:
            return
        if not self._frozen:
            gc.collect()
            gc.freeze()
            gc.disable()
            self._frozen = True
        elif step % self._config.interval == 0:
            gc.collect(1)

    def close(self) -> None:
        """Give Python its usual collector back."""
        if self._frozen:
            gc.unfreeze()
            gc.enable()
            self._frozen = False
