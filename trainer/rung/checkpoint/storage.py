"""The folder that holds a run's checkpoints, on disk or on an object store. Importing this needs no torch.

What makes a checkpoint one is its ``manifest.json``: a step's folder without it is nothing that a reader looks at.

- On disk a checkpoint is written into ``.attempt-00000010-<token>``, made durable, and renamed to ``step-00000010``.
  One that is replaced is ``.replaced-…`` until its successor is durable; one that is given up is renamed to
  ``.retired-…`` before its first file goes. No crash, power loss included, leaves a ``step-…`` folder incomplete.
- On an object store nothing can be renamed. Data files lie in ``step-00000010/<token>/``, and the commit is to write
  ``step-00000010/manifest.json``, which names them; to give it up is to delete that first.

Errors of the environment (disk full, no permission, no network) are OSErrors; what is missing or shorter than it must
be is a CheckpointError. Both name the file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

from rung.checkpoint import faults
from rung.checkpoint.format import CheckpointError
from rung.errors import UserError

__all__ = [
    "MANIFEST",
    "LocalStorage",
    "ObjectStorage",
    "Storage",
    "Writable",
    "locate",
    "open_storage",
    "step_name",
]

MANIFEST = "manifest.json"

_LATEST = "latest"
_PART = "part-"
_TEMPORARY = ".tmp-"
_ATTEMPT = ".attempt-"
_REPLACED = ".replaced-"
_RETIRED = ".retired-"
_STEP = re.compile(r"step-(\d{8,})")
_NO_SUCH_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system that cannot lock answers."""


def step_name(step: int) -> str:
    """The folder of a step: ``step-00000010``."""
    return f"step-{step:08d}"


def _step_of(name: str) -> int | None:
    """The step whose folder has this name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


class Writable(Protocol):
    """Takes bytes, one buffer after another."""

    def write(self, buffer: Any, /) -> object:
        """Append all bytes of a contiguous buffer."""


class Storage(ABC):
    """The folder of checkpoints of one run. Paths are relative to it, with "/"."""

    def __init__(self, address: str) -> None:
        self.address = address
        """The folder: an absolute path, or an address of fsspec's. Without a slash at its end."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"

    def where(self, path: str = "") -> str:
        """The full address of a path, for messages and for opening it. CheckpointError where it leads elsewhere."""
        if path.startswith("/") or ".." in path.split("/"):
            raise CheckpointError(f"{path!r} leads out of {self.address}: no checkpoint of Rung's says so")
        return f"{self.address}/{path}" if path else self.address

    def step_path(self, step: int, name: str) -> str:
        """The path of a file as the manifest of a committed step names it."""
        return f"{step_name(step)}/{name}"

    def manifest(self, step: int) -> bytes:
        """The content of a committed step's manifest."""
        return self.read(self.step_path(step, MANIFEST))

    # Files

    @abstractmethod
    def open_write(self, path: str) -> AbstractContextManager[Writable]:
        """A new file. Left cleanly it is durable, left with an exception nothing of it stays. Parents are created."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """A small file, durable, and all of it or nothing; it may replace another. Parents are created."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """A whole file. CheckpointError where there is none."""

    @abstractmethod
    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer (contiguous) from ``offset`` on. CheckpointError where the file is missing or too short."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of a file. CheckpointError where there is none."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """What is in a folder ("" is the folder of checkpoints itself), sorted; nothing where there is none."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Delete a file or a folder with all in it. It may be missing."""

    # Checkpoints

    @abstractmethod
    def file_name(self, token: str, name: str) -> str:
        """What the manifest has to call a file that an attempt wrote as ``name``."""

    @abstractmethod
    def attempt_path(self, step: int, token: str, name: str = "") -> str:
        """Where a file of an attempt lies until it is committed; without a name its folder."""

    @abstractmethod
    def publish(self, step: int, token: str, manifest: bytes) -> None:
        """Commit an attempt: when this returns, it is durably the step's one checkpoint, and its parts are gone.

        An earlier checkpoint of the step is replaced; whoever reads that one meets missing files. After an OSError the
        step is committed or it is not; ``discard`` does what is right in both cases.
        """

    @abstractmethod
    def discard(self, step: int, token: str) -> None:
        """Delete what an attempt wrote; nothing if it was committed after all."""

    @abstractmethod
    def steps(self) -> list[int]:
        """The committed steps, ascending."""

    @abstractmethod
    def retire(self, step: int) -> bool:
        """Uncommit, then delete. False, and nothing done, while somebody pins it."""

    @abstractmethod
    def pin(self, step: int) -> AbstractContextManager[None]:
        """Keep a checkpoint from being retired while this is held. CheckpointError where it is not committed."""

    @abstractmethod
    def clean(self) -> None:
        """Remove what dead attempts and half-done purges left, and finish or undo a replacement that was cut off.

        Only who holds the run's lock and has no attempt under way may call it; a run that resumes, before it asks for
        steps.
        """

    @abstractmethod
    def set_aside(self) -> str | None:
        """Move all committed checkpoints out of the way of a run that starts over.

        Returns the address of the folder they are in now: a sibling, ``checkpoints-1`` or the next that is free; None
        if there was nothing to move.
        """


