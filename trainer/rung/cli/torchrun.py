"""torchrun with an honest exit code: `python -m rung.cli.torchrun …` takes torchrun's arguments.

torchrun turns every failure of a worker into exit code 1, so that "the input is wrong" (2) and "stopped after saving,
run again" (75) are lost to whoever started it: a shell, or a Slurm job that decides whether to queue itself again. When
it is signalled itself it forgets the workers' codes altogether. Here the worker's code is the code of the whole, and
for those, and for 128 + N of a run that signal N stopped, nothing is printed beyond the worker's own words.

With --start-method=forkserver, spelt so and for `-m rung.train` alone, workers are forked from one process that has
imported torch and rung, in place of each importing for itself. That is for machines without CUDA: a process that has
touched CUDA must not be forked, and nobody answers for what imports touch.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rung.cli import report
from rung.cli import run as run_verb
from rung.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

__all__ = ["main"]

USER_ERROR, STOPPED_AFTER_SAVING = 2, 75
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FORKED = "--start-method=forkserver"


def main(arguments: Sequence[str]) -> int:
    """Run torchrun in this process and return the exit code of the worker that failed first, or 0.

    SIGTERM, SIGINT and SIGHUP are handed to the workers, which have TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (default
    600) to stop.
    """
    forked = FORKED in arguments
    signals: list[int] = []

    def hand_on(number: int, _: object) -> None:
        signals.append(number)
        _hand_to_workers(number, forked=forked)

    if forked:
        for handled in HANDED_ON:  # what forks workers ignores them: a signal to the whole group must not orphan these
            signal.signal(handled, signal.SIG_IGN)
        multiprocessing.set_forkserver_preload(["rung.recipes.pretrain", "torch._dynamo", "hydra.core.global_hydra"])
        multiprocessing.forkserver.ensure_running()  # it imports while this process imports too
    for handled in HANDED_ON:
        signal.signal(handled, hand_on)
    try:
        return _run(arguments, signals, forked=forked)
    finally:
        if forked:
            _end_forkserver()


def _run(arguments: Sequence[str], signals: Sequence[int], *, forked: bool) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import config_from_args, elastic_launch, parse_args, run

    # What these loggers say when a worker ends is said below, once, and only where it is news.
    for name in ("elastic.multiprocessing.api", "elastic.agent.server.api"):
        logging.getLogger(f"torch.distributed.{name}").setLevel(logging.CRITICAL)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)
    parsed = parse_args(["--signals-to-handle=SIGQUIT", *arguments])
    try:
        trains = parsed.module and parsed.training_script == "rung.train"
        if forked and not trains:
            raise UserError(f"{FORKED} forks -m rung.train only, not {parsed.training_script}; leave it out")
        if trains and parsed.nnodes in ("1", "1:1"):  # the latter is torchrun's default
            _refuse_early(parsed.training_script_args, parsed.nproc_per_node)
        if forked:
            config, _, _ = config_from_args(parsed)
            elastic_launch(config, _train)(*parsed.training_script_args)
        else:
            run(parsed)
    except UserError as error:
        return report(error)
    except ChildFailedError as error:
        code = _exit_code(error)
        stopped = {128 + number for number in (*HANDED_ON, signal.SIGUSR1)}
        if code not in (USER_ERROR, STOPPED_AFTER_SAVING, *stopped) and not signals:
            print(error, file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _refuse_early(overrides: Sequence[str], nproc: str) -> None:
    """Raise the UserError that every worker would raise, before any is started."""
    if any(override.startswith("-") for override in overrides):
        return  # --help, --cfg and what is unknown are for `rung train` to answer
    from torch.distributed.run import determine_local_world_size

    from rung.recipes.config import load_config

    load_config(overrides, determine_local_world_size(nproc))


def _train(*overrides: str) -> None:
    """What a forked worker runs: `rung train`, in a session of its own like any worker. torchrun waits for a return
    value from all, so only a failure may exit."""
    os.setsid()
    for handled in HANDED_ON:
        signal.signal(handled, signal.SIG_DFL)
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if status := run_verb(["train", *overrides]):
        os._exit(status)


def _hand_to_workers(number: int, *, forked: bool) -> None:
    """Signal all workers and wait for all of them: torchrun, left to itself, ends the rest when the first is gone.

    What has not ended after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (default 600) is killed.
    """
    deadline = time.monotonic() + float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"))
    running: dict[int, Callable[[], bool]]
    if forked:
        running = {process.pid: process.is_alive for process in multiprocessing.active_children() if process.pid}
    else:
        running = {pid: functools.partial(_is_running, pid) for pid in _children()}
    if not running:
        _end_forkserver()
        os._exit(128 + number)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    while any(is_running() for is_running in running.values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid, is_running in running.items():
        if is_running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _children() -> list[int]:
    """Processes that this one has started and not reaped."""
    return [int(pid) for thread in Path("/proc/self/task").glob("*/children") for pid in thread.read_text().split()]


def _end_forkserver() -> None:
    """End what forks workers, which otherwise finishes its imports before it sees that nobody wants any. It ignores
    gentler signals."""
    for pid in _children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_running(pid: int) -> bool:
    """Whether a child has not ended; one that has is not reaped, since torchrun reads its code."""
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
    return False


def _exit_code(error: ChildFailedError) -> int:
    """The first failure's own code. Workers that the agent ended because of it have negative codes and do not count."""
    first = min(error.failures.values(), key=lambda failure: (failure.exitcode < 0, failure.timestamp))
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
