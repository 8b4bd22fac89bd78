"""What writes a checkpoint: a part on every rank, the commit on rank 0. Importing this needs no torch.

The copy of a rank's state lies in a buffer of shared memory, laid out as its file will be. A process of its own (or a
thread, where training waits anyway) hashes and writes it, and announces the part in the attempt's folder. That is where
the writers meet, and nowhere else: rank 0's writer waits there for every part, checks that together they are a state,
and commits.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple, Protocol

from rung.checkpoint import faults
from rung.checkpoint.digest import box_lanes
from rung.checkpoint.format import (
    ALIGNMENT,
    BLOCK_BYTES,
    CheckpointError,
    Part,
    PartTensor,
    StoredBox,
    StoredFile,
    block_digest,
    item_bytes,
    merge,
)
from rung.checkpoint.storage import Storage, Writable, open_storage
from rung.layout import Box

__all__ = [
    "BoxValues",
    "Flush",
    "FlushProcess",
    "FlushThread",
    "Head",
    "Job",
    "Outcome",
    "Plan",
    "PlannedBox",
    "give_up",
    "shared_buffer",
    "write_alone",
]

NICE = 10
"""The flush process yields to training: added to its niceness."""
_FIRST_WAIT, _LONGEST_WAIT = 0.01, 0.5


class PlannedBox(NamedTuple):
    """A box that a rank writes, and where in its file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    box: Box
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.box.numel * item_bytes(self.dtype)


