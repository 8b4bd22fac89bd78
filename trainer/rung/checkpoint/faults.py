"""Named points at which a test can have a process die, fail or wait. Off unless the environment says so.

``RUNG_FAULT=point:rank:nth[:action]``: when the process of ``rank`` (or ``*``, any) passes ``point`` for the ``nth``
time (1-based), it is killed with SIGKILL; or, by ``action``, gets an OSError of that name (``ENOSPC``), or sleeps that
many seconds (``2.5``).
"""

from __future__ import annotations

import errno
import os
import signal
import time

__all__ = ["POINTS", "reach"]

POINTS = (
    "save.snapshot",  # the state is being copied
    "save.handed_over",  # the copy is complete and the flush process was told
    "write.begin",  # the flush process has begun
    "write.block",  # a block was written
    "write.before_sync",  # the data file is written and not yet durable
    "write.before_part",  # the data file is durable
    "write.part",  # the part is announced
    "commit.merged",  # every part is there, and makes sense
    "commit.before_manifest",
    "commit.manifest",  # the manifest is durable in the attempt
    "commit.renamed",  # the checkpoint is visible, the folder above it not yet durable
    "commit.done",
    "purge.renamed",  # an old checkpoint is no checkpoint any more, and still there
    "purge.partly",  # some of its files are gone
    "load.begin",
    "load.window",  # a window of blocks was read and verified
    "load.done",
)

_passed: dict[str, int] = {}


def reach(point: str, rank: int = 0) -> None:
    """Pass a point. Does nothing unless RUNG_FAULT names it."""
    fault = os.environ.get("RUNG_FAULT")
    if not fault:
        return
    assert point in POINTS, point
    name, who, nth, *action = fault.split(":")
    if name != point or who not in ("*", str(rank)):
        return
    _passed[point] = _passed.get(point, 0) + 1
    if _passed[point] != int(nth):
        return
    if not action:
        os.kill(os.getpid(), signal.SIGKILL)
    elif action[0].startswith("E"):
        number = getattr(errno, action[0])
        raise OSError(number, os.strerror(number))
    else:
        time.sleep(float(action[0]))
