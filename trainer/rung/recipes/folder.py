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

__all__ = ["Claim"]

OURS = ("metrics.jsonl", "status.json", "export", "loss.png", "tensorboard")


class Claim:
    """The hold of a run on its folder, on rank 0: first ask, which changes nothing, then ``commit``.

    Between the two everything that can be refused is refused, so that a mistake costs an earlier run nothing.
    """

    def __init__(self, config: Config) -> None:
        """Lock ``run.dir`` and compare. Raises UserError where the folder cannot be written, is in use, holds files of
        somebody else, or a run that differs where it may not."""
        self._config = config
        self._folder = Path(config.run.dir)
        self._lock = self._locked()
        self.notes: list[str] = []
        """What is to be told: harmless changes against the run that the folder holds."""
        if self._holds_steps():
            self._compare()
            self.notes.append(
                "this folder held a run; without checkpoints it starts over, and its metrics are replaced"
            )
        elif not (self._folder / "resolved.yaml").exists():
            foreign = [name for name in OURS if (self._folder / name).exists()]
            if foreign:
                raise UserError(
                    f"run.dir={self._folder} holds {', '.join(foreign)} of something that is no run of Rung's; "
                    "choose another run.dir"
                )

    def commit(self) -> None:
        """The run begins: an earlier one's TensorBoard files go, and ``resolved.yaml`` says what runs now."""
        shutil.rmtree(self._folder / "tensorboard", ignore_errors=True)
        partial = self._folder / "resolved.yaml.partial"
        partial.write_text(to_yaml(self._config))
        os.replace(partial, self._folder / "resolved.yaml")

    def _locked(self) -> IO[Any]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = open(self._folder / ".lock", "w")  # noqa: SIM115 - held open for the life of the run
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"run.dir={self._folder} cannot be written: {reason}; choose another run.dir") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise UserError(
                f"run.dir={self._folder} is in use by another run; wait for it or choose another run.dir"
            ) from error
        return lock

    def _holds_steps(self) -> bool:
        resolved, metrics = self._folder / "resolved.yaml", self._folder / "metrics.jsonl"
        return resolved.is_file() and metrics.is_file() and metrics.stat().st_size > 0

    def _compare(self) -> None:
        import yaml

        resolved = self._folder / "resolved.yaml"
        try:
            old = flatten(yaml.safe_load(resolved.read_text()))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{resolved} is damaged; move it away or choose another run.dir") from error
        new = flatten(yaml.safe_load(to_yaml(self._config)))
        harmless, serious = changes_that_matter(old, new, self._config.run.allow_changes)
        if serious:
            raise UserError(
                f"run.dir={self._folder} holds a run that differs:\n"
                + "\n".join(f"  - {line}" for line in serious)
                + "\nchoose another run.dir, or name these keys in run.allow_changes"
            )
        self.notes += [f"changed since this run began: {line}" for line in harmless]
