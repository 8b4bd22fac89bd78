"""Saving: the state is copied into memory while training goes on, and written by somebody else.

Parameters and optimizer state do not change between two optimizer steps, so the copy runs beside the forward and
backward passes of the step after the one that is saved, and training waits for it only before the next update (the lazy
snapshot of DataStates-LLM, arXiv 2406.10707).
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rung.checkpoint import faults
from rung.checkpoint.config import CheckpointConfig
from rung.checkpoint.format import CheckpointError
from rung.checkpoint.storage import open_storage
from rung.checkpoint.writer import (
    Flush,
    FlushProcess,
    FlushThread,
    Head,
    Job,
    Outcome,
    Plan,
    give_up,
    shared_buffer,
)
from rung.optim import Packed, StateTensor

if TYPE_CHECKING:
    from rung.parallel import World

__all__ = ["Checkpointer", "Report", "plan_of", "versions"]


@dataclass(frozen=True)
class Report:
    """What became of a checkpoint, as one rank knows it."""

    step: int
    error: str | None
    """None: rank 0 committed it. Other ranks only report errors of their own."""
    num_bytes: int
    """Of the whole checkpoint."""
    seconds: float
    """From the end of the copy to the commit."""


def plan_of(
    tensors: Mapping[str, StateTensor],
) -> tuple[Plan, list[tuple[Tensor | Packed, tuple[slice, ...]]]]:
    """What this rank writes of its state, the boxes that it owns, and for each box where its elements are."""
    boxes, sources = [], []
    for name, (tensor, logical) in tensors.items():
        for piece in logical.pieces():
            if piece.owned and piece.box.numel:
                boxes.append((name, logical.shape, str(tensor.dtype).removeprefix("torch."), piece.box))
                sources.append((tensor, piece.local))
    return Plan.of(boxes), sources


class Checkpointer:
    """Saves one run's state. Every rank calls the same methods at the same points; ``save`` and ``finish`` communicate.

    A checkpoint that cannot be written costs nothing but itself: training goes on, the ones before stay, and ``poll``
    tells. Only where there is no memory or process to be had for the first one, ``save`` raises. Close it at the end.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        world: World,
        tensors: Mapping[str, StateTensor],
        *,
        run_config: Mapping[str, Any],
        fingerprints: Mapping[str, str | None],
        saved_step: int,
    ) -> None:
        """tensors: the state by name; live, contents are read at each save. saved_step: the step whose state needs no
        saving, because it was just loaded or nothing has been done. Collective."""
        self._config, self._world = config, world
        self._plan, self._sources = plan_of(tensors)
        self._head = Head({}, run_config, fingerprints, versions(), config.keep)
        self._token, self._attempts = world.on_main(lambda: secrets.token_hex(4)), 0
        self._whole: Tensor | None = None
        self._memory: mmap.mmap | None = None
        self._descriptor = -1
        self._views: list[Tensor] = []
        self._flush: Flush | None = None
        self._snapshot: _Snapshot | None = None
        self._copied: _Snapshot | None = None
        self._deadline = 0.0
        self._flushing: Job | None = None
        self._last: Job | None = None
        self._reports: list[Report] = []
        self._saved_step = saved_step
        self._failed: str | None = None
        self._stall_seconds = 0.0

    def due(self, step: int) -> bool:
        """Whether the interval asks for a checkpoint after ``step``."""
        return self._config.interval > 0 and step % self._config.interval == 0

    def save(self, progress: Mapping[str, Any], *, last: bool = False) -> bool:
        """Begin a checkpoint of the state as it is now; False where it is skipped because the writers are busy.

        progress: see ``Manifest.progress``; the state must not change before ``join``. last: nothing follows, so there
        is no need to let training go on meanwhile.
        """
        begun = time.perf_counter()
        if not last and self._config.when_busy == "skip" and self._world.any(self._busy()):
            if self._world.is_main:
                why = "it is skipped, because the one before it is still being written (checkpoint.when_busy=skip)"
                self._reports.append(Report(int(progress["step"]), why, 0, 0.0))
            return False
        self._wait_for_writers()
        self._saved_step = int(progress["step"])
        self._attempts += 1
        head = dataclasses.replace(self._head, progress=dict(progress)) if self._world.is_main else None
        token = f"{self._token}{self._attempts:04x}"
        job = Job(self._saved_step, token, self._world.rank, self._world.size, self._config.write_timeout_seconds, head)
        flush = self._writer(separate=self._config.async_ and not last)
        self._flushing = self._last = job
        self._deadline = time.monotonic() + 2 * self._config.write_timeout_seconds
        faults.reach("save.snapshot", self._world.rank)
        self._snapshot = _Snapshot(self._sources, self._views, self._world.device, lambda: flush.submit(job))
        self._stall_seconds += time.perf_counter() - begun
        if not self._config.async_:
            self.join()
            begun = time.perf_counter()
            self._wait_for_writers()
            self._stall_seconds += time.perf_counter() - begun
        return True

    def join(self) -> None:
        """Wait until the state may change again. Call it before every optimizer step; it costs nothing when idle."""
        if self._snapshot is None:
            return
        begun = time.perf_counter()
        self._copied, self._snapshot = self._snapshot, None
        self._copied.join()
        faults.reach("save.handed_over", self._world.rank)
        self._stall_seconds += time.perf_counter() - begun

    def poll(self) -> list[Report]:
        """What has become known since the last call: rank 0 of commits and failures, other ranks of their failures."""
        self._busy()
        reports, self._reports = self._reports, []
        return reports

    def finish(self, progress: Mapping[str, Any]) -> None:
        """Save ``progress`` unless it is what was saved last, and wait for what is under way. Collective.

        Raises CheckpointError on every rank where the last checkpoint was not committed.
        """
        self._wait_for_writers()
        if self._saved_step != int(progress["step"]) or self._world.on_main(lambda: self._failed) is not None:
            self.save(progress, last=True)
            self._wait_for_writers()
        if problem := self._world.on_main(lambda: self._failed):
            raise CheckpointError(f"the checkpoint of step {progress['step']} was not committed: {problem}")

    def close(self) -> None:
        """End the flush process, without waiting for what it is doing, and give the buffer back."""
        for snapshot in (self._snapshot, self._copied):
            if snapshot is not None:
                snapshot.finish()  # nothing may write into what is given back
        if self._flush is not None:
            self._flush.close()
            self._flush = None
        if self._whole is not None:
            if self._world.device.type == "cuda":
                _page_unlock(self._whole)
            self._views, self._whole, self._memory = [], None, None
            os.close(self._descriptor)

    def take_stall_seconds(self) -> float:
        """Time for which training has waited for snapshots and writers since the last call."""
        seconds, self._stall_seconds = self._stall_seconds, 0.0
        return seconds

    def _busy(self) -> bool:
        """Whether this rank's writer is at work, after taking note of what it has done."""
        if self._snapshot is not None:
            return True
        if self._flushing is None or self._flush is None:
            return False
        outcome = self._flush.poll() or self._given_up(self._flushing)
        if outcome is None:
            return True
        self._flushing = None
        self._note(outcome)
        return False

    def _given_up(self, job: Job) -> Outcome | None:
        """The outcome of a job whose copy failed after ``join``, or whose writer hangs."""
        if self._copied is not None and self._copied.error is not None:
            text = f"the copy of the state failed: {self._copied.error}"
        elif isinstance(self._flush, FlushProcess) and time.monotonic() > self._deadline:
            # It is killed below. A thread cannot be: it would wake and commit what the buffer holds by then.
            text = "its writer gave no answer for twice checkpoint.write_timeout_seconds"
        else:
            return None
        if self._flush is not None:
            self._flush.close()
            self._flush = None
        give_up(open_storage(self._config.dir), job, text)
        return Outcome(job.step, text, 0, 0.0)

    def _note(self, outcome: Outcome) -> None:
        self._failed = outcome.error
        if outcome.error is not None or self._world.is_main:
            self._reports.append(Report(outcome.step, outcome.error, outcome.num_bytes, outcome.seconds))

    def _wait_for_writers(self) -> None:
        """Until no rank is busy. Ranks ask each other again and again: one long wait might be taken for a hang."""
        self.join()
        wait = 0.005
        while self._world.any(self._busy()):
            time.sleep(wait)
            wait = min(wait * 1.5, 0.25)
        if self._world.any(self._failed is not None) and self._world.is_main and self._last is not None:
            with contextlib.suppress(OSError, CheckpointError):  # others wrote on after this rank had given it up
                open_storage(self._config.dir).discard(self._last.step, self._last.token)
            self._last = None

    def _writer(self, *, separate: bool) -> Flush:
        """The buffer, and who writes it: a process when training goes on meanwhile, or where there is one already."""
        if self._whole is None:
            self._descriptor, self._memory = shared_buffer(self._plan.size)
            whole = torch.frombuffer(self._memory, dtype=torch.uint8)
            if self._world.device.type == "cuda":
                _page_lock(whole)
            self._whole = whole
            self._views = [
                whole[box.offset : box.offset + box.nbytes].view(tensor.dtype).view(box.box.sizes)
                for box, (tensor, _) in zip(self._plan.boxes, self._sources, strict=True)
            ]
        if isinstance(self._flush, FlushProcess) and not self._flush.is_running:
            self._flush.close()
            self._flush = None
        if separate and not isinstance(self._flush, FlushProcess):
            self._flush = FlushProcess(self._config.dir, self._plan, self._descriptor)
        if self._flush is None:
            assert self._memory is not None
            self._flush = FlushThread(self._config.dir, self._plan, self._memory)
        return self._flush