@dataclass(frozen=True)
class Plan:
    """What a rank writes: its file from beginning to end."""

    boxes: tuple[PlannedBox, ...]
    size: int

    @classmethod
    def of(cls, boxes: list[tuple[str, tuple[int, ...], str, Box]]) -> Plan:
        """Boxes (tensor's name, shape and dtype, box) one after another, each aligned."""
        planned, end = [], 0
        for name, shape, dtype, box in boxes:
            start = -(-end // ALIGNMENT) * ALIGNMENT
            planned.append(PlannedBox(name, shape, dtype, box, start))
            end = start + planned[-1].nbytes
        return cls(tuple(planned), end)


@dataclass(frozen=True)
class Head:
    """What a manifest says beside its tensors, and how the folder is kept: for rank 0's writer."""

    progress: Mapping[str, Any]
    config: Mapping[str, Any]
    fingerprints: Mapping[str, str | None]
    versions: Mapping[str, str]
    keep: int
    """The newest so many stay; 0 keeps all."""


@dataclass(frozen=True)
class Job:
    """One checkpoint to write."""

    step: int
    token: str
    """Names the attempt: no two attempts have the same."""
    rank: int
    num_writers: int
    timeout_seconds: float
    head: Head | None
    """On rank 0, which commits."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended: ``error`` is None where this rank's part, or on rank 0 the whole checkpoint, is durable."""

    step: int
    error: str | None
    num_bytes: int
    """Of this rank's part; on rank 0 of all files."""
    seconds: float


class Flush(Protocol):
    """Who carries out jobs, one at a time."""

    def submit(self, job: Job) -> None:
        """Begin. The buffer must not change until the outcome is there."""

    def poll(self) -> Outcome | None:
        """The outcome of the job, once; None while it is under way."""

    def close(self) -> None:
        """End, without waiting for a job under way."""


def shared_buffer(size: int) -> tuple[int, mmap.mmap]:
    """Anonymous memory that a child process can map too: a file descriptor and the mapping.

    Its pages come with the first copy, while training goes on; to get them takes longer than to copy.

    Not in /dev/shm, which containers limit to 64 MB.
    """
    descriptor = os.memfd_create("rung-checkpoint", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, max(size, 1))
    return descriptor, mmap.mmap(descriptor, max(size, 1), flags=mmap.MAP_SHARED)


def carry_out(storage: Storage, plan: Plan, buffer: memoryview, job: Job, *, hurry: bool) -> Outcome:
    """Write a part and, on rank 0, commit. Never raises: what goes wrong is the outcome, and other writers are told.

    ``hurry`` takes a second core where there is one; without, training that goes on has it.
    """
    begun = time.monotonic()
    num_bytes = plan.size
    try:
        write_part(storage, plan, buffer, job, hurry=hurry)
        if job.head is not None:
            num_bytes = commit(storage, job, job.head)
    except Exception as error:
        text = _one_line(error)
        give_up(storage, job, text)
        return Outcome(job.step, text, 0, time.monotonic() - begun)
    return Outcome(job.step, None, num_bytes, time.monotonic() - begun)


def give_up(storage: Storage, job: Job, text: str) -> None:
    """End a job that failed: rank 0 discards the attempt, others tell rank 0's writer not to wait for their part.

    A part that was announced stays: it may be committed meanwhile. Never raises.
    """
    failed = _place(storage, job, f"part-{job.rank:05d}.failed")
    with contextlib.suppress(Exception):
        if job.head is not None:
            storage.discard(job.step, job.token)
            return
        if _part_name(job.rank) in storage.names(_place(storage, job)):
            return
        try:
            storage.write(failed, text.encode())
        except OSError:  # the disk may be full of what was written of it
            storage.remove(_place(storage, job, _data_name(job.rank)))
            storage.write(failed, text.encode())


def write_part(storage: Storage, plan: Plan, buffer: memoryview, job: Job, *, hurry: bool) -> None:
    """Write and announce what this rank has. Blocks are hashed from the buffer, not from what a disk gives back."""
    faults.reach("write.begin", job.rank)
    name = storage.file_name(job.token, _data_name(job.rank))
    digest = functools.partial(_digested, plan, buffer, name)
    blocks = []
    with ThreadPoolExecutor(1, thread_name_prefix="rung-digest") as beside:
        digested = beside.submit(digest) if hurry else None
        with storage.open_write(_place(storage, job, _data_name(job.rank))) as file:
            for start in range(0, plan.size, BLOCK_BYTES):
                block = buffer[start : min(start + BLOCK_BYTES, plan.size)]
                blocks.append(block_digest(block))
                file.write(block)
                faults.reach("write.block", job.rank)
            faults.reach("write.before_sync", job.rank)
        faults.reach("write.before_part", job.rank)
        tensors = digest() if digested is None else digested.result()
    part = Part({name: StoredFile(plan.size, tuple(blocks))}, tensors)
    storage.write(_place(storage, job, _part_name(job.rank)), part.to_json())
    faults.reach("write.part", job.rank)


def _digested(plan: Plan, buffer: memoryview, file: str) -> dict[str, PartTensor]:
    """The plan's boxes by tensor, with what they are worth."""
    tensors: dict[str, PartTensor] = {}
    for planned in plan.boxes:
        _add_box(tensors, planned, buffer[planned.offset : planned.offset + planned.nbytes], file)
    return tensors


def _add_box(tensors: dict[str, PartTensor], planned: PlannedBox, values: memoryview, file: str) -> None:
    """Note a box that lies in ``file``, and what it is worth."""
    lanes = box_lanes(values, item_bytes(planned.dtype), planned.shape, planned.box)
    known = tensors.get(planned.name, PartTensor(planned.shape, planned.dtype, (0, 0), ()))
    tensors[planned.name] = PartTensor(
        planned.shape,
        planned.dtype,
        (known.lanes[0] + lanes[0], known.lanes[1] + lanes[1]),
        (*known.boxes, StoredBox(planned.box, file, planned.offset)),
    )


class BoxValues(NamedTuple):
    """A box of a tensor with its elements."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    box: Box
    values: Any
    """A contiguous buffer of the box's elements, row by row, little-endian."""


def write_alone(storage: Storage, boxes: Iterable[BoxValues], head: Head) -> int:
    """Write and commit a checkpoint whose boxes come one after another; returns the bytes of its file.

    For one process that has no room for all of it: one box and one block are held at a time. Raises CheckpointError
    where the boxes are no whole state; then, and after any other error, nothing of it stays.
    """
    job = Job(int(head.progress["step"]), secrets.token_hex(6), 0, 1, 0.0, head)
    name = storage.file_name(job.token, _data_name(job.rank))
    tensors: dict[str, PartTensor] = {}
    try:
        with storage.open_write(_place(storage, job, _data_name(job.rank))) as raw:
            file = _BlockFile(raw)
            for box in boxes:
                if not box.box.numel:
                    continue
                file.write(memoryview(bytes(-file.size % ALIGNMENT)))
                planned = PlannedBox(box.name, box.shape, box.dtype, box.box, file.size)
                values = memoryview(box.values).cast("B")
                file.write(values)
                _add_box(tensors, planned, values, name)
            part = Part({name: file.finish()}, tensors)
        storage.write(_place(storage, job, _part_name(job.rank)), part.to_json())
        return commit(storage, job, head)
    except BaseException:
        with contextlib.suppress(Exception):
            storage.discard(job.step, job.token)
        raise


class _BlockFile:
    """A file that is written in blocks, whatever it is given, and their digests."""

    def __init__(self, file: Writable) -> None:
        self.size = 0
        """Bytes given so far."""
        self._file = file
        self._block = bytearray(BLOCK_BYTES)
        self._digests: list[str] = []

    def write(self, values: memoryview) -> None:
        """Append bytes."""
        while values.nbytes:
            filled = self.size % BLOCK_BYTES
            taken = values[: BLOCK_BYTES - filled]
            self._block[filled : filled + taken.nbytes] = taken
            self.size += taken.nbytes
            values = values[taken.nbytes :]
            if self.size % BLOCK_BYTES == 0:
                self._flush(BLOCK_BYTES)

    def finish(self) -> StoredFile:
        """Write what is left."""
        if left := self.size % BLOCK_BYTES:
            self._flush(left)
        return StoredFile(self.size, tuple(self._digests))

    def _flush(self, size: int) -> None:
        block = memoryview(self._block)[:size]
        self._digests.append(block_digest(block))
        self._file.write(block)


def commit(storage: Storage, job: Job, head: Head) -> int:
    """Wait for all parts, check and publish them, retire what is old; returns the bytes of all files.

    Raises CheckpointError when a writer failed, did not come in time, or what they wrote is no whole state.
    """
    parts = _all_parts(storage, job)
    manifest = merge(
        parts, progress=head.progress, config=head.config, fingerprints=head.fingerprints, versions=head.versions
    )
    for name, file in manifest.files.items():
        path = _place(storage, job, name.rpartition("/")[2])
        if (size := storage.size(path)) != file.size:
            raise CheckpointError(f"{storage.where(path)} has {size} of {file.size} bytes: somebody else was at it")
    faults.reach("commit.merged", job.rank)
    storage.publish(job.step, job.token, manifest.to_json())
    retire_old(storage, job.step, head.keep)
    return sum(file.size for file in manifest.files.values())


def retire_old(storage: Storage, newest: int, keep: int) -> None:
    """Keep ``keep`` committed checkpoints up to step ``newest``; 0 keeps all.

    Later ones are from another time line (they could not be read, and the run went back): they neither count nor go.
    """
    steps: list[int] = []
    with contextlib.suppress(OSError, CheckpointError):  # the new one is safe, and this is tried again after the next
        steps = [step for step in storage.steps() if step <= newest]
    for step in steps[:-keep] if keep else []:
        with contextlib.suppress(OSError, CheckpointError):
            storage.retire(step)


def _all_parts(storage: Storage, job: Job) -> list[Part]:
    folder = _place(storage, job)
    wanted = {_part_name(rank): rank for rank in range(job.num_writers)}
    deadline, wait = time.monotonic() + job.timeout_seconds, _FIRST_WAIT
    while True:
        there = set(storage.names(folder))
        if failed := sorted(name for name in there if name.endswith(".failed")):
            texts = [f"rank {int(name[5:10])}: {storage.read(_place(storage, job, name)).decode()}" for name in failed]
            raise CheckpointError("; ".join(texts))
        missing = [rank for name, rank in wanted.items() if name not in there]
        if not missing:
            return [Part.from_json(storage.read(_place(storage, job, name))) for name in wanted]
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"nothing came from the writers of ranks {missing} for {job.timeout_seconds:g} s "
                "(checkpoint.write_timeout_seconds)"
            )
        time.sleep(wait)
        wait = min(wait * 1.5, _LONGEST_WAIT)


