"""Every rank shows that it is alive; when one falls silent, all the others say which one and end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

__all__ = ["Failure", "Heartbeat", "HeartbeatConfig", "RankLost"]

# Rounds that a look at all ranks lasts: a living rank beats at least twice in it.
_CENSUS_ROUNDS = 3
# Rounds that the host of the store stays after it has published a failure, so that every rank has read it.
_LINGER_ROUNDS = 3
# Rounds between reading of a failure and ending the process: the main thread may be about to end it more gracefully,
# because its own collective has raised as well.
_GRACE_ROUNDS = 2
# How long a main thread that has called `blame` may take to end the process.
_MAIN_THREAD_SECONDS = 10.0
_CALLBACK_SECONDS = 5.0
_MAX_NAMED_RANKS = 16
_ORDERLY_EXIT_CODES = (None, 0, 75)  # 75: stopped on a signal after saving, all ranks together

_generation = 0  # heartbeats made so far in this process; the same number on every rank


@dataclass
class HeartbeatConfig:
    """How ranks watch each other."""

    enabled: bool = True
    """Whether ranks watch each other (never in a run of one rank)."""
    interval_seconds: float = 2.0
    """Seconds between two beats."""
    timeout_seconds: float = 30.0
    """Silence after which a rank counts as lost and the run ends. A rank is silent when it is dead or stopped, or when
    something holds Python's interpreter lock for that long."""
    start_timeout_seconds: float = 300.0
    """How long a rank may take to its first beat, counted from the watching rank's own."""

    def validate(self) -> list[str]:
        """Problems a person can fix."""
        problems = []
        if self.interval_seconds <= 0:
            problems.append(f"heartbeat.interval_seconds={self.interval_seconds} must be more than 0")
        if self.timeout_seconds < 5 * self.interval_seconds:
            problems.append(
                f"heartbeat.timeout_seconds={self.timeout_seconds} must be at least 5 x "
                f"interval_seconds={self.interval_seconds}, so that one late beat ends no run"
            )
        return problems


@dataclass(frozen=True)
class Failure:
    """Why the run must end; the same on every rank, because the first one published counts."""

    ranks: tuple[int, ...]
    """The ranks that caused it."""
    message: str
    """A sentence that names them, their hosts and steps."""


class RankLost(RuntimeError):
    """A collective failed because other ranks are dead or stopped; the message names them."""


@dataclass(frozen=True)
class _Beat:
    """What a rank says of itself, again and again."""

    count: int
    step: int
    host: str
    pid: int
    pid_space: str  # two processes with the same host and pid_space see the same process ids
    left: bool = False

    def encode(self) -> str:
        return json.dumps(vars(self))


