"""Whatever dies, fails, fills up or rots: no committed checkpoint is lost, and no wrong number is loaded."""

from __future__ import annotations

import fcntl
import functools
import importlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
import torch.distributed as dist
from checkpoint import fault_ranks
from checkpoint.fault_ranks import BLOCKS, KEEP, SMALL, checkpointer, fill, leftovers, progress, resume, sound_steps
from law.workers import Workers

from rung.checkpoint import Checkpointer, CheckpointError, Reader, faults, format, load, writer
from rung.checkpoint.storage import LocalStorage
from rung.parallel import World
from rung.recipes import resume as recipe

LAST = 5
ALONE = World(0, 0, 1, torch.device("cpu"))
WRITE = [point for point in faults.POINTS if point.startswith("write.")]
COMMIT = [point for point in faults.POINTS if point.startswith(("commit.", "purge."))]
SAVE = [point for point in faults.POINTS if point.startswith("save.")]
LOAD = [point for point in faults.POINTS if point.startswith("load.")]


def nth_of(point: str) -> int:
    """In the third checkpoint, when retention begins; of two blocks the second."""
    return {"write.block": 6}.get(point, 1 if point.startswith("purge.") else 3)


def cases(everything: list[tuple[str, int]], fast: list[tuple[str, int]]) -> list[Any]:
    assert set(fast) <= set(everything)
    return [
        pytest.param(*case, id=f"{case[0]}-{case[1]}", marks=[] if case in fast else pytest.mark.slow)
        for case in everything
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture(autouse=True)
def no_fault_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RUNG_FAULT", "")
    faults._passed.clear()
    yield
    faults._passed.clear()


def on(rank: int, fault: str) -> list[str | None]:
    return [fault if other == rank else None for other in range(2)]


@pytest.fixture
def rung(rung: Callable[..., Any]) -> Callable[..., Any]:
    """As in conftest.py, several times in one test: a run that failed leaves its process group."""

    def call(*arguments: object) -> Any:
        if dist.is_initialized():
            dist.destroy_process_group()
        return rung(*arguments)

    return call


def two(workers: Workers, *args: Any, **keywords: Any) -> list[Any]:
    """``work`` on two ranks that live on."""
    reports: list[Any] = workers.run(2, functools.partial(fault_ranks.work, *args, **keywords), timeout=60.0)
    return reports


def check(folder: Path) -> int:
    """What must hold after a run died, before anything is mended: the newest step."""
    committed = [report["step"] for report in fault_ranks.reports(folder, 0) if report["error"] is None]
    there = sound_steps(folder)
    for step in committed:
        assert step in there or sum(other > step for other in there) >= KEEP, (step, there)
    assert len(there) <= KEEP + 1
    storage = LocalStorage(str(folder))
    storage.clean()
    assert leftovers(folder) == [] and storage.steps() == there
    for step in there:  # nobody who is dead holds it
        with open(folder / f"step-{step:08d}" / "manifest.json", "r+b") as manifest:
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return there[-1]


def check_going_on(workers: Workers, folder: Path, newest: int, **keywords: Any) -> None:
    """A new run begins where the newest checkpoint is, commits, and leaves nothing behind."""
    two(workers, folder, newest + 2, async_=False, **keywords)
    assert sound_steps(folder) == [newest + 1, newest + 2] and leftovers(folder) == []


# Death


@pytest.mark.parametrize(
    ("point", "rank"),
    cases(
        [(point, rank) for point in WRITE for rank in (0, 1)] + [(point, 0) for point in COMMIT],
        [
            ("write.begin", 1), ("write.block", 1), ("write.before_sync", 0), ("write.before_part", 1),
            ("write.part", 1), ("commit.merged", 0), ("commit.manifest", 0), ("commit.renamed", 0),
            ("purge.renamed", 0),
        ],
    ),
)  # fmt: skip
def test_a_flush_process_is_killed(workers: Workers, folder: Path, point: str, rank: int) -> None:
    """Training goes on, is told, and the next checkpoint is written by a new process."""
    shapes = BLOCKS if point == "write.block" else SMALL
    fault = on(rank, f"{point}:{rank}:{nth_of(point)}")
    reported = two(workers, folder, LAST, fault, shapes=shapes)
    (failure,) = (report for report in reported[rank] if report["error"])
    assert failure["step"] == 3 and failure["at"] <= 4
    assert failure["error"] == "the process that writes the checkpoint ended with status -9"
    late = point.startswith(("commit.renamed", "commit.done", "purge.")) or (point, rank) == ("write.part", 1)
    assert sound_steps(folder) == [4, 5]
    committed = [report["step"] for report in reported[0] if report["error"] is None]
    if rank == 0 or not late:
        assert committed == [1, 2, 4, 5]
        assert [report["step"] for report in reported[0] if report["error"]] == [3]
    else:
        assert committed == [1, 2, 3, 4, 5]
    assert [name for name in leftovers(folder) if not name.startswith(".retired-")] == []
    assert check(folder) == LAST
    check_going_on(workers, folder, LAST, shapes=shapes)


@pytest.mark.parametrize(
    ("point", "rank"),
    cases(
        [(point, rank) for point in WRITE for rank in (0, 1)] + [(point, 0) for point in COMMIT],
        [("write.before_sync", 1), ("commit.before_manifest", 0), ("commit.done", 0), ("purge.partly", 0)],
    ),
)
def test_a_rank_is_killed_while_it_writes(workers: Workers, folder: Path, point: str, rank: int) -> None:
    """Where training waits for the commit, the ranks write themselves."""
    shapes = BLOCKS if point == "write.block" else SMALL
    fault = on(rank, f"{point}:{rank}:{nth_of(point)}")
    output = folder.parent / "output"
    ended = fault_ranks.launch(
        2, fault_ranks.work_alone, folder, LAST, fault, async_=False, shapes=shapes, output=output
    )
    assert ended[rank] == -signal.SIGKILL and ended[1 - rank] == 1, output.read_text()
    visible = point.startswith(("commit.renamed", "commit.done", "purge."))
    newest = check(folder)
    assert newest == 3 if visible else newest in ((2, 3) if (point, rank) == ("write.part", 1) else (2,))
    check_going_on(workers, folder, newest, shapes=shapes)


@pytest.mark.parametrize(
    ("point", "rank"),
    cases([(point, rank) for point in SAVE for rank in (0, 1)], [("save.snapshot", 1), ("save.handed_over", 0)]),
)
def test_a_rank_is_killed_while_others_write_for_it(workers: Workers, folder: Path, point: str, rank: int) -> None:
    output = folder.parent / "output"
    fault = on(rank, f"{point}:{rank}:4")
    ended = fault_ranks.launch(2, fault_ranks.work_alone, folder, LAST, fault, output=output)
    assert ended[rank] == -signal.SIGKILL and ended[1 - rank] == 1, output.read_text()
    newest = check(folder)
    assert newest in (3, 4) if point == "save.handed_over" else newest == 3
    check_going_on(workers, folder, newest)


@pytest.mark.parametrize(
    ("point", "rank"),
    cases(
        [(point, rank) for point in LOAD for rank in (0, 1)],
        [("load.begin", 1), ("load.window", 0), ("load.done", 1)],
    ),
)
def test_a_rank_is_killed_while_it_loads(workers: Workers, folder: Path, point: str, rank: int) -> None:
    two(workers, folder, 2, async_=False)
    before = sorted(path.name for path in folder.iterdir())
    output = folder.parent / "output"
    ended = fault_ranks.launch(2, fault_ranks.load_alone, folder, f"{point}:{rank}:1", output=output)
    assert ended[rank] == -signal.SIGKILL and ended[1 - rank] == 1, output.read_text()
    assert sorted(path.name for path in folder.iterdir()) == before
    assert check(folder) == 2
    check_going_on(workers, folder, 2)


def test_a_flush_process_dies_with_its_rank(folder: Path) -> None:
    """It must not commit, or delete, where the next run already is."""
    output = folder.parent / "output"
    (rank,) = fault_ranks.start(1, fault_ranks.work_alone, folder, LAST, ["write.block:0:1:60"], output=output)
    try:
        while not list(folder.glob(".attempt-*/data-*")):
            assert rank.exitcode is None, output.read_text()
            time.sleep(0.01)
        (flush,) = psutil.Process(rank.pid).children()
    finally:
        rank.kill()
    assert psutil.wait_procs([flush], timeout=30)[0] == [flush]
    assert sound_steps(folder) == []


def test_a_part_that_was_announced_is_not_taken_back(workers: Workers, folder: Path) -> None:
    """Rank 1's writer dies when its part is complete, and rank 0 is about to commit what it has seen."""
    fault = ["commit.merged:0:3:1.0", "write.part:1:3"]
    reported = two(workers, folder, LAST, fault, keep=0)
    assert [(report["step"], report["error"]) for report in reported[0]] == [(step, None) for step in range(1, 6)]
    assert sound_steps(folder) == [1, 2, 3, 4, 5] and leftovers(folder) == []


def test_what_writers_leave_of_a_checkpoint_that_was_given_up_goes(workers: Workers, folder: Path) -> None:
    """Rank 0 gives up while rank 1 has not even begun."""
    fault = ["write.block:0:3:ENOSPC", "write.begin:1:3:0.5"]
    two(workers, folder, LAST, fault)
    assert sound_steps(folder) == [4, 5] and leftovers(folder) == []


def test_a_flush_process_that_cannot_even_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = fault_ranks.state(ALONE)
    checkpoints = checkpointer(folder, ALONE, tensors)
    started = writer.subprocess.Popen

    def starts_nothing(arguments: list[str], **options: Any) -> Any:
        process = started(["/bin/false"], **options)
        process.wait()
        return process

    with mock.patch.object(writer.subprocess, "Popen", starts_nothing):
        assert checkpoints.save(progress(1))
        checkpoints._wait_for_writers()
    (report,) = checkpoints.poll()
    assert report.error == "the process that writes the checkpoint ended with status 1"
    checkpoints.finish(progress(1))  # what could not be saved is saved again
    checkpoints.close()
    assert LocalStorage(str(folder)).steps() == [1]


# Failure


@pytest.mark.parametrize("is_async", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_space_on_one_rank(workers: Workers, folder: Path, is_async: bool) -> None:
    fault = on(1, "write.block:1:3:ENOSPC")
    reported = two(workers, folder, LAST, fault, async_=is_async)
    (mine,) = reported[1]
    assert mine["step"] == 3 and mine["at"] <= 4 and "No space left on device" in mine["error"]
    (main,) = (report for report in reported[0] if report["error"])
    assert main["step"] == 3 and main["at"] <= 4 and main["error"].startswith("rank 1: ")
    assert "No space left on device" in main["error"]
    assert [report["step"] for report in reported[0] if report["error"] is None] == [1, 2, 4, 5]
    assert sound_steps(folder) == [4, 5] and leftovers(folder) == []


@pytest.mark.parametrize("fault", ["write.block:0:1:ENOSPC", "write.block:0:1"])
def test_what_could_not_be_written_goes_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setenv("RUNG_FAULT", fault)
    checkpoints = checkpointer(folder, ALONE, fault_ranks.state(ALONE))
    with fault_ranks.eager_flush_processes():
        checkpoints.save(progress(1))
    checkpoints.join()
    deadline = time.monotonic() + 60
    while not (reports := checkpoints.poll()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert reports[0].error is not None and leftovers(folder) == []
    checkpoints.close()


def test_the_one_before_loads_where_the_last_could_not_be_written(folder: Path, monkeypatch: Any) -> None:
    fault_ranks.work(folder, 2, async_=False)
    monkeypatch.setenv("RUNG_FAULT", "write.block:0:1:ENOSPC")
    tensors = fault_ranks.state(ALONE)
    start = resume(folder, tensors, ALONE).start.step
    checkpoints = checkpointer(folder, ALONE, tensors, start, async_=False)
    fill(tensors, 3)
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 3 was not committed: .*No space left on device"):
        checkpoints.finish(progress(3))
    assert sound_steps(folder) == [1, 2] and leftovers(folder) == []
    checkpoints.finish(progress(3))  # once there is space
    assert sound_steps(folder) == [2, 3]


def test_a_disk_that_is_full(folder: Path) -> None:
    disk, result = folder.parent / "disk", folder.parent / "result"
    disk.mkdir()
    output = folder.parent / "output"
    ended = fault_ranks.launch(1, fault_ranks.on_a_small_disk, disk, result, output=output)
    assert ended == [0], output.read_text()
    found = json.loads(result.read_text())
    if "skip" in found:
        pytest.skip(f"no file system can be mounted here: {found['skip']}")
    assert [step for step, error in found["errors"].items() if error is None] == ["1", "2", "3", "6"]
    for step in ("4", "5"):
        assert "No space left on device" in found["errors"][step] and found["there"][step] == []
    assert found["found"] == [2, 3] and found["again"] == 3 and found["after"] == [3, 6]


# One moment


@pytest.mark.parametrize("joins", [True, False])
def test_every_value_of_a_checkpoint_is_of_one_step(workers: Workers, folder: Path, joins: bool) -> None:
    """All state becomes the number of the step just after join(), while snapshots and writers are slow."""
    fault = ["write.block:0:2:0.3", "write.block:1:3:0.3"]
    run = lambda: two(workers, folder, 4, fault, joins=joins, snapshot_seconds=0.05, keep=0)  # noqa: E731
    run()
    if joins:
        assert sound_steps(folder) == [1, 2, 3, 4]
    else:
        with pytest.raises(AssertionError, match="torn"):
            sound_steps(folder)


@pytest.mark.parametrize("joins", [True, False])
def test_the_loop_joins_before_it_updates(
    rung: Callable[..., Any], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joins: bool
) -> None:
    """The same in the real loop, where the update of the optimizer is replaced by the number of the step."""
    done: list[int] = []

    def update(run: Any, *_: Any) -> Any:
        done.append(len(done) + 1)
        with torch.no_grad():
            fill(recipe.state_tensors(run), done[-1])
        run.model.zero_grad()
        zero = torch.zeros((), dtype=torch.float64)
        return zero, zero, zero

    waits, updating = Checkpointer.join, Checkpointer.save
    monkeypatch.setattr(importlib.import_module("rung.loop.train"), "update", update)
    if not joins:
        inside: list[bool] = []

        def save_(self: Any, *args: Any, **keywords: Any) -> bool:
            inside.append(True)
            try:
                return updating(self, *args, **keywords)
            finally:
                inside.pop()

        monkeypatch.setattr(Checkpointer, "save", save_)
        monkeypatch.setattr(Checkpointer, "join", lambda self: waits(self) if inside or len(done) == 3 else None)
    options = ["checkpoint.interval=1", "checkpoint.keep=0", "eval.interval=0"]
    with fault_ranks.slow_snapshots(0.003):
        status = rung("train", *tiny, *options)
    assert status.status == 0, status.err
    folder = tmp_path / "run" / "checkpoints"
    if joins:
        assert sound_steps(folder) == [1, 2, 3]
    else:
        with pytest.raises(AssertionError, match="torn"):
            sound_steps(folder)


# Back-pressure


def slow_run(folder: Path, monkeypatch: pytest.MonkeyPatch, when_busy: str) -> tuple[list[bool], list[float], Any]:
    """Four steps, of which the first takes a second to write: whether they were saved, how long that took, reports."""
    monkeypatch.setenv("RUNG_FAULT", "write.block:0:1:1.0")
    tensors = fault_ranks.state(ALONE)
    checkpoints = checkpointer(folder, ALONE, tensors, when_busy=when_busy, keep=0)
    saved, seconds, reports = [], [], []
    for step in (1, 2, 3, 4):
        checkpoints.join()
        fill(tensors, step)
        checkpoints.take_stall_seconds()
        saved.append(checkpoints.save(progress(step)))
        seconds.append(checkpoints.take_stall_seconds())
        reports += checkpoints.poll()
        if step == 3:
            checkpoints._wait_for_writers()
    checkpoints.finish(progress(4))
    reports += checkpoints.poll()
    checkpoints.close()
    return saved, seconds, reports


def test_training_waits_for_a_slow_writer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    saved, seconds, reports = slow_run(folder, monkeypatch, "wait")
    assert saved == [True] * 4 and sound_steps(folder) == [1, 2, 3, 4]
    assert [(report.step, report.error) for report in reports] == [(step, None) for step in (1, 2, 3, 4)]
    assert 0.9 < seconds[1] < time.monotonic() - begun


def test_or_skips_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, seconds, reports = slow_run(folder, monkeypatch, "skip")
    assert saved == [True, False, False, True] and sound_steps(folder) == [1, 4]
    assert max(seconds[1:3]) < 0.5
    told = {report.step: report.error for report in reports}
    assert told.keys() == {1, 2, 3, 4} and told[1] is None and told[4] is None
    assert told[2] == told[3] and "the one before it is still being written" in told[2]


def test_there_is_one_buffer(folder: Path) -> None:
    tensors = fault_ranks.state(ALONE)
    checkpoints = checkpointer(folder, ALONE, tensors)

    def buffers() -> tuple[int, int]:
        """Mapped, and held by a descriptor."""
        maps = Path("/proc/self/maps").read_text().splitlines()
        held = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return sum("rung-checkpoint" in line for line in maps), sum("rung-checkpoint" in path for path in held)

    before, seen = buffers(), []
    for step in (1, 2, 3):
        checkpoints.join()
        fill(tensors, step)
        checkpoints.save(progress(step))
        seen.append(buffers())
    checkpoints.finish(progress(3))
    assert {*seen, buffers()} == {(before[0] + 1, before[1] + 2)}  # a mapping has a descriptor of its own
    checkpoints.close()
    assert sound_steps(folder) == [2, 3]


# Rot


@pytest.fixture(scope="module")
def two_checkpoints(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2, by two ranks."""
    folder = tmp_path_factory.mktemp("rot") / "checkpoints"
    two(workers, folder, 2, async_=False, shapes=BLOCKS)
    return folder


def flip(path: Path, rng: random.Random) -> int:
    """Flip one bit; the byte that it is in."""
    at = rng.randrange(path.stat().st_size)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    return at


def spoil(step: Path, kind: str, rng: random.Random) -> tuple[str, set[int]]:
    """Damage a checkpoint of two files; which file has it, and in which of its two blocks."""
    file = rng.choice(["data-00000.bin", "data-00001.bin"])
    path, size = step / file, (step / file).stat().st_size
    if kind == "flip":
        return file, {flip(path, rng) // format.BLOCK_BYTES}
    if kind == "truncate":
        kept = rng.randrange(size)
        os.truncate(path, kept)
        return file, {block for block in (0, 1) if kept < min(size, (block + 1) * format.BLOCK_BYTES)}
    if kind == "missing":
        path.unlink()
    elif kind == "swapped":  # the two differ at their ends, where the first also holds the scalar
        os.rename(step / "data-00000.bin", step / "other")
        os.rename(step / "data-00001.bin", step / "data-00000.bin")
        os.rename(step / "other", step / "data-00001.bin")
        return file, {1}
    elif kind == "of another step":
        shutil.copyfile(step.parent / "step-00000001" / file, path)
    elif kind == "manifest":
        file = "manifest.json"
        flip(step / file, rng)
    return file, {0, 1}


KINDS = ["flip", "flip", "flip", "flip", "truncate", "truncate", "missing", "swapped", "of another step", "manifest"]


@pytest.mark.parametrize("tens", [0, *(pytest.param(tens, marks=pytest.mark.slow) for tens in range(1, 10))])
def test_random_damage(two_checkpoints: Path, tmp_path: Path, tens: int) -> None:
    """A run falls back, loudly, and loads the step before; what a load does not touch, verifying finds."""
    for number, kind in enumerate(KINDS):
        rng = random.Random(f"{tens} {number}")
        folder = tmp_path / f"{number}"
        shutil.copytree(two_checkpoints, folder)
        file, blocks = spoil(folder / "step-00000002", kind, rng)
        files = sorted(path for path in folder.rglob("*") if path.is_file())

        tensors = fault_ranks.state(ALONE, BLOCKS)
        run = resume(folder, tensors, ALONE)
        assert run.start.step == fault_ranks.the_one_value(tensors) == 1
        cannot, falling, *_ = (line for line in run.said if line.startswith("!!"))
        assert cannot.startswith("!! the checkpoint of step 2 cannot be loaded:") and str(folder) in cannot
        assert "falling back" in falling
        where = "data-0000" if kind == "swapped" else file
        assert where in cannot and (kind == "manifest" or "w/exp_avg" in cannot), cannot

        if kind != "manifest":
            with Reader(LocalStorage(str(folder)), 2) as reader:
                problems = "\n".join(reader.verify())
            assert where in problems and "w/exp_avg" in problems, problems

        model_only = fault_ranks.state(ALONE, BLOCKS)
        run = resume(folder, model_only, ALONE, optimizer="muon")
        step = 2 if blocks == {1} else 1
        assert run.start.step == step, (kind, file, blocks)
        assert bool((model_only["w"].tensor == step).all()) and not bool(model_only["w/exp_avg"].tensor.any())
        assert sorted(path for path in folder.rglob("*") if path.is_file()) == files
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["flip", pytest.param("missing", marks=pytest.mark.slow), "manifest"])
def test_damage_is_found_by_every_rank(workers: Workers, two_checkpoints: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    file, _ = spoil(folder / "step-00000002", kind, random.Random(1))
    everyone = workers.run(2, fault_ranks.everyones_said, folder, BLOCKS)
    for step, said, error in everyone:
        assert step == 1 and not error and any(line.startswith("!!") and file in line for line in said)
    spoil(folder / "step-00000001", "flip", random.Random(2))
    everyone = workers.run(2, fault_ranks.everyones_said, folder, BLOCKS)
    texts = {error for _, _, error in everyone}
    assert len(texts) == 1 and file in texts.pop()
    assert LocalStorage(str(folder)).steps() == [1, 2]


def test_what_a_damaged_one_left_in_memory_goes_when_the_one_before_has_less(folder: Path) -> None:
    """Step 1 holds a model only, as one that was imported; step 2 holds all, and breaks off in its second window."""
    tensors = fault_ranks.state(ALONE, BLOCKS)
    for step, names in ((1, ["w"]), (2, list(tensors))):
        fill(tensors, step)
        some = checkpointer(folder, ALONE, {name: tensors[name] for name in names}, async_=False)
        some.finish(progress(step))
    with open(folder / "step-00000002" / "data-00000.bin", "r+b") as file:
        file.seek(2 * format.BLOCK_BYTES)
        file.write(b"\xff")
    target = fault_ranks.state(ALONE, BLOCKS)
    windows = lambda *args: load.load_state(*args, window_bytes=format.BLOCK_BYTES)  # noqa: E731
    with mock.patch.object(recipe, "load_state", windows):
        run = resume(folder, target, ALONE)
    assert run.start.step == 1 and bool((target["w"].tensor == 1).all())
    assert not target["w/exp_avg"].tensor.any() and not target["w/step"].tensor.any()


def test_a_run_falls_back_loudly_and_refuses_when_nothing_is_left(
    rung: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    more = ["checkpoint.interval=1", "checkpoint.async=false"]
    assert rung("train", *tiny, *more).status == 0
    folder = tmp_path / "run" / "checkpoints"
    storage = LocalStorage(str(folder))
    assert storage.steps() == [1, 2, 3]
    with Reader(storage, 3) as reader:
        digest = reader.manifest.digest
    flip(folder / "step-00000003" / "data-00000.bin", random.Random(0))
    again = rung("train", *tiny, *more)
    assert again.status == 0, again.err
    assert "!! the checkpoint of step 3 cannot be loaded:" in again.out and "data-00000.bin" in again.out
    assert "going on after step 2" in again.out
    with Reader(storage, 3) as reader:  # written anew
        assert reader.manifest.digest == digest and list(reader.verify()) == []

    for step in storage.steps():
        flip(folder / f"step-{step:08d}" / "data-00000.bin", random.Random(step))
    contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    refused = rung("train", *tiny, *more)
    assert refused.status == 1
    assert "no checkpoint in" in refused.err and "run.resume=never" in refused.err
    assert all(f"step-{step:08d}/data-00000.bin" in refused.err for step in storage.steps())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == contents
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics

    (folder / "step-00000003" / "manifest.json").write_bytes(b"{")
    for step in (1, 2):
        flip(folder / f"step-{step:08d}" / "manifest.json", random.Random(step))
    refused = rung("train", *tiny, *more)
    assert refused.status == 1 and "manifest.json is damaged" in refused.err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def make_newer(manifest: Path) -> None:
    """As a later Rung would write it."""
    body = json.loads(manifest.read_bytes())
    del body["checksum"]
    body["schema_version"] = format.SCHEMA_VERSION + 1
    text = format._dump(body)
    manifest.write_bytes(format._first_line(text) + text[1:])


def test_a_newer_schema_is_no_damage(rung: Callable[..., Any], tiny: list[str], tmp_path: Path) -> None:
    """Going back would throw away what a newer Rung has done: that is for a person to decide."""
    more = ["checkpoint.interval=1", "checkpoint.async=false"]
    assert rung("train", *tiny, *more).status == 0
    folder = tmp_path / "run" / "checkpoints"
    make_newer(folder / "step-00000003" / "manifest.json")
    contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused = rung("train", *tiny, *more)
    assert refused.status in (1, 2), refused.out
    assert f"schema version {format.SCHEMA_VERSION + 1}" in refused.err and "install a newer one" in refused.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == contents


# Retention


def test_retention(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(str(folder))
    tensors = fault_ranks.state(ALONE)
    checkpoints = checkpointer(folder, ALONE, tensors, async_=False)

    def saved(step: int, fault: str = "") -> list[int]:
        faults._passed.clear()
        monkeypatch.setenv("RUNG_FAULT", fault)
        fill(tensors, step)
        checkpoints.save(progress(step))
        (report,) = checkpoints.poll()
        assert (report.error is not None) == bool(fault)
        return sound_steps(folder)

    assert saved(1) == [1] and saved(2) == [1, 2] and saved(3) == [2, 3]
    for fault in ("write.block:0:1:ENOSPC", "commit.merged:0:1:EIO", "commit.before_manifest:0:1:EIO"):
        assert saved(4, fault) == [2, 3]  # what was not committed counts for nothing, and costs nothing
    with Reader(storage, 2) as reader:
        assert saved(5) == [2, 3, 5][-3:]
        assert fault_ranks.value_of(reader) == 2
        assert saved(6) == [2, 5, 6]
        assert fault_ranks.value_of(reader) == 2
    assert saved(7) == [6, 7]


def test_later_steps_of_another_time_line(folder: Path) -> None:
    """A run that fell back to step 2 of 1, 2, 3, 4: what it keeps is counted from where it is."""
    fault_ranks.work(folder, 4, async_=False, keep=0)
    for step in (3, 4):
        flip(folder / f"step-{step:08d}" / "data-00000.bin", random.Random(step))
    tensors = fault_ranks.state(ALONE)
    run = resume(folder, tensors, ALONE)
    assert run.start.step == 2
    checkpoints = checkpointer(folder, ALONE, tensors, 2, async_=False, keep=1)
    storage = LocalStorage(str(folder))
    fill(tensors, 3)
    checkpoints.save(progress(3))
    assert storage.steps() == [3, 4]
    with Reader(storage, 3) as reader:  # in place of the damaged one
        assert list(reader.verify()) == [] and fault_ranks.value_of(reader) == 3
    fill(tensors, 5)
    checkpoints.save(progress(5))
    assert storage.steps() == [5]


# Whole runs


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_whole_run_is_killed_and_run_again(
    rung: Callable[..., Any], tiny: list[str], tmp_path: Path, world_size: int
) -> None:
    """At a random moment; while it lives nobody else may have its folder, and what it ends with is the same."""
    options = ["train.steps=24", "checkpoint.interval=2", "train.micro_batch_size=1"]
    overrides = [*tiny, *options, "eval.interval=0"]

    def last_digest(folder: Path) -> str:
        assert leftovers(folder) == []
        with Reader(LocalStorage(str(folder)), 24) as reader:
            assert list(reader.verify()) == []
            return reader.manifest.digest

    output, here = tmp_path / "output", tmp_path / "run"
    undisturbed = [*overrides, f"run.dir={tmp_path / 'undisturbed'}"]
    ranks = fault_ranks.start(world_size, fault_ranks.train, overrides, output=output)
    metrics, moment = here / "metrics.jsonl", random.randint(6, 20)
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") >= moment):
            assert all(rank.exitcode is None for rank in ranks), output.read_text()
            time.sleep(0.005)
        for rank in ranks:
            os.kill(rank.pid, signal.SIGSTOP)  # it lives as long as this needs
        second = rung("train", *overrides)
        assert second.status == 2 and "is in use by another run" in second.err
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    storage = LocalStorage(str(here / "checkpoints"))
    for step in storage.steps():
        with Reader(storage, step) as reader:
            assert list(reader.verify()) == []
    assert fault_ranks.launch(world_size, fault_ranks.train, overrides, output=output) == [0] * world_size
    assert "going on after step" in output.read_text()
    assert fault_ranks.launch(world_size, fault_ranks.train, undisturbed, output=output) == [0] * world_size
    assert last_digest(here / "checkpoints") == last_digest(tmp_path / "undisturbed" / "checkpoints")


def test_a_thread_that_writes_slowly_is_waited_for(
    rung: Callable[..., Any], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is given up wakes later, and commits as this step what the buffer holds by then."""
    settings = ["checkpoint.interval=1", "checkpoint.async=false", "checkpoint.write_timeout_seconds=0.5"]
    digests = {}
    for name in ("quick", "slow"):
        if name == "slow":
            monkeypatch.setattr(faults, "_passed", {})
            monkeypatch.setenv("RUNG_FAULT", "write.begin:0:1:2")
        folder = tmp_path / name / "checkpoints"
        run = [setting for setting in tiny if not setting.startswith("run.dir=")] + [f"run.dir={tmp_path / name}"]
        assert rung("train", *run, *settings, "export.huggingface=false").status == 0
        digests[name] = []
        for step in (1, 2, 3):
            with Reader(LocalStorage(str(folder)), step) as reader:
                assert not list(reader.verify())
                digests[name].append(reader.manifest.digest)
    assert digests["slow"] == digests["quick"]
