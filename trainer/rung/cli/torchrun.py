"""torchrun with an honest exit code: `python -m rung.cli.torchrun …` takes torchrun's arguments.

torchrun turns every failure of a worker into exit code 1, so that "the input is wrong" (2) and "stopped after saving,
run again" (75) are lost to whoever started it: a shell, or a Slurm job that decides whether to queue itself again. Here
the worker's code is the code of the whole, and for those two nothing is printed beyond the worker's own words.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

__all__ = ["main"]

USER_ERROR, STOPPED_AFTER_SAVING = 2, 75


def main(arguments: Sequence[str]) -> int:
    """Run torchrun in this process and return the exit code of the worker that failed first, or 0.

    A signal that ends the agent (SIGTERM, SIGINT …) has been handed to the workers, which save and stop: 75.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    # What these loggers say when a worker ends is said below, once, and only where it is news.
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        run(list(arguments))
    except ChildFailedError as error:
        code = _exit_code(error)
        if code not in (USER_ERROR, STOPPED_AFTER_SAVING):
            print(error, file=sys.stderr)
        return code
    except SignalException:
        return STOPPED_AFTER_SAVING
    return 0


def _exit_code(error: ChildFailedError) -> int:
    """The first failure's own code. Workers that the agent ended because of it have negative codes and do not count."""
    first = min(error.failures.values(), key=lambda failure: (failure.exitcode < 0, failure.timestamp))
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
