"""torchrun with an honest exit code: `python -m rung.cli.torchrun …` takes torchrun's arguments.

torchrun turns every failure of a worker into exit code 1, so that "the input is wrong" (2) and "stopped after saving,
run again" (75) are lost to whoever started it: a shell, or a Slurm job that decides whether to queue itself again. When
it is signalled itself it forgets the workers' codes altogether. Here the worker's code is the code of the whole, and
for those, and for 128 + N of a run that signal N stopped, nothing is printed beyond the worker's own words.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

__all__ = ["main"]

USER_ERROR, STOPPED_AFTER_SAVING = 2, 75


def main(arguments: Sequence[str]) -> int:
    """Run torchrun in this process and return the exit code of the worker that failed first, or 0.

    SIGTERM, SIGINT and SIGHUP are handed to the workers, which have TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (default
    600) to stop.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    # What these loggers say when a worker ends is said below, once, and only where it is news.
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    signals: list[int] = []

    def hand_on(number: int, _: object) -> None:
        signals.append(number)
        _hand_to_workers(number)

    for handled in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(handled, hand_on)
    try:
        run(["--signals-to-handle=SIGQUIT", *arguments])
    except ChildFailedError as error:
        code = _exit_code(error)
        stopped = {128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
        if code not in (USER_ERROR, STOPPED_AFTER_SAVING, *stopped) and not signals:
            print(error, file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _hand_to_workers(number: int) -> None:
    """Signal all workers and wait for all of them: torchrun, left to itself, ends the rest when the first is gone.

    What has not ended when torchrun's own shutdown time is over is left to it, and it kills.
    """
    deadline = time.monotonic() + float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"))
    children = Path("/proc/self/task").glob("*/children")
    workers = [int(pid) for of_thread in children for pid in of_thread.read_text().split()]
    if not workers:
        sys.exit(128 + number)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    while any(_is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)


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
