"""The folder of a run: claimed by one run at a time, and only by the run that it already holds."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import IO, Any

from rung.config import flatten, to_yaml
from rung.errors import UserError
from rung.recipes.config import Config, changes_that_matter

__all__ = ["claim"]


def claim(config: Config, notes: list[str]) -> IO[Any]:
    """Create ``run.dir``, lock it, and write ``resolved.yaml``. Returns the open lock: keep it until the run ends.

    Called on rank 0. Harmless changes against an earlier run in the same folder are appended to ``notes``. Raises
    UserError where the folder cannot be written, is in use, or holds a run that differs where it may not.
    """
    import yaml

    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 - held open for the life of the run
    except OSError as error:
        raise UserError(
            f"run.dir={folder} cannot be written: {error.strerror or error}; choose another run.dir"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise UserError(f"run.dir={folder} is in use by another run; wait for it or choose another run.dir") from error
    resolved = folder / "resolved.yaml"
    if resolved.exists():
        old = flatten(yaml.safe_load(resolved.read_text()) or {})
        new = flatten(yaml.safe_load(to_yaml(config)))
        harmless, serious = changes_that_matter(old, new, config.run.allow_changes)
        if serious:
            lock.close()
            raise UserError(
                f"run.dir={folder} holds a run that differs:\n"
                + "\n".join(f"  - {line}" for line in serious)
                + "\nchoose another run.dir, or name these keys in run.allow_changes"
            )
        notes += [f"changed since this run began: {line}" for line in harmless]
        notes.append("this folder held a run; without checkpoints it starts over, and its metrics are replaced")
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    partial = resolved.with_suffix(".yaml.partial")
    partial.write_text(to_yaml(config))
    os.replace(partial, resolved)
    return lock
