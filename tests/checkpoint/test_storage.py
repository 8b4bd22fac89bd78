"""The folder of checkpoints does the same on disk and on a real S3 server."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rung.checkpoint import storage as module
from rung.checkpoint.format import CheckpointError, Manifest, StoredFile, block_digest
from rung.checkpoint.storage import LocalStorage, ObjectStorage, Storage, locate, open_storage, step_name
from rung.errors import UserError


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A folder of checkpoints that does not exist yet."""
    run = str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("s3_folder")
    return open_storage(f"{run}/checkpoints")


def content(step: int, token: str) -> dict[str, bytes]:
    """The data files of a checkpoint."""
    return {f"data-{rank:05d}.bin": f"{step} {token} {rank} ".encode() * 50 for rank in range(2)}


def manifest_of(storage: Storage, step: int, token: str) -> bytes:
    files = {
        storage.file_name(token, name): StoredFile(len(data), (block_digest(data),))
        for name, data in content(step, token).items()
    }
    return Manifest({"step": step}, {}, {}, {}, {}, files).to_json()


def write_attempt(storage: Storage, step: int, token: str) -> None:
    for rank, (name, data) in enumerate(content(step, token).items()):
        with storage.open_write(storage.attempt_path(step, token, name)) as file:
            file.write(data[:10])
            file.write(memoryview(data)[10:])
        storage.write(storage.attempt_path(step, token, f"part-{rank:05d}.json"), b"{}")


def save(storage: Storage, step: int, token: str = "aa") -> None:
    write_attempt(storage, step, token)
    storage.publish(step, token, manifest_of(storage, step, token))


def check(storage: Storage, step: int, token: str = "aa") -> None:
    """The checkpoint is there, as this attempt wrote it."""
    assert storage.manifest(step) == manifest_of(storage, step, token)
    for name, data in content(step, token).items():
        path = storage.step_path(step, storage.file_name(token, name))
        assert storage.read(path) == data
        assert storage.size(path) == len(data)
        buffer = bytearray(30)
        storage.read_into(path, 7, memoryview(buffer))
        assert buffer == data[7:37]


def tree(storage: Storage, folder: str = "") -> list[str]:
    """Every file, hidden ones too; folders that are empty end in "/"."""
    if isinstance(storage, LocalStorage):
        root = Path(storage.address)
        found = [path for path in root.rglob("*") if path.is_file() or not any(path.iterdir())]
        return sorted(str(path.relative_to(root)) + "/" * path.is_dir() for path in found)
    assert isinstance(storage, ObjectStorage)
    keys = storage._files.find(storage.address, refresh=True)
    return sorted(key.removeprefix(storage.address.partition("://")[2] + "/") for key in keys)


def committed(storage: Storage, step: int, token: str = "aa") -> list[str]:
    """The files of a checkpoint and no others."""
    names = [storage.file_name(token, name) for name in content(step, token)]
    return sorted(storage.step_path(step, name) for name in [*names, "manifest.json"])


def test_it_imports_neither_torch_nor_fsspec() -> None:
    code = "import sys, rung.checkpoint.storage as s; s.open_storage('/nowhere'); s.open_storage('file:///nowhere')"
    report = "print(sorted({'torch', 'fsspec'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", f"{code}; {report}"], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran


def test_nothing_is_seen_before_the_commit(storage: Storage) -> None:
    assert (storage.steps(), storage.names(""), storage.names("nowhere")) == ([], [], [])
    write_attempt(storage, 10, "aa")
    assert storage.steps() == []
    parts = [name for name in storage.names(storage.attempt_path(10, "aa")) if name.startswith("part-")]
    assert parts == ["part-00000.json", "part-00001.json"]
    storage.publish(10, "aa", manifest_of(storage, 10, "aa"))
    assert storage.steps() == [10]
    check(storage, 10)
    assert tree(storage) == ["latest", *committed(storage, 10)]
    save(storage, 123456789, "bb")
    save(storage, 2, "cc")
    assert storage.steps() == [2, 10, 123456789]
    assert storage.read("latest") == b"step-00000002\n"
    assert step_name(123456789) in storage.names("")


