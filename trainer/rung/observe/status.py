"""`status.json`: how a run stands, readable at any moment by people and by launchers."""

from __future__ import annotations

import json
import os
import socket
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["STATES", "Status", "read_status", "write_status"]

STATES = ("running", "completed", "stopped", "failed")


@dataclass(frozen=True)
class Status:
    """What `status.json` holds."""

    state: str
    """One of `STATES`: running, completed, stopped (on a signal, after saving) or failed."""
    step: int
    """The last finished step (0 before the first)."""
    error: str | None = None
    """What went wrong; null unless the run failed."""


def write_status(run_dir: str | Path, state: str, step: int, error: str | None = None) -> None:
    """Replace `run_dir/status.json`. A reader sees the old file or the new one, never half of one.

    Several ranks may write at once (when rank 0 has died, whoever is left does it): each writes a temporary file of
    its own and the last rename wins.
    """
    assert state in STATES, state
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".status.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.tmp"
    temporary.write_text(json.dumps(asdict(Status(state, step, error))) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "status.json")


def read_status(run_dir: str | Path) -> Status | None:
    """The run's status, or None where there is none (or it is not ours)."""
    try:
        values = json.loads((Path(run_dir) / "status.json").read_text(encoding="utf-8"))
        return Status(str(values["state"]), int(values["step"]), values.get("error"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
