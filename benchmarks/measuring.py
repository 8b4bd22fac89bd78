"""What the benchmarks share: facts about the machine, programs that take turns, medians and spreads, result files.

Two programs are only compared inside one interleaved run: each is a process of its own, one works for a few steps
while the others wait, the order changes from round to round, and ratios are made within a round. Drift of the machine
(heat, neighbours) then touches all alike, and what is left shows in the spread.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


# --- facts


def machine() -> dict[str, Any]:
    """What a reader must know of the machine and the software. Imports torch."""
    import torch

    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        facts |= {"cuda": torch.version.cuda, "driver": _driver()}
    return facts


def _cpu_model() -> str:
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    numbers = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    return fields.get("model name", platform.processor() or platform.machine()) + numbers


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def commit() -> str | None:
    """The commit that was measured; '+' where files differ from it; None outside a repository."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all values."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": [float(f"{value:.5g}") for value in values],
    }


def write(result: Mapping[str, Any], output: str | os.PathLike[str] | None) -> None:
    """Print the result as JSON, or write it to ``output``."""
    text = to_json(result)
    if output is None:
        print(text)
        return
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(text + "\n")
    print(f"written to {output}")


def to_json(value: Any, indent: str = "") -> str:
    """JSON with a line per key and lists on one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    inner = indent + "  "
    lines = [f"{inner}{json.dumps(key)}: {to_json(item, inner)}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns for a person."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# --- disturbance


@dataclass(frozen=True)
class Ticks:
    """Clock ticks that all processors spent so far: at work, stolen by the hypervisor, in all; and at work for us."""

    busy: int
    stolen: int
    total: int
    ours: int

    @classmethod
    def now(cls, pids: Sequence[int]) -> Ticks:
        """``pids``: our processes, this one aside; what they started counts as ours."""
        user, nice, system, idle, wait, irq, soft, stolen = (
            int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        busy = user + nice + system + irq + soft
        return cls(busy, stolen, busy + stolen + idle + wait, _ticks_of(os.getpid(), *pids))

    def disturbance_since(self, before: Ticks) -> float:
        """Share of the processors that others had: other processes' work and stolen time, 0..1."""
        total = self.total - before.total
        others = (self.busy - before.busy) - (self.ours - before.ours) + self.stolen - before.stolen
        return max(0.0, others / total) if total else 0.0


def wait_for_quiet(max_disturbance: float, patience_seconds: float, pids: Sequence[int] = ()) -> float:
    """Wait, so long at most, until others leave the processors alone for three seconds; returns the seconds it took."""
    begun = time.monotonic()
    while (waited := time.monotonic() - begun) < patience_seconds:
        before = Ticks.now(pids)
        time.sleep(3)
        if Ticks.now(pids).disturbance_since(before) <= max_disturbance:
            break
    return waited


def _ticks_of(*pids: int) -> int:
    """Ticks of these processes and of all that descend from them."""
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended
            fields = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    ours = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(ticks.get(pid, 0) for pid in ours)


# --- turns, seen from the program that works


class Turns:
    """A program's side: it asks before every step, and waits inside the question while it is not its turn."""

    def __init__(self, commands: TextIO, replies: TextIO, device: str) -> None:
        self._commands, self._replies, self._device = commands, replies, device
        self._left = 0
        self._started: float | None = None
        self._processor_started = 0.0
        self.loss: Any = None
        """Of the last step, a 0-dim tensor; read only at the end of a turn."""

    def next(self) -> bool:
        """Called where a step begins, which is where the one before ended. False: no further step is wanted."""
        if self._left == 0:
            self._report()
            command = self._commands.readline().split()
            if not command or command[0] != "run":
                return False
            self._left = int(command[1])
            self._started, self._processor_started = time.perf_counter(), time.process_time()
        self._left -= 1
        return True

    def _report(self) -> None:
        import torch

        on_gpu = self._device == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        reply: dict[str, Any] = {}
        if self._started is None:
            reply["ready"] = True
        else:
            reply["seconds"] = time.perf_counter() - self._started
            reply["processor_seconds"] = time.process_time() - self._processor_started
            reply["loss"] = None if self.loss is None else float(self.loss)
        if on_gpu:
            reply["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.empty_cache()  # others need the room while this program waits
        else:
            import resource

            reply["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.send(reply)

    def send(self, reply: Mapping[str, Any]) -> None:
        """Answer the driver."""
        print(json.dumps(reply), file=self._replies, flush=True)


# --- turns, seen from the driver


class Failed(Exception):
    """A program ended or broke; the text says how."""


@dataclass
class Program:
    """A program under measurement, in a process of its own."""

    name: str
    argv: Sequence[str]
    """Command line; the numbers of two open files are appended: commands to read, replies to write."""
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)
    error: str | None = None
    start_seconds: float = 0.0
    """From the start of the process to its first step, that step not included."""

    def start(self) -> None:
        """Start the process; ``reply()`` then waits until it is ready."""
        command_read, command_write = os.pipe()
        reply_read, reply_write = os.pipe()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*self.argv, str(command_read), str(reply_write)],
                pass_fds=(command_read, reply_write),
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.close(command_read)
        os.close(reply_write)
        self._commands = os.fdopen(command_write, "w")
        self._replies = os.fdopen(reply_read)

    def run(self, steps: int, timeout: float) -> dict[str, Any]:
        """Let it run some steps; its reply."""
        with contextlib.suppress(BrokenPipeError):  # reply() says why
            print(f"run {steps}", file=self._commands, flush=True)
        return self.reply(timeout)

    def reply(self, timeout: float) -> dict[str, Any]:
        """The next reply. Raises Failed with the end of the log when there is none in time."""
        ready, _, _ = select.select([self._replies], [], [], timeout)
        line = self._replies.readline() if ready else ""
        answer: dict[str, Any] = json.loads(line) if line else {}
        if "error" in answer:
            raise Failed(answer["error"])
        if not answer:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise Failed(f"no answer within {timeout:.0f} s\n{tail}" if not ready else f"ended\n{tail}")
        return answer

    def stop(self) -> None:
        """End the process."""
        for pipe in (self._commands, self._replies):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class Turn:
    """What one program did in one round."""

    seconds: float
    processor_seconds: float
    """Of all its threads: says less than the clock, and suffers less from other processes."""
    loss: float | None
    peak_gib: float
    disturbance: float