class Heartbeat:
    """Beats, watches the next rank, and ends this process when any rank is lost.

    A daemon thread writes this rank's beat to the store every `interval_seconds`, looks at the beat of rank
    (r + 1) % W and at the key `failed`: O(W) requests a round in all, on a connection of its own (a thread that waits
    in a store's call blocks everyone who shares the connection). Who finds its neighbour silent looks once at all
    ranks (a whole node may be gone), and publishes them under `failed`. Every rank that reads it prints the message,
    calls `on_failure` and ends with `os._exit(1)`: its main thread may hang in a collective for ever.

    Two cases have no store to publish in. If rank 0 (or the launcher's agent) is killed, the store's connections
    break; if it is stopped, its calls never return, which a second thread notices. Each rank then ends by itself.

    Silence is counted in this rank's own rounds, so that a job that was suspended and continued as a whole goes on.

    As a context manager it also deals with what this rank raises: a `RuntimeError` (a collective's, perhaps) becomes
    `RankLost` if ranks are dead; any other failure is published, so that nobody waits for this rank.

    `on_failure(message, step)` is called where the thread ends the process: on the lowest surviving rank, or on every
    rank when the store is gone. It runs in a thread and has five seconds.
    """

    def __init__(
        self,
        config: HeartbeatConfig,
        store: Any,
        rank: int,
        world_size: int,
        on_failure: Callable[[str, int], None] | None = None,
    ) -> None:
        """`store` must be this object's own connection (`store.clone()`). Ranks must make their heartbeats in the
        same order, since each gets keys of its own. Most callers want `Heartbeat.start`."""
        global _generation
        _generation += 1
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._on_failure = on_failure
        self._host = socket.gethostname()
        self._pid_space = _pid_space()
        self._step = 0
        self._count = 0
        self._rounds = 0
        self._request = ""  # from the main thread to the one below: "blame", "leave" or "fail:<why>"
        self._leaving = False
        self._wake = threading.Event()
        self._answered = threading.Event()
        self._failure: Failure | None = None
        self._stood_still = 0.0
        self._ended = False
        self._ending = threading.Lock()
        self._handing_over = threading.Lock()
        self._told = False
        self._main_thread_until = 0.0
        self._first_rank_beat: _Beat | None = None
        self._server: Any = None
        self._active = config.enabled and world_size > 1
        if not self._active:
            return

        from torch.distributed.distributed_c10d import PrefixStore

        self._store_name = _describe(store)
        self._store = PrefixStore(f"rung/heartbeat/{_generation}", store)
        self._thread = threading.Thread(target=self._beat_until_left, name="rung-heartbeat", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard_store, name="rung-heartbeat-guard", daemon=True).start()

    @classmethod
    def start(cls, config: HeartbeatConfig, on_failure: Callable[[str, int], None] | None = None) -> Heartbeat:
        """The heartbeat of this process in the default process group; every rank must call it, right after
        `init_process_group`. Without a group, or alone in it, the result does nothing."""
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1 or not config.enabled:
            return cls(config, None, 0, 1)
        store: Any = dist.distributed_c10d._get_default_store()
        heartbeat = cls(config, store.clone(), dist.get_rank(), dist.get_world_size(), on_failure)
        heartbeat._server = store  # on rank 0 it may be the server, which must outlive destroy_process_group
        return heartbeat

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in _ORDERLY_EXIT_CODES):
            self.stop()
            return
        failure = self.blame() if isinstance(error, RuntimeError) else None
        if failure is not None:
            raise RankLost(failure.message) from error
        self.fail(f"{type(error).__name__}: {error}")

    def at(self, step: int) -> None:
        """Tell which step this rank is at; it goes out with the next beat."""
        self._step = step

    def blame(self) -> Failure | None:
        """Which ranks are dead? For a rank whose collective has raised, before it raises its own error.

        Looks at everyone's beats for about three intervals; None if all are alive (the error is then this rank's own,
        see `fail`). A failure that another rank has published meanwhile is returned as published. The caller must then
        end the process; after ten seconds the thread here does.
        """
        if not self._active or self._ended:
            return None
        with self._handing_over:
            told, self._main_thread_until = self._told, float("inf")
        if told:  # the thread is about to end the process, and has said why
            time.sleep(_MAIN_THREAD_SECONDS)
        if self._failure is None:
            self._ask("blame", timeout=self._config.timeout_seconds)
        failure = self._failure
        if failure is not None and self._rank == 0:
            self._linger()
        self._main_thread_until = time.monotonic() + _MAIN_THREAD_SECONDS if failure is not None else 0.0
        return failure

    def fail(self, reason: str) -> None:
        """Publish that this rank has failed and why, so that the others end now, naming it; then stop beating."""
        if not self._active or self._ended:
            return
        if self._failure is None:
            self._ask("fail:" + reason[:1000], timeout=5 * self._config.interval_seconds)
        if self._rank == 0:
            self._linger()
        self._ended = True

    def stop(self) -> None:
        """Leave in good order, before the process group is destroyed. Rank 0, which may hold the store, waits for the
        others for as long as they are alive."""
        if not self._active or self._ended:
            return
        self._leaving = True
        self._ask("leave", timeout=None)  # the thread answers, or the guard if the store does not
        self._ended = True

    # The main thread asks; the thread below does everything that touches the store.

    def _ask(self, request: str, timeout: float | None) -> None:
        self._answered.clear()
        self._request = request
        self._wake.set()
        if self._failure is None:  # otherwise the thread is ending the process and takes no requests
            self._answered.wait(timeout)

    def _linger(self) -> None:
        time.sleep(_LINGER_ROUNDS * self._config.interval_seconds)

    def _beat_until_left(self) -> None:
        try:
            self._watch_next_rank()
        except Exception as error:  # torch raises several kinds when a connection breaks
            if not self._leaving and not self._ended:
                self._store_failed(f"has broken off ({type(error).__name__})")
        finally:
            self._ended = True
            self._answered.set()

    def _watch_next_rank(self) -> None:
        config, neighbour = self._config, (self._rank + 1) % self._world_size
        watched: _Beat | None = None
        silent_for, before = 0.0, time.monotonic()
        while True:
            self._round()
            request, self._request = self._request, ""
            failure = self._published()
            if request.startswith("fail:"):
                if failure is None:
                    self._publish((self._rank,), f"{self._name(self._rank, self._beat())} failed: {request[5:]}")
                return
            if request == "leave":
                self._leave()
                return
            if request == "blame":
                failure = failure or self._find_silent(None)
                if failure is None:
                    self._answered.set()
            if failure is not None:
                self._end(failure)
                return

            now = time.monotonic()
            # Time in which this rank itself stood still says nothing about its neighbour.
            silent_for += min(now - before, 2 * config.interval_seconds)
            if now - before > config.timeout_seconds:
                self._stood_still = now - before
            before = now
            beat = self._read(neighbour)
            if beat is not None and (beat.left or beat != watched):
                watched, silent_for = beat, 0.0
            allowed = config.start_timeout_seconds if watched is None else config.timeout_seconds
            if silent_for > allowed:
                self._find_silent(silent_for)
                continue  # to the published failure, if somebody is silent still
            self._wake.wait(config.interval_seconds)
            self._wake.clear()

    def _round(self) -> None:
        self._count += 1
        self._store.set(f"beat/{self._rank}", self._beat().encode())
        if self._first_rank_beat is None:
            self._first_rank_beat = self._read(0)
        self._rounds += 1

    def _beat(self, left: bool = False) -> _Beat:
        return _Beat(self._count, self._step, self._host, os.getpid(), self._pid_space, left)

    def _read(self, rank: int) -> _Beat | None:
        key = f"beat/{rank}"
        # get() waits for a key that is missing, so ask first.
        return _Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _leave(self) -> None:
        self._store.set(f"beat/{self._rank}", self._beat(left=True).encode())
        self._store.add("left", 1)
        if self._rank != 0:
            return
        # This process may hold the store: stay for as long as somebody who has not left is alive.
        pause = min(0.1, self._config.interval_seconds)
        beats: list[_Beat | None] = []
        silent_for = since_look = 0.0
        while self._store.add("left", 0) < self._world_size and not self._store.check(["failed"]):
            if since_look >= self._config.interval_seconds:
                before, beats, since_look = beats, [self._read(rank) for rank in range(self._world_size)], 0.0
                silent_for = silent_for if beats == before else 0.0
            if silent_for > self._config.timeout_seconds:
                return
            time.sleep(pause)
            silent_for += pause
            since_look += pause
            self._rounds += 1

    def _find_silent(self, silent_for: float | None) -> Failure | None:
        """Look at all ranks for a while; publish those that neither beat nor left."""
        started = time.monotonic()
        before = [self._read(rank) for rank in range(self._world_size)]
        for _ in range(_CENSUS_ROUNDS):
            time.sleep(self._config.interval_seconds)
            self._round()
        silent: dict[int, _Beat | None] = {}
        for rank, old in enumerate(before):
            new = self._read(rank)
            # A rank without a first beat is silent only for one who has waited long for it.
            if (new == old and not (new and new.left)) and (new is not None or silent_for is not None):
                silent[rank] = new
        silent.pop(self._rank, None)
        if not silent:
            return self._published()
        seconds = (silent_for or 0.0) + time.monotonic() - started
        names = [self._name(rank, beat) for rank, beat in silent.items()]
        if len(names) == 1:
            ((rank, beat),) = silent.items()
            where = "has not sent a first beat" if beat is None else f"has been silent for {seconds:.0f} s"
            message = f"rank {rank} (host {beat.host if beat else 'unknown'}) {where}" + (
                f" at step {beat.step}" if beat else ""
            )
        else:
            listed = ", ".join(names[:_MAX_NAMED_RANKS]) + (", ..." if len(names) > _MAX_NAMED_RANKS else "")
            message = f"{len(names)} ranks have been silent for {seconds:.0f} s: {listed}"
        if self._stood_still:
            message += f" (rank {self._rank}, which says so, stood still itself for {self._stood_still:.0f} s)"
        failure = self._publish(tuple(silent), message)
        for beat in silent.values():
            self._wake_up(beat)
        return failure

    def _name(self, rank: int, beat: _Beat | None) -> str:
        return f"rank {rank} (host {beat.host}, step {beat.step})" if beat else f"rank {rank} (never seen)"

    def _publish(self, ranks: tuple[int, ...], message: str) -> Failure:
        text = json.dumps({"ranks": ranks, "message": message + "; ending this run"})
        return _decode_failure(self._store.compare_set("failed", "", text))

    def _published(self) -> Failure | None:
        return _decode_failure(self._store.get("failed")) if self._store.check(["failed"]) else None

    def _guard_store(self) -> None:
        """Notice that a call to the store does not return: whoever holds the store is stopped or unreachable."""
        interval = self._config.interval_seconds
        seen, silent_for, before = -1, 0.0, time.monotonic()
        while not (self._ended or self._failure):
            time.sleep(interval)
            now = time.monotonic()
            silent_for += min(now - before, 2 * interval)
            before = now
            if self._rounds != seen:
                seen, silent_for = self._rounds, 0.0
            if silent_for > self._config.timeout_seconds:
                if self._leaving:
                    self._answered.set()
                    return
                self._wake_up(self._first_rank_beat)
                self._store_failed(f"has not answered for {silent_for:.0f} s")
                return

    def _store_failed(self, what: str) -> None:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            ranks: tuple[int, ...] = ()
            holder, store = "the launcher that holds it", f"the launcher's store at {self._store_name}"
        else:
            ranks, holder, store = (0,), "rank 0", f"rank 0's store at {self._store_name}"
        message = f"{store} {what} at step {self._step}: {holder} is dead, stopped or unreachable; ending this run"
        self._end(Failure(ranks, message), everywhere=True)

    def _wake_up(self, beat: _Beat | None) -> None:
        """Let a stopped process run again, if it is a neighbour on this machine, so that it can see the failure and end
        (torchrun would wait another 30 s before it kills it). Does nothing to a process that is running or gone."""
        if beat is not None and beat.host == self._host and beat.pid_space == self._pid_space != "":
            with contextlib.suppress(OSError):
                os.kill(beat.pid, signal.SIGCONT)

    def _end(self, failure: Failure, everywhere: bool = False) -> None:
        """End this process, unless the main thread does so first."""
        with self._ending:  # both threads may get here; the second waits for the end
            self._failure = failure
            self._answered.set()
            grace = time.monotonic() + _GRACE_ROUNDS * self._config.interval_seconds
            while not self._told:
                time.sleep(min(0.1, self._config.interval_seconds))
                if self._ended:
                    return
                with self._handing_over:
                    self._told = time.monotonic() >= max(grace, self._main_thread_until)
            _say(f"[rank {self._rank}] {failure.message}")
            lowest = next((rank for rank in range(self._world_size) if rank not in failure.ranks), None)
            report = everywhere or lowest == self._rank
            worker = threading.Thread(target=self._finish, args=(failure, report), daemon=True)
            worker.start()
            worker.join(_CALLBACK_SECONDS)
            if self._rank == 0 and not everywhere:
                self._linger()
            os._exit(1)

    def _finish(self, failure: Failure, report: bool) -> None:
        # In a thread of its own with a time limit: a file system may hang, and so may a pipe nobody reads.
        if report and self._on_failure is not None:
            try:
                self._on_failure(failure.message, self._step)
            except Exception as error:
                _say(f"[rank {self._rank}] and on_failure raised {type(error).__name__}: {error}")
        sys.stdout.flush()


def _decode_failure(text: bytes | str) -> Failure:
    values = json.loads(text)
    return Failure(tuple(values["ranks"]), values["message"])


def _pid_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _describe(store: Any) -> str:
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return f"{store.host}:{store.port}" if hasattr(store, "host") else type(store).__name__


def _say(text: str) -> None:
    os.write(2, (text + "\n").encode())  # not sys.stderr, whose lock a hanging thread may hold
