"""Power loss at every moment of saving, replacing and retiring, on a file system that keeps no more than it promised.

A recorder stands in for ``os`` in the storage module and logs what is done to the file system. For every prefix of that
log we build states that a crash may leave: content of a file since its last fsync may be there, lost, torn or zeros;
names of a folder (created, renamed, deleted) since the folder's last fsync may be lost from any point on, independently
of every other folder. In each of them a reader must find complete checkpoints only, and all that were promised.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rung.checkpoint import storage as module
from rung.checkpoint.format import CheckpointError, Manifest, StoredFile, block_digest
from rung.checkpoint.storage import LocalStorage, step_name


class Violation(AssertionError):
    """A crash left what must not be."""


# Recording


@dataclass(frozen=True)
class Named:
    """Names of a folder change, all at once: to a file or folder by its number, or to nothing."""

    folder: int
    names: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Content:
    file: int
    data: bytes


@dataclass(frozen=True)
class Synced:
    number: int


@dataclass(frozen=True)
class Mark:
    """What the caller was told: "publishing", "published" (by a token) or "retiring" a step."""

    what: str
    step: int
    token: str = ""


Event = Named | Content | Synced | Mark


class Recorder:
    """Does what ``os`` does, and logs what it does below ``base``. fsync is only logged."""

    def __init__(self, base: Path, lies: Callable[[Recorder, str], bool]) -> None:
        self.base, self.lies = str(base), lies
        self.log: list[Event] = []
        self.numbers = {self.base: 0}
        self.next_number = 1
        self.open_files: dict[int, tuple[str, bytearray | None]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _named(self, path: str, number: int | None, *more: tuple[str, int | None]) -> None:
        folder, name = os.path.split(path)
        self.log.append(Named(self.numbers[folder], ((name, number), *more)))

    def _create(self, path: str) -> None:
        self.numbers[path] = self.next_number
        self._named(path, self.next_number)
        self.next_number += 1

    def _forget(self, path: str) -> None:
        self._named(path, None)
        del self.numbers[path]

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        existed = os.path.lexists(path)
        descriptor = os.open(path, flags, mode)
        writing = flags & os.O_CREAT
        if writing and not existed:
            self._create(path)
        elif writing and flags & os.O_TRUNC:
            self.log.append(Content(self.numbers[path], b""))
        self.open_files[descriptor] = path, bytearray() if writing else None
        return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        path, content = self.open_files[descriptor]
        assert content is not None
        count = os.write(descriptor, data)
        content += bytes(data)[:count]
        self.log.append(Content(self.numbers[path], bytes(content)))
        return count

    def fsync(self, descriptor: int) -> None:
        path, _ = self.open_files[descriptor]
        if path in self.numbers and not self.lies(self, path):
            self.log.append(Synced(self.numbers[path]))

    def close(self, descriptor: int) -> None:
        del self.open_files[descriptor]
        os.close(descriptor)

    def mkdir(self, path: str) -> None:
        os.mkdir(path)
        self._create(path)

    def unlink(self, path: str) -> None:
        os.unlink(path)
        self._forget(path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)
        self._forget(path)

    def rename(self, old: str, new: str) -> None:
        assert os.path.dirname(old) == os.path.dirname(new), "the model knows no other renames"
        os.rename(old, new)
        self._named(old, None, (os.path.basename(new), self.numbers[old]))
        for path in [path for path in self.numbers if path == old or path.startswith(f"{old}/")]:
            self.numbers[new + path.removeprefix(old)] = self.numbers.pop(path)


# Crash states

Tree = dict[str, Any]
"""A folder: name to bytes or Tree."""


@dataclass
class Folder:
    durable: dict[str, int] = field(default_factory=dict)
    pending: list[Named] = field(default_factory=list)

    def after(self, count: int) -> dict[str, int]:
        """The names when so many of the pending changes survive."""
        names: dict[str, int | None] = dict(self.durable)
        for change in self.pending[:count]:
            names.update(change.names)
        return {name: number for name, number in names.items() if number is not None}


@dataclass
class File:
    durable: bytes = b""
    pending: list[bytes] = field(default_factory=list)

    def outcomes(self) -> list[bytes]:
        """Lost, there, torn, zeros."""
        if not self.pending:
            return [self.durable]
        last = self.pending[-1]
        return [self.durable, last, last[: len(last) // 2], bytes(len(last))]


class Disk:
    """What a file system holds after some events, and what of it is durable."""

    def __init__(self) -> None:
        self.folders: dict[int, Folder] = {}
        self.files: dict[int, File] = {}

    def apply(self, event: Event) -> None:
        if isinstance(event, Named):
            self.folders.setdefault(event.folder, Folder()).pending.append(event)
        elif isinstance(event, Content):
            self.files.setdefault(event.file, File()).pending.append(event.data)
        elif isinstance(event, Synced) and event.number in self.files:
            file = self.files[event.number]
            file.durable, file.pending = file.pending[-1] if file.pending else file.durable, []
        elif isinstance(event, Synced) and event.number in self.folders:
            folder = self.folders[event.number]
            folder.durable, folder.pending = folder.after(len(folder.pending)), []

    def tree(self, kept: dict[int, int], outcomes: dict[int, int], number: int = 0) -> Tree:
        """What is there if so many pending changes of each folder survive, and this outcome of each file."""
        found: Tree = {}
        for name, child in sorted(self.folders[number].after(kept.get(number, 0)).items()):
            if child in self.folders:
                found[name] = self.tree(kept, outcomes, child)
            elif child in self.files:
                found[name] = self.files[child].outcomes()[outcomes.get(child, 0)]
            else:
                found[name] = {}  # a folder in which nothing was ever done, or a file: empty is empty
        return found

    def crashes(self, generator: random.Random) -> Iterator[Tree]:
        """All lost, all kept, each one kept or lost alone, files torn or zeros, and some at random."""
        folders = {number: len(folder.pending) for number, folder in self.folders.items() if folder.pending}
        files = {number: 1 for number, file in self.files.items() if file.pending}
        yield self.tree({}, {})
        yield self.tree(folders, files)
        for number, count in folders.items():
            yield self.tree({number: count}, files)
            for kept in range(count):
                yield self.tree(folders | {number: kept}, files)
        for number in files:
            for outcome in (0, 2, 3):
                yield self.tree(folders, files | {number: outcome})
        for _ in range(4):
            yield self.tree(
                {number: generator.randint(0, count) for number, count in folders.items()},
                {number: generator.randrange(4) for number in files},
            )


# What must hold


def check(tree: Tree, folder: Path, promised: dict[int, set[str]], cut_off: set[int], storage: type) -> None:
    """Readers see complete checkpoints, and of every promised step one; of a step being replaced after clean()."""
    lay_out(tree, folder)
    found = storage(str(folder / "run" / "checkpoints"))
    for cleaned in (False, True):
        if cleaned:
            found.clean()
        steps = found.steps()
        for step in steps:
            token = complete(found, step)
            if step in promised and token not in promised[step]:
                raise Violation(f"step {step} is that of {token}, not one of {promised[step]}")
        missing = set(promised) - set(steps) - (set() if cleaned else cut_off)
        if missing:
            raise Violation(f"steps {missing} were committed and are gone; there are {steps}")
    left = [name for name in found.names("") if name.startswith(".")]
    if left:
        raise Violation(f"clean() left {left}")
    with suppress(CheckpointError):
        if not found.read("latest").startswith(b"step-"):
            raise Violation("latest is torn")


def lay_out(tree: Tree, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, entry in tree.items():
        if isinstance(entry, dict):
            lay_out(entry, folder / name)
        else:
            (folder / name).write_bytes(entry)


def complete(storage: LocalStorage, step: int) -> str:
    """Whose the checkpoint is. Violation unless its manifest and every file named there is whole."""
    try:
        manifest = Manifest.from_json(storage.manifest(step), f"step {step}")
        for name, file in manifest.files.items():
            data = storage.read(storage.step_path(step, name))
            if (len(data), block_digest(data)) != (file.size, file.blocks[0]):
                raise Violation(f"step {step}: {name} is not what was written")
    except CheckpointError as error:
        raise Violation(f"step {step} is visible and damaged: {error}") from error
    if left := [name for name in storage.names(step_name(step)) if name.startswith("part-")]:
        raise Violation(f"step {step} still has {left}")
    return str(manifest.progress["token"])


# The sequence


def live(storage: LocalStorage, log: list[Event]) -> None:
    """Checkpoints come, are replaced and go."""

    def write(step: int, token: str) -> bytes:
        files = {}
        for rank in range(2):
            name, data = f"data-{rank:05d}.bin", f"{step} {token} {rank}".encode()
            with storage.open_write(storage.attempt_path(step, token, name)) as file:
                file.write(data[:3])
                file.write(data[3:])
            files[name] = StoredFile(len(data), (block_digest(data),))
            storage.write(storage.attempt_path(step, token, f"part-{rank:05d}.json"), b"{}")
        return Manifest({"step": step, "token": token}, {}, {}, {}, {}, files).to_json()

    def save(step: int, token: str) -> None:
        manifest = write(step, token)
        log.append(Mark("publishing", step, token))
        storage.publish(step, token, manifest)
        log.append(Mark("published", step, token))

    def retire(step: int) -> None:
        log.append(Mark("retiring", step))
        assert storage.retire(step)

    save(1, "a")
    save(2, "b")
    retire(1)
    save(2, "c")
    write(3, "d")
    storage.discard(3, "d")
    write(3, "e")  # dies
    storage.clean()
    save(3, "f")
    retire(2)


def survive(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    storage: type[LocalStorage] = LocalStorage,
    lies: Callable[[Recorder, str], bool] = lambda recorder, path: False,
) -> int:
    """Live, crash at every moment, look; the number of different states looked at. ``lies`` names fsyncs left out."""
    base = folder / "base"
    base.mkdir()
    recorder = Recorder(base, lies)
    with monkeypatch.context() as patched:
        patched.setattr(module, "os", recorder)
        live(storage(str(base / "run" / "checkpoints")), recorder.log)
    disk, generator = Disk(), random.Random(0)
    disk.folders[0] = Folder()
    promised: dict[int, set[str]] = {}
    cut_off: set[int] = set()
    seen: set[str] = set()
    for event in recorder.log:
        disk.apply(event)
        if isinstance(event, Mark):
            if event.what == "published":
                promised[event.step] = {event.token}
                cut_off.discard(event.step)
            elif event.what == "retiring":
                del promised[event.step]
            elif event.step in promised:
                promised[event.step].add(event.token)
                cut_off.add(event.step)
        for tree in disk.crashes(generator):
            key = repr((tree, promised, cut_off))
            if key not in seen:
                seen.add(key)
                check(tree, folder / "crashed", promised, cut_off, storage)
    return len(seen)


def test_no_crash_loses_or_tears_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert survive(tmp_path, monkeypatch) > 200


# Proof that it can fail


def _file(start: str) -> Callable[[Recorder, str], bool]:
    """No fsync of files that are called so."""
    return lambda recorder, path: os.path.basename(path).startswith(start)


def _folder_after(*starts: str) -> Callable[[Recorder, str], bool]:
    """No fsync of the folder of checkpoints after something in it was renamed to a name that begins so, or so."""

    def lies(recorder: Recorder, path: str) -> bool:
        last = recorder.log[-1]
        renamed = isinstance(last, Named) and len(last.names) == 2 and last.names[1][0].startswith(starts)
        return path.endswith("/run/checkpoints") and renamed

    return lies


@pytest.mark.parametrize(
    ("lies", "found"),
    [
        (_file("data-"), "is not what was written"),
        (_file("manifest.json"), "visible and damaged: step 1 is damaged"),
        (_file(".attempt-"), r"visible and damaged: .*data-.*\.bin is missing|were committed and are gone"),
        (_folder_after("step-", "latest"), "were committed and are gone"),
        (_folder_after(".retired-"), "visible and damaged"),
        (_file("run"), "were committed and are gone"),  # the folder above that of checkpoints
        (_file("base"), "were committed and are gone"),
        (_file(".tmp-latest"), "latest is torn"),
    ],
    ids=["data", "manifest", "attempt", "commit", "retire", "above", "above that", "latest"],
)
def test_a_missing_fsync_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lies: Callable[[Recorder, str], bool], found: str
) -> None:
    with pytest.raises(Violation, match=found):
        survive(tmp_path, monkeypatch, lies=lies)


class ManifestAfterRename(LocalStorage):
    def publish(self, step: int, token: str, manifest: bytes) -> None:
        attempt = self.where(self.attempt_path(step, token))
        for name in self.names(self.attempt_path(step, token)):
            if name.startswith("part-"):
                self.remove(self.attempt_path(step, token, name))
        module._sync_folder(attempt)
        self.remove(step_name(step))
        module.os.rename(attempt, self.where(step_name(step)))
        with self.open_write(self.step_path(step, "manifest.json")) as file:
            file.write(manifest)
        module._sync_folder(self.where(step_name(step)))
        module._sync_folder(self.address)
        self._anchor()


class DeletesInPlace(LocalStorage):
    def _purge(self, folder: str) -> None:
        module._delete(folder)


class DeletesBeforeReplacing(LocalStorage):
    def publish(self, step: int, token: str, manifest: bytes) -> None:
        if step in self.steps():
            self.retire(step)
        super().publish(step, token, manifest)


class ForgetsTheReplaced(LocalStorage):
    def clean(self) -> None:
        for name in os.listdir(self.address) if os.path.isdir(self.address) else []:
            if name.startswith("."):
                self.remove(name)


class KeepsParts(LocalStorage):
    def publish(self, step: int, token: str, manifest: bytes) -> None:
        super().publish(step, token, manifest)
        self.write(self.step_path(step, "part-00000.json"), b"{}")


@pytest.mark.parametrize(
    ("storage", "found"),
    [
        (ManifestAfterRename, "visible and damaged: step 1 is damaged"),
        (DeletesInPlace, "visible and damaged: .*missing"),
        (DeletesBeforeReplacing, r"steps \{2\} were committed and are gone"),
        (ForgetsTheReplaced, r"steps \{2\} were committed and are gone"),
        (KeepsParts, "still has"),
    ],
)
def test_a_wrong_order_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: type[LocalStorage], found: str
) -> None:
    with pytest.raises(Violation, match=found):
        survive(tmp_path, monkeypatch, storage)
