"""The ``rung`` command: verbs, and what an exit status means. No logic of its own."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from rung.errors import CheckpointError, LocalUserError, UserError

__all__ = ["entry", "main", "report", "run", "run_and_exit"]

VERBS = {
    "train": ("rung.cli.train", "train a model: rung train [key=value ...]"),
    "data": ("rung.cli.data", "build or inspect a corpus"),
    "ckpt": ("rung.cli.ckpt", "look into, check, convert checkpoints"),
    "eval": ("rung.cli.evaluate", "held-out loss and bits per byte of a finished run"),
    "sample": ("rung.cli.sample", "continue a prompt with a finished run's weights"),
    "plot": ("rung.cli.plot", "draw loss curves of runs"),
    "runs": ("rung.cli.runs", "list runs below a folder"),
    "launch": ("rung.cli.launch", "start training on this machine or on Slurm"),
    "doctor": ("rung.cli.doctor", "check this machine"),
}

USAGE = "usage: rung VERB [arguments]\n\n" + "\n".join(f"  {verb:8} {what}" for verb, (_, what) in VERBS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 done, 2 wrong input, 128 + N stopped by signal N, else failure."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    verb, *rest = arguments
    try:
        if verb in ("-V", "--version"):
            from rung import __version__

            print(f"rung {__version__}")
            return 0
        if verb not in VERBS:
            import difflib

            near = difflib.get_close_matches(verb, VERBS, n=1)
            raise UserError(
                f"unknown verb {verb!r}; " + (f"did you mean {near[0]}?" if near else f"one of: {', '.join(VERBS)}")
            )
        status: int = importlib.import_module(VERBS[verb][0]).main(rest)
        return status
    except (UserError, CheckpointError) as error:
        return report(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if arguments[0] in ("train", "launch"):
            raise
        # `rung runs | head`: nothing more is wanted. Python would complain of the pipe once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def report(error: UserError | CheckpointError) -> int:
    """One clear message and the exit status: rank 0 speaks for all, unless a rank has a problem of its own.

    A launcher ends all ranks when the first one exits, so the others leave rank 0 the time to speak.
    """
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0" or isinstance(error, LocalUserError):
        who = "" if rank == "0" else f"rank {rank}: "
        print(f"rung: error: {who}{error}", file=sys.stderr, flush=True)
    else:
        time.sleep(2.0)
    return 2 if isinstance(error, UserError) else 1


def entry() -> NoReturn:
    """The ``rung`` command."""
    run_and_exit(sys.argv[1:])


def run_and_exit(argv: Sequence[str]) -> NoReturn:
    """Run a verb as a whole process.

    Threads of communication libraries can abort a process that is being torn down ("terminate called without an active
    exception"), after its work is done; so the process ends at once.
    """
    os._exit(run(argv))


def run(argv: Sequence[str]) -> int:
    """Run a verb as the last thing that a process does; returns the exit status, with all output flushed."""
    status = 1
    if argv[:1] == ["train"] or argv[:2] == ["ckpt", "reshard"]:
        # Until a run handles signals itself it has nothing to save: Ctrl-C ends it at once, also while it waits, in C,
        # for ranks that will never come.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        status = main(argv)
    except SystemExit as stop:  # argparse
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return status