@pytest.mark.parametrize("how", ["open_write", "write"])
def test_files_round_trip(storage: Storage, how: str) -> None:
    for data in (b"", b"x", os.urandom(100_000)):
        if how == "write":
            storage.write("a/b/file", data)
        else:
            with storage.open_write("a/b/file") as file:
                file.write(memoryview(data))
        assert storage.read("a/b/file") == data
        assert storage.size("a/b/file") == len(data)
    assert storage.names("a/b") == ["file"]
    assert storage.names("a") == ["b"]
    storage.write("a/beside", b"")
    storage.remove("a/b")
    storage.remove("a/b")
    assert storage.names("a") == ["beside"]
    storage.remove("a/beside")
    assert not any(name.endswith("beside") for name in tree(storage))


def test_what_is_missing_or_short_is_named(storage: Storage) -> None:
    storage.write("folder/short", b"0123456789")
    buffer = memoryview(bytearray(6))
    storage.read_into("folder/short", 4, buffer)
    assert buffer == b"456789"
    storage.read_into("folder/short", 10, buffer[:0])
    for offset in (5, 10, 100):
        with pytest.raises(
            CheckpointError, match=r"/checkpoints/folder/short is damaged: it has 10 bytes and must have"
        ):
            storage.read_into("folder/short", offset, buffer)
    asks: list[Callable[[str], Any]] = [
        storage.read,
        storage.size,
        lambda path: storage.read_into(path, 0, buffer),
    ]
    for path in ("folder/none", "none/none", "folder/short/none"):
        for ask in asks:
            with pytest.raises(CheckpointError, match=f"/checkpoints/{path} is missing") as caught:
                ask(path)
            assert storage.address in str(caught.value)
    for path in ("../other", "step-1/../../other", "/etc/passwd"):
        with pytest.raises(CheckpointError, match="leads out of"):
            storage.read(path)


def test_a_write_that_fails_leaves_nothing(storage: Storage) -> None:
    with suppress(ZeroDivisionError), storage.open_write("folder/file") as file:
        file.write(b"some")
        1 / 0  # noqa: B018
    assert tree(storage) in ([], ["folder/"])


def test_discard(storage: Storage) -> None:
    save(storage, 10)
    write_attempt(storage, 10, "bb")
    write_attempt(storage, 20, "bb")
    storage.discard(10, "bb")
    storage.discard(20, "bb")
    storage.discard(30, "bb")
    storage.discard(10, "aa")  # committed after all
    check(storage, 10)
    assert tree(storage) == ["latest", *committed(storage, 10)]


def test_retire(storage: Storage) -> None:
    for step in (10, 20):
        save(storage, step)
    assert storage.retire(10)
    assert storage.retire(10)
    assert storage.steps() == [20]
    assert tree(storage) == ["latest", *committed(storage, 20)]
    check(storage, 20)


def test_pins(storage: Storage) -> None:
    save(storage, 10)
    with pytest.raises(CheckpointError, match=r"step-00000020/manifest\.json is missing"), storage.pin(20):
        pass
    with storage.pin(10), open_storage(storage.address).pin(10):
        if isinstance(storage, LocalStorage):
            assert not storage.retire(10)
            check(storage, 10)
    assert storage.retire(10)
    assert storage.steps() == []


