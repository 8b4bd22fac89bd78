"""What the ranks of test_faults.py do: a run without a model, whose every element is the number of its last step."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from law.workers import IMPORTED

from rung.checkpoint import CheckpointConfig, Checkpointer, CheckpointError, Reader, faults, open_storage, save, writer
from rung.checkpoint.storage import LocalStorage
from rung.layout import LogicalTensor
from rung.layout.logical import Shard
from rung.loop import Progress
from rung.optim import StateTensor
from rung.parallel import World
from rung.recipes.folder import Origin
from rung.recipes.resume import go_on

KEEP = 2
SMALL = {"w": (6, 5), "w/exp_avg": (6, 5), "w/step": ()}
BLOCKS = {"w": (6, 5), "w/exp_avg": (1100, 2001), "w/step": ()}
"""Two blocks in the file of each of two ranks. The second holds nothing of the model."""
Shapes = Mapping[str, tuple[int, ...]]


def this_world() -> World:
    if not dist.is_initialized():
        return World(0, 0, 1, torch.device("cpu"))
    return World(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def state(world: World, shapes: Shapes = SMALL) -> dict[str, StateTensor]:
    """Tensors in shards, and copies of what has no dim."""
    sizes, at = {"dp_shard": world.size}, {"dp_shard": world.rank}
    tensors = {}
    for name, shape in shapes.items():
        dtype = torch.float32 if shape else torch.int64
        logical = LogicalTensor.from_spec(name, shape, dtype, {"dp_shard": Shard(0)} if shape else {}, sizes, at)
        tensors[name] = StateTensor(torch.zeros(logical.local_shape, dtype=dtype), logical)
    return tensors


def fill(tensors: Mapping[str, StateTensor], step: int) -> None:
    for tensor, _ in tensors.values():
        tensor.fill_(step)


def the_one_value(tensors: Mapping[str, StateTensor]) -> float:
    """What every element is. There is no other."""
    values = {float(value) for tensor, _ in tensors.values() for value in tensor.unique()}
    assert len(values) == 1, f"torn: {values}"
    return values.pop()


def config_of(folder: Path, **settings: Any) -> CheckpointConfig:
    return CheckpointConfig(**{"interval": 1, "keep": KEEP, "dir": str(folder), **settings})


def checkpointer(
    folder: Path, world: World, tensors: Mapping[str, StateTensor], saved_step: int = 0, **settings: Any
) -> Checkpointer:
    return Checkpointer(
        config_of(folder, **settings),
        world,
        tensors,
        run_config={"optim": {"name": "adamw"}, "parallel": {}},
        fingerprints={"corpus": "c0ffee", "tokenizer": None},
        saved_step=saved_step,
    )


def progress(step: int) -> dict[str, int]:
    return {"step": step, "consumed_samples": 8 * step}


class Run(SimpleNamespace):
    """As much of a ``Training`` as resuming asks for. ``said`` holds what the person in front of it reads."""

    def __init__(self, tensors: Mapping[str, StateTensor], world: World) -> None:
        self.said: list[str] = []
        super().__init__(
            world=world,
            model=SimpleNamespace(state_tensors=lambda: {n: t for n, t in tensors.items() if "/" not in n}),
            optimizer=SimpleNamespace(named_state=lambda: {n: t for n, t in tensors.items() if "/" in n}),
            source=SimpleNamespace(fingerprint="c0ffee", tokenizer_fingerprint=None),
            monitor=SimpleNamespace(message=self.said.append, start=lambda step, state, **_: None),
            start=Progress(),
            recipe_state={},
        )


def resume(folder: Path, tensors: Mapping[str, StateTensor], world: World, optimizer: str = "adamw") -> Run:
    """``recipes.resume.go_on`` from what ``folder`` holds."""
    run = Run(tensors, world)
    config: Any = SimpleNamespace(
        run=SimpleNamespace(allow_changes=[]), optim=SimpleNamespace(name=optimizer), train=SimpleNamespace(steps=10**9)
    )
    storage = open_storage(str(folder))
    steps = world.on_main(lambda: tuple(reversed(storage.steps())))
    go_on(config, run, Origin(storage.address, steps, fall_back=True, is_own=True) if steps else None)  # type: ignore[arg-type]
    return run


@contextmanager
def slow_snapshots(seconds: float) -> Iterator[None]:
    """Every snapshot takes so long after each box."""

    def copy(self: Any) -> None:
        for (tensor, place), view in zip(self._sources, self._views, strict=True):
            view.copy_(tensor[place])
            time.sleep(seconds)

    with mock.patch.object(save._Snapshot, "_copy", copy):
        yield


@contextmanager
def eager_flush_processes() -> Iterator[None]:
    """They do not yield to whatever else this machine does: tests wait for them. Only the first meets a fault."""
    real = writer.subprocess.Popen
    before: list[Any] = []

    def start(arguments: list[str], **options: Any) -> Any:
        assert arguments[2].endswith("main()")
        arguments[2] = "from rung.checkpoint import writer; writer.NICE = 0; writer.main()"
        if before:
            os.environ["RUNG_FAULT"] = ""
        before.append(real(arguments, **options))
        return before[-1]

    with mock.patch.object(writer.subprocess, "Popen", start):
        yield


def work(
    folder: Path,
    last: int,
    rung_faults: Sequence[str | None] = (),
    *,
    shapes: Shapes = SMALL,
    joins: bool = True,
    snapshot_seconds: float = 0.0,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Go on from what ``folder`` holds to step ``last``, as a run does, and return what was reported.

    rung_faults: RUNG_FAULT of each rank. joins: False leaves out what keeps the update from meeting the snapshot. What
    was reported is also written down at once, beside ``folder``.
    """
    world = this_world()
    faults._passed.clear()
    os.environ["RUNG_FAULT"] = (rung_faults[world.rank] if world.rank < len(rung_faults) else None) or ""
    reported: list[dict[str, Any]] = []

    def note() -> None:
        for report in checkpoints.poll():
            reported.append({"at": step, "step": report.step, "error": report.error})
            with open(f"{folder}-reported-{world.rank}", "a") as file:
                file.write(json.dumps(reported[-1]) + "\n")

    with slow_snapshots(snapshot_seconds), eager_flush_processes():
        world.on_main(open_storage(str(folder)).clean)
        tensors = state(world, shapes)
        start = step = resume(folder, tensors, world).start.step
        assert the_one_value(tensors) == start
        checkpoints = checkpointer(folder, world, tensors, start, **settings)
        for step in range(start + 1, last + 1):
            world.barrier()  # the gradients
            if joins:
                checkpoints.join()
            fill(tensors, step)
            if checkpoints.due(step) and step < last:
                checkpoints.save(progress(step))
            note()
        checkpoints.finish(progress(last))
        note()
        checkpoints.close()
    os.environ["RUNG_FAULT"] = ""
    return reported