@dataclass(frozen=True)
class Contest:
    """Turns by program; turn i of every program belongs to the same round, unless the program failed before it."""

    turns: dict[str, list[Turn]]
    disturbed: dict[str, list[Turn]]
    """Of rounds that were not counted because other processes worked on the machine meanwhile."""


def interleave(
    programs: Sequence[Program],
    *,
    rounds: int,
    attempts: int,
    steps: int,
    warmup_steps: int,
    max_disturbance: float,
    together: bool = False,
    patience_seconds: float = 0.0,
    timeout: float = 600.0,
    deadline: float = float("inf"),
) -> Contest:
    """Start all programs and let them take turns of ``steps`` steps, after one of ``warmup_steps`` that is not counted.

    They start one after another, or at once if ``together``. The order rotates from round to round. A round in which
    others had more than ``max_disturbance`` of the processors in any turn counts for no program (whatever the turns
    showed), until ``rounds`` are counted or ``attempts`` were made; where none could be counted, all are. Rounds wait
    until others are quiet, ``patience_seconds`` in all; none but the first begins after ``deadline`` (of
    time.monotonic). A program that fails keeps its ``error`` and takes no further part.
    """
    counted: dict[str, list[Turn]] = {program.name: [] for program in programs}
    disturbed: dict[str, list[Turn]] = {program.name: [] for program in programs}
    alive: list[Program] = []
    started: list[Program] = []
    try:
        for group in [programs] if together else [[program] for program in programs]:
            begun = time.monotonic()
            for program in group:
                program.start()
                started.append(program)
            for program in group:
                if _attempt(program, lambda program=program: program.reply(timeout)) is not None:
                    program.start_seconds = time.monotonic() - begun
                    alive.append(program)
        for program in list(alive):
            if _attempt(program, lambda program=program: program.run(warmup_steps, timeout)) is None:
                alive.remove(program)
        done = 0
        for attempt in range(attempts):
            if done == rounds or (attempt > 0 and time.monotonic() > deadline):
                break
            patience_seconds -= wait_for_quiet(max_disturbance, patience_seconds, [p.process.pid for p in started])
            this: dict[str, Turn] = {}
            first = attempt % max(1, len(alive))
            for program in alive[first:] + alive[:first]:
                time.sleep(0.05)  # threads of the one before stop spinning
                before = Ticks.now([p.process.pid for p in started])
                reply = _attempt(program, lambda program=program: program.run(steps, timeout))
                if reply is None:
                    alive.remove(program)
                    continue
                after = Ticks.now([p.process.pid for p in started])
                this[program.name] = Turn(**reply, disturbance=after.disturbance_since(before))
            quiet = all(turn.disturbance <= max_disturbance for turn in this.values())
            for name, turn in this.items():
                (counted if quiet else disturbed)[name].append(turn)
            done += quiet
            seconds = ", ".join(f"{name} {turn.seconds:.2f} s" for name, turn in this.items())
            print(f"round {done} of {rounds}{'' if quiet else ', disturbed'}: {seconds}", file=sys.stderr, flush=True)
    finally:
        for program in started:
            program.stop()
    return Contest(counted, disturbed) if any(counted.values()) else Contest(disturbed, counted)


def _attempt(program: Program, action: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return action()
    except Failed as error:
        program.error = str(error)
        print(f"{program.name}: {error}", file=sys.stderr, flush=True)
        return None