def test_pins_held_by_another_process(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "checkpoints"))
    save(storage, 10)
    code = (
        "import sys; from rung.checkpoint.storage import open_storage\n"
        "with open_storage(sys.argv[1]).pin(10): print('pinned', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, storage.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout
        assert reader.stdout.readline() == "pinned\n"
        assert not storage.retire(10)
        reader.kill()
    assert storage.retire(10)


@pytest.mark.parametrize("successor", [True, False])
def test_a_pin_that_comes_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, successor: bool) -> None:
    """Between opening a manifest and locking it the checkpoint is retired, and perhaps another takes its place."""
    storage = LocalStorage(str(tmp_path))
    save(storage, 10)
    lock = module._lock

    def late(descriptor: int, operation: int) -> bool:
        monkeypatch.setattr(module, "_lock", lock)
        assert storage.retire(10)
        if successor:
            save(storage, 10, "bb")
        return lock(descriptor, operation)

    monkeypatch.setattr(module, "_lock", late)
    if successor:
        with storage.pin(10):
            assert not storage.retire(10)
            check(storage, 10, "bb")
    else:
        with pytest.raises(CheckpointError, match="is missing"), storage.pin(10):
            pass


def test_without_locks_checkpoints_are_still_written_and_retired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks here")

    monkeypatch.setattr(module.fcntl, "flock", flock)
    storage = LocalStorage(str(tmp_path))
    save(storage, 10)
    with storage.pin(10):
        check(storage, 10)
    assert storage.retire(10)


def test_replace(storage: Storage) -> None:
    for token in ("aa", "bb", "aa"):
        save(storage, 10, token)
        assert storage.steps() == [10]
        check(storage, 10, token)
        assert tree(storage) == ["latest", *committed(storage, 10, token)]


def test_clean(storage: Storage) -> None:
    storage.clean()
    save(storage, 10, "a")
    write_attempt(storage, 10, "aa")  # begins with the other's name
    write_attempt(storage, 20, "aa")
    if isinstance(storage, LocalStorage):
        root = Path(storage.address)
        (root / ".tmp-latest-1234").touch()
        (root / ".retired-00000001-aa").mkdir()
        (root / ".retired-00000001-aa" / "data").touch()
        (root / ".replaced-00000010-cc").mkdir()
        (root / ".replaced-00000010-cc" / "manifest.json").touch()
    else:
        storage.write("step-00000010/a/part-00000.json", b"{}")
    storage.clean()
    assert storage.steps() == [10]
    check(storage, 10, "a")
    assert tree(storage) == ["latest", *committed(storage, 10, "a")]


def test_clean_takes_back_a_replacement_that_was_cut_off(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    save(storage, 10)
    write_attempt(storage, 10, "bb")
    (tmp_path / "step-00000010").rename(tmp_path / ".replaced-00000010-bb")
    assert storage.steps() == []
    storage.clean()
    assert storage.steps() == [10]
    check(storage, 10)
    assert tree(storage) == ["latest", *committed(storage, 10)]


def test_clean_leaves_a_damaged_checkpoint_alone(storage: Storage) -> None:
    """That its manifest cannot be read is for a person to look at; the data may be all there is."""
    save(storage, 10)
    storage.write("step-00000010/manifest.json", b"{")
    before = tree(storage)
    storage.clean()
    storage.discard(10, "aa")
    assert tree(storage) == before
    assert storage.retire(10)
    assert tree(storage) == ["latest"]


def test_junk_is_no_step(storage: Storage) -> None:
    save(storage, 10)
    for name in ("step-20", "step-000000030", "step-0000004x", "Step-00000050", "step-00000060.bak", "60"):
        storage.write(f"{name}/manifest.json", b"{}")
    storage.write("step-00000070/data-00000.bin", b"")
    storage.write("step-00000080", b"a file")
    storage.write("step-00000090/manifest.json/inner", b"a folder of this name")
    assert storage.steps() == [10]


def test_points_of_the_commit_and_the_purge(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[int]]] = []
    monkeypatch.setattr(module.faults, "reach", lambda point: seen.append((point, storage.steps())))
    save(storage, 10)
    assert storage.retire(10)
    before = [] if isinstance(storage, LocalStorage) else [10]
    assert seen == [
        ("commit.before_manifest", []),
        ("commit.manifest", before),
        ("commit.renamed", [10]),
        ("commit.done", [10]),
        ("purge.renamed", []),
        ("purge.partly", []),
    ]