# Ranks that may die: each in a process of its own, forked from the one that Workers forks from.


def launch(
    world_size: int, function: Callable[..., Any], *args: Any, output: Path, timeout: float = 60.0, **keywords: Any
) -> list[int]:
    """Run ``function(*args)`` on ranks of their own and return their exit statuses. All of them must end."""
    ranks = start(world_size, function, *args, output=output, **keywords)
    deadline = time.monotonic() + timeout
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    hanging = [index for index, rank in enumerate(ranks) if rank.exitcode is None]
    for rank in ranks:
        rank.kill()
        rank.join()
    assert not hanging, f"ranks {hanging} did not end: {output.read_text()}"
    return [rank.exitcode for rank in ranks]


def start(world_size: int, function: Callable[..., Any], *args: Any, output: Path, **keywords: Any) -> list[Any]:
    """Processes, each of which is a rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        environment = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
        }  # fmt: skip
        process = context.Process(target=_be, args=(environment, str(output), function, args, keywords), daemon=True)
        process.start()
        ranks.append(process)
    return ranks


def _be(environment: dict[str, str], output: str, function: Callable[..., Any], args: Any, keywords: Any) -> None:
    """A rank, which ends at once when it is done or has failed, whatever its threads do."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    status = 1
    try:
        status = int(function(*args, **keywords) or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def work_alone(folder: Path, last: int, rung_faults: Sequence[str | None], **keywords: Any) -> None:
    """``work``, with a process group of its own."""
    with World.join("cpu", 30.0):
        work(folder, last, rung_faults, **keywords)


def load_alone(folder: Path, fault: str) -> None:
    """Resume, and pass or meet the points of a load."""
    os.environ["RUNG_FAULT"] = fault
    with World.join("cpu", 30.0) as world:
        resume(folder, state(world), world)


def train(overrides: Sequence[str]) -> int:
    """``rung train``."""
    from rung.cli import main

    return main(["train", *overrides])


# What must hold of a folder


def value_of(reader: Reader) -> float:
    """What every element of a whole checkpoint is."""
    values = set()
    for name, tensor in reader.manifest.tensors.items():
        values |= set(torch.frombuffer(reader.tensor(name), dtype=getattr(torch, tensor.dtype)).unique().tolist())
    assert len(values) == 1, f"torn: step {reader.step} holds {values}"
    return float(values.pop())


def sound_steps(folder: Path) -> list[int]:
    """The committed steps. Each is whole, and all of one time."""
    storage = LocalStorage(str(folder))
    for step in storage.steps():
        with Reader(storage, step) as reader:
            assert list(reader.verify()) == []
            assert value_of(reader) == reader.manifest.step == step
    return storage.steps()


def leftovers(folder: Path) -> list[str]:
    """Whatever lies there and is neither a checkpoint nor the hint which is the newest."""
    return sorted(
        name
        for name in os.listdir(folder)
        if name not in ("latest", ".lock")
        and not (name.startswith("step-") and (folder / name / "manifest.json").exists())
    )


def reports(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = Path(f"{folder}-reported-{rank}")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def everyones_said(folder: Path, shapes: Shapes) -> tuple[int, list[str], str]:
    """Step, messages and error of resuming on a rank of many; the error is the same everywhere."""
    world = this_world()
    tensors = state(world, shapes)
    try:
        run = resume(folder, tensors, world)
    except CheckpointError as problem:
        return 0, [], str(problem)
    assert the_one_value(tensors) == run.start.step
    return run.start.step, run.said, ""


# A disk that is really full


def on_a_small_disk(folder: Path, result: Path) -> None:
    """With 4 MB for checkpoints of 1.2 MB each, in a mount of this process's own: full, and then no more."""
    new_namespaces = 0x00020000 | (0x10000000 if os.getuid() else 0)  # of mounts, and of users where that takes it
    libc = ctypes.CDLL(None, use_errno=True)
    private = 0x40000 | 0x4000  # MS_PRIVATE | MS_REC: what is mounted here is seen nowhere else
    for call in (
        lambda: libc.unshare(new_namespaces),
        lambda: libc.mount(b"none", b"/", None, private, None),
        lambda: libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=4m"),
    ):
        if call() != 0:
            result.write_text(json.dumps({"skip": os.strerror(ctypes.get_errno())}))
            return
    world, shapes = this_world(), {"w": (300_000,), "w/step": ()}
    tensors = state(world, shapes)
    checkpoints = checkpointer(folder / "checkpoints", world, tensors)
    errors: dict[int, str | None] = {}
    there: dict[int, list[str]] = {}

    def step(number: int) -> None:
        checkpoints.join()
        fill(tensors, number)
        assert checkpoints.save(progress(number))
        checkpoints._wait_for_writers()
        errors.update((report.step, report.error) for report in checkpoints.poll())
        there[number] = leftovers(folder / "checkpoints")

    with eager_flush_processes():
        for number in (1, 2, 3):
            step(number)
        (folder / "ballast").write_bytes(bytes(1_200_000))
        for number in (4, 5):
            step(number)
        found = sound_steps(folder / "checkpoints")
        again = resume(folder / "checkpoints", state(world, shapes), world).start.step
        (folder / "ballast").unlink()
        step(6)
        checkpoints.close()
    after = sound_steps(folder / "checkpoints")
    result.write_text(json.dumps({"errors": errors, "there": there, "found": found, "again": again, "after": after}))