def _place(storage: Storage, job: Job, name: str = "") -> str:
    """Where a file of the job's attempt lies; without a name the folder."""
    return storage.attempt_path(job.step, job.token, name)


def _data_name(rank: int) -> str:
    return f"data-{rank:05d}.bin"


def _part_name(rank: int) -> str:
    return f"part-{rank:05d}.json"


def _one_line(error: Exception) -> str:
    if isinstance(error, CheckpointError | OSError):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"


class FlushThread:
    """Jobs in a thread of this process."""

    def __init__(self, address: str, plan: Plan, buffer: mmap.mmap) -> None:
        self._storage, self._plan, self._buffer = open_storage(address), plan, memoryview(buffer)
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    def submit(self, job: Job) -> None:
        """See ``Flush``."""
        threading.Thread(target=self._run, args=(job,), name="rung-checkpoint", daemon=True).start()

    def _run(self, job: Job) -> None:
        self._outcomes.put(carry_out(self._storage, self._plan, self._buffer, job, hurry=True))

    def poll(self) -> Outcome | None:
        """See ``Flush``."""
        with contextlib.suppress(queue.Empty):
            return self._outcomes.get_nowait()
        return None

    def close(self) -> None:
        """See ``Flush``."""


class FlushProcess:
    """Jobs in a process of its own, at a lower priority: it starts in a fraction of a second, since it needs no torch.

    It dies with the thread that made this object, and ignores the signals by which runs are stopped.
    """

    def __init__(self, address: str, plan: Plan, descriptor: int) -> None:
        self._address = address
        self._job: Job | None = None
        ours, theirs = Pipe()
        arguments = [str(theirs.fileno()), str(descriptor), str(os.getpid())]
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from rung.checkpoint.writer import main; main()", *arguments],
            pass_fds=(theirs.fileno(), descriptor),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._pipe = ours
        with contextlib.suppress(OSError):  # it is gone already: poll says so
            self._pipe.send((address, plan))

    def submit(self, job: Job) -> None:
        """See ``Flush``."""
        self._job = job
        with contextlib.suppress(OSError):  # it is gone: poll says so
            self._pipe.send(job)

    def poll(self) -> Outcome | None:
        """See ``Flush``."""
        if self._job is None:
            return None
        job = self._job
        with contextlib.suppress(OSError, EOFError):
            if not self._pipe.poll():
                return None
            self._job = None
            outcome: Outcome = self._pipe.recv()
            return outcome
        self._job = None
        try:
            status: object = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            status = "unknown"
        text = f"the process that writes the checkpoint ended with status {status}"
        give_up(open_storage(self._address), job, text)
        return Outcome(job.step, text, 0, 0.0)

    @property
    def is_running(self) -> bool:
        """Whether it can take a job."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def close(self) -> None:
        """See ``Flush``."""
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
            return
        self._process.kill()
        # It may be stuck in the kernel, and dies when it leaves that.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)


def main() -> None:
    """The flush process: jobs from the pipe, one after another, until it is closed."""
    pipe_descriptor, buffer_descriptor, parent = map(int, sys.argv[1:])
    _die_with(parent)
    os.nice(NICE)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    pipe = Connection(pipe_descriptor)
    address, plan = pipe.recv()
    storage = open_storage(address)
    buffer = memoryview(mmap.mmap(buffer_descriptor, max(plan.size, 1), flags=mmap.MAP_SHARED, prot=mmap.PROT_READ))
    with contextlib.suppress(EOFError, OSError):  # the pipe is closed: the run has ended
        while True:
            pipe.send(carry_out(storage, plan, buffer, pipe.recv(), hurry=False))


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be told
        os._exit(1)
