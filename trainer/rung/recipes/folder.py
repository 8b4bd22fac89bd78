"""The folder of a run: claimed by one run at a time, and only by the run that it already holds."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rung.checkpoint import CheckpointError, Manifest, Reader, Storage, locate, open_storage
from rung.checkpoint.storage import LocalStorage
from rung.config import flatten, to_yaml
from rung.errors import NewerCheckpointError, UserError
from rung.recipes.config import Config, changes_that_matter

__all__ = ["Claim", "Origin", "none_left"]

OURS = ("metrics.jsonl", "status.json", "export", "loss.png", "tensorboard")
NO_STRUCTURE = {"model.dropout", "model.initializer_range"}
"""Settings of a model that its weights do not depend on."""


class Claim:
    """The hold of a run on its folder, on rank 0: first ask, which changes nothing, then ``commit``.

    Between the two everything that can be refused is refused, so that a mistake costs an earlier run nothing.
    """

    def __init__(self, config: Config) -> None:
        """Lock ``run.dir`` and compare. Raises UserError where the folder cannot be written, is in use, holds files of
        somebody else, or a run that differs where it may not, or where there is nothing at run.resume=PATH."""
        self._config = config
        self._folder = Path(config.run.dir)
        self._locks = [_locked(self._folder, "run.dir")]
        self._storage = self._opened()
        self.notes: list[str] = []
        """What is to be told: harmless changes against the run that the folder holds, and what is begun from."""
        try:
            self.origin = self._origin()
            """The checkpoint to go on from."""
        except OSError as error:
            raise UserError(f"run.resume={config.run.resume} cannot be opened: {error}") from error
        if self.origin is not None:
            self._compare_with_checkpoint(*self.origin.manifest())
        if self.origin is not None and self.origin.is_own:
            return
        if self._holds_steps():
            old = self._resolved()
            self._compare(self._folder / "resolved.yaml", old)
            self._refuse_to_forget(old)
            self.notes.append("this folder held a run; it starts over, and what it left is moved aside")
        elif not (self._folder / "resolved.yaml").exists():
            foreign = [name for name in OURS if (self._folder / name).exists()]
            if foreign:
                raise UserError(
                    f"run.dir={self._folder} holds {', '.join(foreign)} of something that is no run of Rung's; "
                    "choose another run.dir"
                )

    def commit(self) -> None:
        """The run begins: where it starts over, an earlier one's checkpoints are moved aside and its TensorBoard files
        go; ``resolved.yaml`` says what runs now."""
        try:
            self._storage.clean()
            if self.origin is None or not self.origin.is_own:
                self._move_aside()
            partial = self._folder / "resolved.yaml.partial"
            partial.write_text(to_yaml(self._config))
            os.replace(partial, self._folder / "resolved.yaml")
        except OSError as error:
            raise UserError(f"run.dir={self._folder} cannot be prepared: {error}; nothing was deleted") from error

    def _move_aside(self) -> None:
        """What another run left in the folder goes to folders beside it."""
        if (moved := self._storage.set_aside()) is not None:
            self.notes.append(f"the checkpoints that were here are now in {moved}")
        left = [name for name in OURS if (self._folder / name).exists()]
        if left and self._holds_steps():
            number = next(n for n in itertools.count(1) if not (self._folder / f"earlier-{n}").exists())
            earlier = self._folder / f"earlier-{number}"
            earlier.mkdir()
            for name in left:
                os.rename(self._folder / name, earlier / name)
            self.notes.append(f"{', '.join(left)} of the earlier run are now in {earlier}")

    def _refuse_to_forget(self, old: Any) -> None:
        """Raise UserError where the run has checkpoints in another folder than the one that is given now."""
        before = ((old or {}).get("checkpoint") or {}).get("dir")
        now = self._config.checkpoint.dir
        if before in (None, now) or self._config.run.resume != "auto":
            return
        try:
            steps = open_storage(before).steps()
        except (OSError, UserError):
            return
        if steps:
            raise UserError(
                f"checkpoint.dir={now} holds no checkpoint, but this run has some in {before} (newest: step {steps[-1]}"
                f"); move them there, name them with run.resume={before}, or say run.resume=never to start over"
            )

    def _opened(self) -> Storage:
        """The folder of checkpoints, without what dead writers left half done."""
        directory = self._config.checkpoint.dir
        try:
            storage = open_storage(directory)
            if isinstance(storage, LocalStorage):
                folder = Path(storage.address)
                if folder != self._folder:
                    self._locks.append(_locked(folder, "checkpoint.dir"))
                storage.clean()  # a checkpoint that was being replaced is one again
            steps = storage.steps()
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"checkpoint.dir={directory} cannot be used: {reason}; choose another one") from error
        if steps and self._config.run.resume == "never" and not isinstance(storage, LocalStorage):
            raise UserError(
                f"run.resume=never, but {directory} holds {len(steps)} checkpoints, which cannot be moved aside there; "
                "choose another checkpoint.dir"
            )
        return storage

    def _holds_steps(self) -> bool:
        resolved, metrics = self._folder / "resolved.yaml", self._folder / "metrics.jsonl"
        return resolved.is_file() and metrics.is_file() and metrics.stat().st_size > 0

    def _origin(self) -> Origin | None:
        """run.resume, looked up."""
        resume, own = self._config.run.resume, self._storage
        steps = own.steps()
        newest = Origin(own.address, tuple(reversed(steps)), fall_back=True, is_own=True) if steps else None
        if resume == "never" and newest is not None and int(os.environ.get("SLURM_RESTART_COUNT") or 0):
            self.notes.append("run.resume=never counted when this job was started first; now it goes on")
            return newest
        if resume == "never":
            return None
        if resume == "auto":
            return newest
        if newest is not None and self._began_with(resume, newest):
            self.notes.append(f"run.resume={resume} was the beginning; this run goes on from its own checkpoints")
            return newest
        try:
            storage, step = locate(resume)
        except UserError as error:
            raise UserError(f"run.resume={resume}: {error}") from error
        if storage.address == own.address and step is not None:
            if steps and step < steps[-1]:
                raise UserError(
                    f"run.resume={resume} goes back to step {step}, but {own.address} has checkpoints up to step "
                    f"{steps[-1]}; move the later ones away, or choose another run.dir to branch off"
                )
            return Origin(own.address, (step,), fall_back=False, is_own=True)
        if newest is not None:
            self.notes.append(f"run.resume={resume} is left alone: this run goes on from its own checkpoints")
            return newest
        chosen = storage.steps()[-1] if step is None else step  # locate has found some
        self.notes.append(f"this run begins from step {chosen} of {storage.address}")
        return Origin(storage.address, (chosen,), fall_back=False, is_own=False)

    def _began_with(self, resume: str, newest: Origin) -> bool:
        """Whether what this run saved last was already begun with this run.resume: then the command is run again."""
        try:
            _, manifest = newest.manifest()
        except CheckpointError:
            return False
        return (manifest.config.get("run") or {}).get("resume") == resume

    def _resolved(self) -> Any:
        import yaml

        try:
            return yaml.safe_load((self._folder / "resolved.yaml").read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self._folder / 'resolved.yaml'} is damaged; move it away or choose another run.dir"
            ) from error

    def _compare_with_checkpoint(self, where: str, manifest: Manifest) -> None:
        """As ``_compare``; weights that no run has trained have nothing to say but what model they are of."""
        if manifest.step or manifest.has_optimizer_state:
            self._compare(where, manifest.config)
            return
        old, new = (
            {key: value for key, value in flat.items() if key.startswith("model.") and key not in NO_STRUCTURE}
            for flat in (flatten(manifest.config), _as_stored(self._config))
        )
        harmless, serious = changes_that_matter(old, new, self._config.run.allow_changes)
        if serious:
            raise UserError(
                f"{where} holds the weights of another model:\n"
                + "\n".join(f"  - {line}" for line in serious)
                + "\nset these keys to what stands there first"
            )
        self.notes += [f"other than in the weights that this run begins from: {line}" for line in harmless]

    def _compare(self, where: object, old_config: Any) -> None:
        """Refuse changes against the settings that ``where`` holds, but for those that may be."""
        harmless, serious = changes_that_matter(
            flatten(old_config), _as_stored(self._config), self._config.run.allow_changes
        )
        if serious:
            raise UserError(
                f"{where} is of a run that differs:\n"
                + "\n".join(f"  - {line}" for line in serious)
                + "\nchoose another run.dir, or name these keys in run.allow_changes"
            )
        self.notes += [f"changed since this run began: {line}" for line in harmless]


def _locked(folder: Path, key: str) -> IO[Any]:
    """A lock on a folder that a setting names, held while the file that is returned is open."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 - held open for the life of the run
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{key}={folder} cannot be written: {reason}; choose another {key}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise UserError(f"{key}={folder} is in use by another run; wait for it or choose another {key}") from error
    return lock


def _as_stored(config: Config) -> dict[str, Any]:
    """A configuration as it comes back from a file."""
    import yaml

    return flatten(yaml.safe_load(to_yaml(config)))


@dataclass(frozen=True)
class Origin:
    """The checkpoints that a run may go on from, the best first."""

    address: str
    steps: tuple[int, ...]
    fall_back: bool
    """Whether another may take the place of one that cannot be read."""
    is_own: bool
    """Whether they are the run's own, and not another's from which it begins."""

    def manifest(self) -> tuple[str, Manifest]:
        """Of the newest that can be opened: what to call it, and what it says."""
        storage: Storage = open_storage(self.address)
        problems = []
        for step in self.steps:
            try:
                with Reader(storage, step) as reader:
                    return f"{self.address}, step {step},", reader.manifest
            except NewerCheckpointError:
                raise
            except CheckpointError as error:
                problems.append(str(error))
        raise CheckpointError(none_left(self.address, problems))


def none_left(address: str, problems: Sequence[str]) -> str:
    """What is said where no checkpoint can be read."""
    return (
        f"no checkpoint in {address} can be loaded: {UserError.one_text(problems)}\n"
        "to start over, say run.resume=never: what is there is then moved aside"
    )