def test_a_commit_that_fails_is_discarded(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    save(storage, 5)
    monkeypatch.setattr(module.faults, "_passed", {})
    monkeypatch.setenv("RUNG_FAULT", "commit.before_manifest:*:1:ENOSPC")
    with pytest.raises(OSError, match="No space left"):
        save(storage, 10)
    storage.discard(10, "aa")
    assert storage.steps() == [5]
    assert tree(storage) == ["latest", *committed(storage, 5)]


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Whichever call notices: the error says so, nothing is left, and the old checkpoint stays the step's."""
    storage = LocalStorage(str(tmp_path / "checkpoints"))
    save(storage, 10)
    real = getattr(os, call)

    def full(*arguments: Any) -> Any:
        if call != "rename" or ".attempt-" in str(arguments[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patched:
        if call == "rename":
            write_attempt(storage, 10, "bb")
            patched.setattr(os, call, full)
            with pytest.raises(OSError, match="No space left"):
                storage.publish(10, "bb", b"{}")
        else:
            patched.setattr(os, call, full)
            with pytest.raises(OSError, match="No space left"):
                save(storage, 10, "bb")
        storage.discard(10, "bb")
    assert storage.steps() == [10]
    check(storage, 10)
    assert tree(storage) == ["latest", *committed(storage, 10)]


def test_calls_that_do_a_part_of_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, preadv = os.write, os.preadv
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, at: preadv(descriptor, [views[0][:5]], at))
    storage = LocalStorage(str(tmp_path))
    save(storage, 10)
    check(storage, 10)


def test_set_aside(storage: Storage, tmp_path: Path) -> None:
    assert storage.set_aside() is None
    for step in (10, 20):
        save(storage, step)
    if isinstance(storage, ObjectStorage):
        with pytest.raises(UserError, match=r"checkpoints holds steps 10, 20, .*choose another"):
            storage.set_aside()
        check(storage, 10)
        return
    assert storage.set_aside() == f"{storage.address}-1"
    assert (storage.steps(), tree(storage)) == ([], [])
    aside = LocalStorage(f"{storage.address}-1")
    assert aside.steps() == [10, 20]
    check(aside, 10)
    save(storage, 30)
    assert storage.set_aside() == f"{storage.address}-2"
    assert locate(f"{storage.address}-2")[0].steps() == [30]


def test_locate(storage: Storage) -> None:
    for step in (10, 20):
        save(storage, step)
    run = storage.address.rpartition("/")[0]
    for named in (run, f"{run}/", storage.address, f"{storage.address}//"):
        found, step = locate(named)
        assert (found.address, step) == (storage.address, None)
    folder = f"{storage.address}/step-00000010"
    for named in (folder, f"{folder}/", f"{folder}/manifest.json", f"{storage.address}/step-10"):
        found, step = locate(named)
        assert (found.address, step) == (storage.address, 10)

    with pytest.raises(
        UserError, match=r"step-00000030 is not a committed checkpoint; .*checkpoints holds steps 10, 20$"
    ):
        locate(f"{storage.address}/step-00000030")
    with pytest.raises(
        UserError, match=r"/other holds no checkpoint: .* in .*/other/checkpoints; it is empty or missing"
    ):
        locate(f"{run}/other")
    storage.write("notes/hello.txt", b"")
    with pytest.raises(UserError, match=r"notes holds no checkpoint: .*; there are hello\.txt$"):
        locate(f"{storage.address}/notes")
    storage.write("notes/manifest.json", b"{}")
    with pytest.raises(UserError, match="must be called like its step, as step-00000010"):
        locate(f"{storage.address}/notes/manifest.json")


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(open_storage("run/checkpoints"), 10)
    assert open_storage(f"file://{tmp_path}/run/checkpoints").steps() == [10]
    assert locate("run/checkpoints/step-00000010")[1] == 10
    monkeypatch.chdir(tmp_path / "run" / "checkpoints" / "step-00000010")
    assert locate(".")[0].address == str(tmp_path / "run" / "checkpoints")
    assert locate("manifest.json")[1] == 10
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/run")[0].steps() == [10]
    with pytest.raises(UserError, match="nosuch://bucket/x"):
        open_storage("nosuch://bucket/x")


def test_others_changes_are_seen_at_once(s3_folder: str, s3_client: Any) -> None:
    storage = open_storage(s3_folder)
    save(storage, 10)
    assert storage.steps() == [10]
    bucket, _, prefix = s3_folder.removeprefix("s3://").partition("/")
    s3_client.put_object(Bucket=bucket, Key=f"{prefix}/step-00000020/manifest.json", Body=b"{}")
    assert storage.steps() == [10, 20]
    assert storage.read("step-00000020/manifest.json") == b"{}"
    assert storage.names("step-00000020") == ["manifest.json"]
    s3_client.delete_object(Bucket=bucket, Key=f"{prefix}/step-00000010/manifest.json")
    assert storage.steps() == [20]
    with pytest.raises(CheckpointError, match="is missing"):
        storage.manifest(10)


def test_uploads_in_parts(s3_folder: str, s3_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(s3_folder)
    assert isinstance(storage, ObjectStorage)
    bucket, _, prefix = s3_folder.removeprefix("s3://").partition("/")
    monkeypatch.setattr(storage._files, "default_block_size", 5 * 2**20)
    half = os.urandom(3 * 2**20)

    def uploads() -> list[str]:
        return [upload["Key"] for upload in s3_client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])]

    with storage.open_write("folder/file") as file:
        for _ in range(4):
            file.write(half)
    assert storage.read("folder/file") == half * 4
    with suppress(ZeroDivisionError), storage.open_write("folder/failed") as file:
        file.write(half)
        file.write(half)
        assert uploads() == [f"{prefix}/folder/failed"]
        1 / 0  # noqa: B018
    assert uploads() == []
    assert storage.names("folder") == ["file"]

    for key in (f"{prefix}/killed", "somebody/else"):
        s3_client.create_multipart_upload(Bucket=bucket, Key=key)
    storage.clean()
    assert uploads() == ["somebody/else"]


def test_errors_of_a_store_are_os_errors(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = open_storage("s3://no-such-bucket/run/checkpoints")
    assert nowhere.steps() == []
    with pytest.raises(FileNotFoundError, match=r"bucket does not exist.*s3://no-such-bucket/run/checkpoints/file"):
        nowhere.write("file", b"")
    with (
        pytest.raises(FileNotFoundError, match=r"s3://no-such-bucket/run/checkpoints/file"),
        nowhere.open_write("file") as file,
    ):
        file.write(b"some")

    storage = open_storage(s3_folder)
    assert isinstance(storage, ObjectStorage)

    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("the library gave up")

    monkeypatch.setattr(storage._files, "pipe_file", fails)
    with pytest.raises(OSError, match=f"RuntimeError: the library gave up.*{s3_folder}/file"):
        storage.write("file", b"")


def test_a_lost_answer_to_the_commit(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest was stored and the writer saw an error: the checkpoint is there, and discarding does not harm it."""
    storage = open_storage(s3_folder)
    write = storage.write

    def lost(path: str, data: bytes) -> None:
        write(path, data)
        if path.endswith("manifest.json"):
            raise TimeoutError("no answer")

    monkeypatch.setattr(storage, "write", lost)
    with pytest.raises(TimeoutError):
        save(storage, 10)
    storage.discard(10, "aa")
    assert storage.steps() == [10]
    check(storage, 10)
    storage.clean()
    assert tree(storage) == committed(storage, 10)
