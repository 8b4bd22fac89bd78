"""Being asked to stop: signals set a flag, the ranks agree on it at the end of a step."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any

__all__ = ["StopSignals", "agree"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopSignals:
    """While open, SIGTERM, SIGINT, SIGHUP and SIGUSR1 only raise `requested`; the same again ends the process at once.

    A signal that comes again within `debounce_seconds` counts as the same request: a Ctrl-C under torchrun reaches a
    worker from the terminal and once more from its agent. A *different* second signal does not end the process
    either, since a scheduler sends USR1 long before its TERM and the save in between must not be cut short.

    Python runs its handlers between two bytecodes of the main thread, so a rank that hangs in a collective would
    never see one. The signals are therefore read by a thread, from the pipe that Python's C handler writes to.

    Open it around the heartbeat: when a rank dies, torchrun sends SIGTERM to the others at once, and they need some
    seconds more to find out which one it was.

    Outside the main thread (a notebook's worker, say) nothing is installed and `requested` stays 0.
    """

    def __init__(self, *, rank: int = 0, debounce_seconds: float = 2.0) -> None:
        self.requested = 0
        """The number of the first signal received; 0 while there was none."""
        self._rank = rank
        self._debounce_seconds = debounce_seconds
        self._last: dict[int, float] = {}
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._read_fd, self._write_fd = os.pipe()
            os.set_blocking(self._write_fd, False)
            self._previous_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
            self._previous = {number: signal.signal(number, lambda *_: None) for number in _wanted()}
            threading.Thread(target=self._listen, args=(self._read_fd,), name="rung-signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._write_fd)  # ends the thread, which closes the other end
            self._previous = {}

    @property
    def name(self) -> str:
        """The first signal's name, such as `SIGTERM`; empty while there was none."""
        return signal.Signals(self.requested).name if self.requested else ""

    def _listen(self, read_fd: int) -> None:
        while received := os.read(read_fd, 64):
            for number in received:
                if number in _SIGNALS:
                    self._receive(number)
        os.close(read_fd)

    def _receive(self, number: int) -> None:
        now, before = time.monotonic(), self._last.get(number)
        self._last[number] = now
        name = signal.Signals(number).name
        if before is not None and now - before >= self._debounce_seconds:
            _say(f"[rank {self._rank}] {name} again: ending at once")
            os._exit(128 + number)
        if not self.requested:
            self.requested = number
            if self._rank == 0:
                _say(f"{name}: stopping after this step (send it again to end at once)")


def agree(value: int, group: Any = None) -> int:
    """The largest `value` of all ranks of `group` (default: the world), on every rank.

    Every rank must call it at the same point of the step. `group` must take CPU tensors (gloo), so that no device is
    waited for. Without torch.distributed it returns `value`.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return value
    largest = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)


def _wanted() -> list[signal.Signals]:
    """SIGHUP only where it is not ignored: nohup means that the end of the terminal is not the end of the run."""
    return [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