class _Snapshot:
    """A copy of the state under way, in a thread; on CUDA the device makes it, on a stream of its own."""

    def __init__(
        self,
        sources: list[tuple[Tensor | Packed, tuple[slice, ...]]],
        views: list[Tensor],
        device: torch.device,
        then: Callable[[], None],
    ) -> None:
        self._sources, self._views, self._device, self._then = sources, views, device, then
        self.error: BaseException | None = None
        """What went wrong, also after ``join``."""
        self._enqueued = threading.Event()
        on_device = device.type == "cuda"
        self._begin = torch.cuda.Event() if on_device else None
        self._done = torch.cuda.Event() if on_device else None
        if self._begin is not None:
            self._begin.record()  # what is queued before this must be done before the copy
        self._thread = threading.Thread(target=self._run, name="rung-snapshot", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the copy: the host on CPU, the device's queue on CUDA."""
        if self._done is None:
            self._thread.join()
        else:
            self._enqueued.wait()
            torch.cuda.current_stream(self._device).wait_event(self._done)
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """Wait until nothing is copied any more."""
        self._thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        try:
            if self._begin is None or self._done is None:
                self._copy()
            else:
                stream = torch.cuda.Stream(self._device)
                stream.wait_event(self._begin)
                with torch.cuda.stream(stream):
                    self._copy()
                    self._done.record(stream)
                self._enqueued.set()
                self._done.synchronize()
            self._then()
        except BaseException as error:
            self.error = error
        finally:
            self._enqueued.set()

    def _copy(self) -> None:
        for (tensor, place), view in zip(self._sources, self._views, strict=True):
            view.copy_(tensor[place], non_blocking=True)


def _page_lock(memory: Tensor) -> None:
    """Let the device copy into the memory while the host goes on."""
    runtime: Any = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if status != 0:
        raise RuntimeError(f"cudaHostRegister of {memory.numel()} bytes failed with status {status}")


def _page_unlock(memory: Tensor) -> None:
    """Undo ``_page_lock``."""
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(memory.data_ptr())


def versions() -> dict[str, str]:
    """What wrote a checkpoint."""
    from rung import __version__

    # A plain text: torch's own kind of text would have the flush process import torch when it is told.
    return {"rung": __version__, "torch": str(torch.__version__)}