class LocalStorage(Storage):
    """A folder of a POSIX file system, which the ranks of several hosts may share.

    A pin is a shared flock on the manifest. Where the file system has no locks, or they do not reach other hosts, a pin
    holds nothing: who reads a checkpoint that is deleted meanwhile is told of missing files, never given wrong bytes.
    """

    def __init__(self, address: str) -> None:
        super().__init__(os.path.abspath(os.path.expanduser(address)))
        self._anchored = False
        """Whether the folders above were made durable."""

    @contextmanager
    def open_write(self, path: str) -> Iterator[Writable]:
        full = self.where(path)
        _make_folders(os.path.dirname(full))
        descriptor = os.open(full, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            try:
                yield _LocalFile(descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except BaseException:
            with suppress(OSError):
                os.unlink(full)
            raise

    def write(self, path: str, data: bytes) -> None:
        folder, _, name = path.rpartition("/")
        temporary = f"{folder}/" * bool(folder) + f"{_TEMPORARY}{name}-{secrets.token_hex(4)}"
        with self.open_write(temporary) as file:
            file.write(data)
        try:
            os.rename(self.where(temporary), self.where(path))
        except OSError:
            with suppress(OSError):
                os.unlink(self.where(temporary))
            raise
        _sync_folder(self.where(folder))

    def read(self, path: str) -> bytes:
        with self._opened(path) as descriptor:
            data = bytearray(os.fstat(descriptor).st_size)
            _read_into(descriptor, self.where(path), 0, memoryview(data))
            return bytes(data)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        with self._opened(path) as descriptor:
            _read_into(descriptor, self.where(path), offset, buffer)

    @contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        full = self.where(path)
        try:
            descriptor = os.open(full, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(f"{full} is missing") from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def size(self, path: str) -> int:
        full = self.where(path)
        try:
            return os.stat(full).st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(f"{full} is missing") from error

    def names(self, folder: str) -> list[str]:
        try:
            found = os.listdir(self.where(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in found if not name.startswith(_TEMPORARY))

    def remove(self, path: str) -> None:
        assert path, "this would delete all checkpoints"
        _delete(self.where(path))

    def file_name(self, token: str, name: str) -> str:
        return name

    def attempt_path(self, step: int, token: str, name: str = "") -> str:
        return f"{_ATTEMPT}{step:08d}-{token}" + f"/{name}" * bool(name)

    def publish(self, step: int, token: str, manifest: bytes) -> None:
        attempt, final = self.where(self.attempt_path(step, token)), self.where(step_name(step))
        for name in os.listdir(attempt):
            if name.startswith((_PART, _TEMPORARY)):
                os.unlink(f"{attempt}/{name}")
        faults.reach("commit.before_manifest")
        with self.open_write(self.attempt_path(step, token, MANIFEST)) as file:
            file.write(manifest)
        for folder, _, _ in os.walk(attempt, topdown=False):
            _sync_folder(folder)
        faults.reach("commit.manifest")
        replaced = self.where(f"{_REPLACED}{step:08d}-{token}") if os.path.lexists(final) else None
        if replaced:
            os.rename(final, replaced)
        try:
            os.rename(attempt, final)
        except OSError:
            if replaced:
                os.rename(replaced, final)
            raise
        faults.reach("commit.renamed")
        _sync_folder(self.address)
        self._anchor()
        if replaced:
            with suppress(OSError):  # it is committed, and neither of these matters to that
                self._purge(replaced)
        with suppress(OSError):
            self.write(_LATEST, f"{step_name(step)}\n".encode())
        faults.reach("commit.done")

    def _anchor(self) -> None:
        """Make the folders above durable, up to the file system's root: whoever created them may not have."""
        folder = self.address
        while not self._anchored and not os.path.ismount(folder):
            folder = os.path.dirname(folder)
            with suppress(OSError):  # it may belong to somebody else, who created it long ago
                _sync_folder(folder)
        self._anchored = True

    def discard(self, step: int, token: str) -> None:
        _delete(self.where(self.attempt_path(step, token)))

    def steps(self) -> list[int]:
        found = [(_step_of(name), name) for name in self.names("")]
        return sorted(
            step for step, name in found if step is not None and os.path.isfile(self.where(f"{name}/{MANIFEST}"))
        )

    def retire(self, step: int) -> bool:
        folder = self.where(step_name(step))
        try:
            # Network file systems lock exclusively only what is open for writing.
            descriptor = os.open(f"{folder}/{MANIFEST}", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            if not _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
            self._purge(folder)
        finally:
            os.close(descriptor)
        return True

    def _purge(self, folder: str) -> None:
        """Delete a checkpoint's folder so that it is never seen with some of its files gone."""
        retired = self.where(f"{_RETIRED}{os.path.basename(folder).partition('-')[2]}-{secrets.token_hex(4)}")
        os.rename(folder, retired)
        _sync_folder(self.address)
        faults.reach("purge.renamed")
        for name in sorted(os.listdir(retired))[:1]:
            _delete(f"{retired}/{name}")
        faults.reach("purge.partly")
        _delete(retired)

    @contextmanager
    def pin(self, step: int) -> Iterator[None]:
        path = self.step_path(step, MANIFEST)
        while True:
            with self._opened(path) as descriptor:
                _lock(descriptor, fcntl.LOCK_SH)  # waits while it is being retired, which ends in a moment
                if not _is_at(descriptor, self.where(path)):
                    continue  # replaced, or gone: opening it again tells
                try:
                    yield
                finally:
                    # Not left to closing: a process forked meanwhile may have a copy of the descriptor.
                    _lock(descriptor, fcntl.LOCK_UN)
                return

    def clean(self) -> None:
        try:
            found = os.listdir(self.address)
        except FileNotFoundError:
            return
        leftovers = [name for name in found if name.startswith((_ATTEMPT, _REPLACED, _RETIRED, _TEMPORARY))]
        for name in sorted(leftovers, reverse=True):
            step, full = name.removeprefix(_REPLACED).partition("-")[0], self.where(name)
            if not name.startswith(_REPLACED):
                _delete(full)
            elif os.path.lexists(final := self.where(f"step-{step}")):
                self._purge(full)
            else:  # died between two renames: the old one is still the step's checkpoint
                os.rename(full, final)
                _sync_folder(self.address)

    def set_aside(self) -> str | None:
        steps = self.steps()
        if not steps:
            return None
        with suppress(FileNotFoundError):
            os.unlink(self.where(_LATEST))
        aside = _next_free(self.address)
        try:
            for step in steps:  # oldest first: if this is cut off, the newest is where it was
                os.rename(self.where(step_name(step)), f"{aside}/{step_name(step)}")
        except OSError:
            with suppress(OSError):
                os.rmdir(aside)  # unless something is in it
            raise
        for folder in (aside, os.path.dirname(aside), self.address):
            _sync_folder(folder)
        return aside


class ObjectStorage(Storage):
    """A prefix on an object store that fsspec reaches, as ``s3://bucket/run/checkpoints``.

    Asked of the store: an object appears whole or not at all, and whoever asks after that sees it (S3, GCS and Azure
    keep this). Credentials, endpoint and region come from where the store's own tools take them (``AWS_…``).
    """

    def __init__(self, address: str) -> None:
        super().__init__(address.rstrip("/"))
        import fsspec

        try:
            # A listing kept from before would show steps that are gone and hide those that came.
            self._files, self._root = fsspec.core.url_to_fs(self.address, use_listings_cache=False)
        except ImportError as error:
            raise UserError(f"{address}: {error}; for S3: pip install 'rung[s3]'") from error
        except ValueError as error:
            raise UserError(f"{address}: {error}") from error

    def _key(self, path: str) -> str:
        self.where(path)
        return f"{self._root}/{path}" if path else self._root

    @contextmanager
    def open_write(self, path: str) -> Iterator[Writable]:
        where = self.where(path)
        with _os_errors(where):
            file = self._files.open(self._key(path), "wb")
        try:
            yield _ObjectFile(file, where)
            with _os_errors(where):
                file.close()
        except BaseException:
            with suppress(Exception):
                file.discard()  # aborts an upload in parts, which would be stored, unseen, for ever
            with suppress(Exception):
                file.closed = True  # else the garbage collector closes it, which uploads what is buffered
            raise

    def write(self, path: str, data: bytes) -> None:
        with _os_errors(self.where(path)):
            self._files.pipe_file(self._key(path), data)

    def read(self, path: str) -> bytes:
        with _os_errors(self.where(path), missing=True):
            return bytes(self._files.cat_file(self._key(path)))

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        view = _flat(buffer)
        end = offset + view.nbytes
        if not view.nbytes:
            return
        try:
            with _os_errors(self.where(path), missing=True):
                data = self._files.cat_file(self._key(path), start=offset, end=end)
        except OSError:  # stores refuse a range that begins behind the end
            data = None
            if self.size(path) >= end:
                raise
        if data is None or len(data) < view.nbytes:
            raise CheckpointError(_too_short(self.where(path), self.size(path), end))
        view[:] = data

    def size(self, path: str) -> int:
        with _os_errors(self.where(path), missing=True):
            return int(self._info(path)["size"])

    def _info(self, path: str) -> Any:
        info = self._files.info(self._key(path))
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "no object, only a prefix", self.where(path))
        return info

    def _exists(self, path: str) -> bool:
        with _os_errors(self.where(path)):
            try:
                return bool(self._info(path))
            except FileNotFoundError:
                return False

    def names(self, folder: str) -> list[str]:
        above = f"{self._key(folder)}/"
        with _os_errors(self.where(folder)):
            self._files.invalidate_cache()
            try:
                found = self._files.ls(above.rstrip("/"), detail=False)
            except FileNotFoundError:
                return []
        relative = (path.strip("/").removeprefix(above.strip("/")) for path in found)
        return sorted(path[1:] for path in relative if path.startswith("/") and len(path) > 1)

    def remove(self, path: str) -> None:
        assert path, "this would delete all checkpoints"
        with _os_errors(self.where(path)):
            self._files.invalidate_cache()
            with suppress(FileNotFoundError):
                self._files.rm(self._key(path), recursive=True)

    def file_name(self, token: str, name: str) -> str:
        return f"{token}/{name}"

    def attempt_path(self, step: int, token: str, name: str = "") -> str:
        return f"{step_name(step)}/{token}" + f"/{name}" * bool(name)

    def publish(self, step: int, token: str, manifest: bytes) -> None:
        """See Storage. The points commit.manifest and commit.renamed are one here: the manifest is the commit."""
        faults.reach("commit.before_manifest")
        self.write(self.step_path(step, MANIFEST), manifest)
        faults.reach("commit.manifest")
        faults.reach("commit.renamed")
        with suppress(OSError):  # it is committed; what is left over here, clean() removes
            self._remove_strays(step)
            self.write(_LATEST, f"{step_name(step)}\n".encode())
        faults.reach("commit.done")

    def _tokens(self, step: int) -> set[str] | None:
        """Whose files the manifest of a step names; None where that cannot be told, as it is damaged."""
        path = self.step_path(step, MANIFEST)
        if not self._exists(path):
            return set()
        try:
            return {name.partition("/")[0] for name in json.loads(self.read(path))["files"]}
        except (ValueError, KeyError, TypeError):
            return None

    def _remove_strays(self, step: int) -> None:
        """Remove parts, and the files of attempts that the manifest does not name."""
        tokens = self._tokens(step)
        for name in self.names(step_name(step)):
            if name == MANIFEST:
                continue
            path = self.step_path(step, name)
            if tokens is not None and name not in tokens:
                self.remove(path)
                continue
            for inner in self.names(path):
                if inner.startswith(_PART):
                    self.remove(f"{path}/{inner}")

    def discard(self, step: int, token: str) -> None:
        tokens = self._tokens(step)
        # An answer that was lost on its way looks like a commit that failed.
        if tokens is not None and token not in tokens:
            self.remove(self.attempt_path(step, token))

    def steps(self) -> list[int]:
        found = (_step_of(name) for name in self.names(""))
        return sorted(step for step in found if step is not None and self._exists(self.step_path(step, MANIFEST)))

    def retire(self, step: int) -> bool:
        """Uncommit, then delete. Always: nothing can be pinned here."""
        tokens = self._tokens(step)
        self.remove(self.step_path(step, MANIFEST))
        faults.reach("purge.renamed")
        # Another attempt at the step may be under way; that one is not touched.
        names = [name for name in self.names(step_name(step)) if tokens is None or name in tokens]
        for index, name in enumerate(names):
            path = self.step_path(step, name)
            if index == 0:
                for inner in self.names(path)[:1]:
                    self.remove(f"{path}/{inner}")
                faults.reach("purge.partly")
            self.remove(path)
        return True

    @contextmanager
    def pin(self, step: int) -> Iterator[None]:
        """Only looks whether the step is committed: an object store holds no locks.

        Whoever reads a checkpoint that is retired meanwhile meets missing files, never wrong bytes.
        """
        self.size(self.step_path(step, MANIFEST))
        yield

    def clean(self) -> None:
        for name in self.names(""):
            step = _step_of(name)
            if step is not None:
                self._remove_strays(step)
        self._abort_uploads()

    def _abort_uploads(self) -> None:
        """End uploads that killed processes left half done: they are invisible, and paid for. S3 only."""
        if "s3" not in self._files.protocol:
            return
        bucket, _, prefix = self._root.partition("/")
        with suppress(OSError):  # it takes a permission that a run does not need otherwise
            found = self._files.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
            for upload in found.get("Uploads", []):
                self._files.abort_mpu(bucket, upload["Key"], upload["UploadId"])

    def set_aside(self) -> str | None:
        """Refuses with a UserError when there is something to move: it would have to be copied, which may take hours
        and leave both half done.
        """
        steps = self.steps()
        if steps:
            raise UserError(
                f"{self.address} holds {_listed(steps)}, and an object store cannot rename folders: choose another "
                "run.dir or checkpoint.dir to start over, or move them with the store's own tools"
            )
        return None


def open_storage(address: str) -> Storage:
    """The storage for a folder of checkpoints: a path, or an address of fsspec's. It need not exist yet."""
    scheme, separator, path = address.partition("://")
    if separator and scheme not in ("file", "local"):
        return ObjectStorage(address)
    return LocalStorage(path if separator else address)


def locate(path: str) -> tuple[Storage, int | None]:
    """What a user names: the folder of a run, a folder of checkpoints, or one ``step-…`` folder or its manifest.

    Returns the storage and the step; None means that no step is named, and the newest is meant. UserError where no
    committed checkpoint is there.
    """
    place = open_storage(path.rstrip("/") or path).address
    above, _, name = place.rpartition("/")
    if name == MANIFEST:
        place = above
        above, _, name = place.rpartition("/")
        if _step_of(name) is None:
            raise UserError(f"{path}: the folder of a checkpoint must be called like its step, as {step_name(10)}")
    if re.fullmatch(r"step-\d+", name):
        storage, step = open_storage(above), int(name.removeprefix("step-"))
        steps = storage.steps()
        if step not in steps:
            raise UserError(f"{place} is not a committed checkpoint; {above} holds {_listed(steps)}")
        return storage, step
    storage, inner = open_storage(place), open_storage(f"{place}/checkpoints")
    for candidate in (storage, inner):
        if candidate.steps():
            return candidate, None
    names = storage.names("")
    there = f"there are {', '.join(names[:8])}{' …' if len(names) > 8 else ''}" if names else "it is empty or missing"
    raise UserError(f"{place} holds no checkpoint: looked for step-…/{MANIFEST} in it and in {inner.address}; {there}")


def _listed(steps: list[int]) -> str:
    """Steps, for a message."""
    if not steps:
        return "no checkpoint"
    shown = [str(step) for step in steps[-8:]]
    return f"step{'s' * (len(steps) > 1)} {'… ' * (len(steps) > 8)}{', '.join(shown)}"


def _too_short(where: str, size: int, end: int) -> str:
    return f"{where} is damaged: it has {size} bytes and must have {end} or more"


def _flat(buffer: Any) -> memoryview:
    """The bytes of a contiguous buffer of any shape."""
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")  # an empty shape cannot be cast


# On disk

_LARGE = 2**20
"""Bytes from which on a write is worth passing the page cache by."""


class _LocalFile:
    """A file that is being written, by its descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._past_cache: bool | None = None
        """Whether writes go from memory to the disk; None until there is something large to write."""

    def write(self, buffer: Any) -> None:
        """Large writes of whole pages pass the page cache by, which would take a copy of what nobody reads soon."""
        left = _flat(buffer)
        if self._past_cache is None and left.nbytes >= _LARGE:
            self._pass_cache(True)
        while left.nbytes:
            try:
                left = left[os.write(self._descriptor, left) :]
            except OSError as error:
                if not (self._past_cache and error.errno == errno.EINVAL):
                    raise
                self._pass_cache(False)  # the end of the file, or a file system that cannot

    def _pass_cache(self, on: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        self._past_cache = on
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
        except OSError:
            self._past_cache = False


def _read_into(descriptor: int, where: str, offset: int, buffer: memoryview) -> None:
    """Fill a buffer from a place of a file. CheckpointError where the file ends before."""
    left = _flat(buffer)
    end = offset + left.nbytes
    while left.nbytes:
        count = os.preadv(descriptor, [left], end - left.nbytes)
        if not count:
            raise CheckpointError(_too_short(where, os.fstat(descriptor).st_size, end))
        left = left[count:]


def _sync_folder(folder: str) -> None:
    """Make durable which names a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folders(folder: str) -> None:
    """Create a folder and those above it. They become durable with the commit."""
    if not os.path.isdir(folder):
        _make_folders(os.path.dirname(folder))
        with suppress(FileExistsError):
            os.mkdir(folder)


def _delete(path: str) -> None:
    """Delete a file or a folder with all in it; it may be missing, and others may delete it too."""
    with suppress(FileNotFoundError):
        if os.path.islink(path) or not os.path.isdir(path):
            os.unlink(path)
            return
        for name in os.listdir(path):
            _delete(f"{path}/{name}")
        os.rmdir(path)


def _lock(descriptor: int, operation: int) -> bool:
    """flock; False if somebody else holds the lock. True where the file system has no locks."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_SUCH_LOCK:
            raise
    return True


def _is_at(descriptor: int, path: str) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _next_free(folder: str) -> str:
    """Create the first of ``folder-1``, ``folder-2``, … that does not exist."""
    number = 1
    while True:
        with suppress(FileExistsError):
            os.mkdir(f"{folder}-{number}")
            return f"{folder}-{number}"
        number += 1


# On object stores


class _ObjectFile:
    """A file of fsspec's that is being written; its errors are OSErrors."""

    def __init__(self, file: Any, where: str) -> None:
        self._file, self._where = file, where

    def write(self, buffer: Any) -> None:
        with _os_errors(self._where):
            self._file.write(buffer)


@contextmanager
def _os_errors(where: str, *, missing: bool = False) -> Iterator[None]:
    """Whatever a client library raises becomes an OSError that names the address.

    missing: a file that is not there is a CheckpointError instead.
    """
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        if missing:
            raise CheckpointError(f"{where} is missing") from error
        raise FileNotFoundError(errno.ENOENT, str(error) or "does not exist", where) from error
    except PermissionError as error:
        raise PermissionError(errno.EACCES, str(error) or "permission denied", where) from error
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), where) from error
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", where) from error
