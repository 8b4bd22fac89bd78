"""The ranks of a run: found in the environment of torchrun or srun, or one process alone."""

from __future__ import annotations

import datetime
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, overload

import torch
import torch.distributed as dist

from rung.errors import CheckpointError, LocalUserError, NewerCheckpointError, UserError

__all__ = ["World", "world_size_from_environment"]

T = TypeVar("T")


@dataclass(frozen=True)
class _Place:
    rank: int
    local_rank: int
    world_size: int


def _place() -> _Place:
    """torchrun's variables first; then those that srun sets for the tasks of a step (a batch shell has none)."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        try:
            place = _Place(int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"]))
        except ValueError:
            raise LocalUserError(
                f"RANK={env['RANK']}, LOCAL_RANK={env.get('LOCAL_RANK', 0)} and WORLD_SIZE={env['WORLD_SIZE']} must be "
                "whole numbers, as torchrun sets them"
            ) from None
        if not 0 <= place.rank < place.world_size:
            raise LocalUserError(f"RANK={place.rank} is not below WORLD_SIZE={place.world_size}")
        if place.world_size > 1 and not ("MASTER_ADDR" in env and "MASTER_PORT" in env):
            raise LocalUserError(
                f"WORLD_SIZE={place.world_size} needs MASTER_ADDR and MASTER_PORT, as torchrun sets them"
            )
        return place
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        return _Place(int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0)), int(env["SLURM_STEP_NUM_TASKS"]))
    return _Place(0, 0, 1)


def world_size_from_environment() -> int:
    """Ranks that the launcher started; needs no process group."""
    return _place().world_size


@dataclass(frozen=True)
class World:
    """This process among its peers. ``device`` is where its tensors live."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 talks to people and writes shared files."""
        return self.rank == 0

    @classmethod
    def join(cls, device: str = "auto", timeout_seconds: float = 600.0) -> World:
        """Create the default process group: NCCL and gloo with CUDA, gloo on CPU; one process alone needs no network.

        ``device`` is auto, cpu or cuda. ``timeout_seconds`` bounds the wait for all ranks to come, and every collective
        until ``set_timeout`` changes it.
        """
        place = _place()
        kind = choose_device(device)
        if kind == "cuda":
            here = int(os.environ.get("LOCAL_WORLD_SIZE", place.local_rank + 1))
            if here > torch.cuda.device_count():
                raise LocalUserError(
                    f"{here} processes on this machine share {torch.cuda.device_count()} GPUs; "
                    "start as many processes per node as GPUs, or use device=cpu"
                )
            torch.cuda.set_device(place.local_rank)
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        options: dict[str, Any] = {"timeout": datetime.timedelta(seconds=timeout_seconds)}
        if place.world_size == 1:
            options.update(store=dist.HashStore(), rank=0, world_size=1)
        elif "RANK" not in os.environ:
            address, port = _slurm_rendezvous()
            options.update(init_method=f"tcp://{address}:{port}", rank=place.rank, world_size=place.world_size)
        dist.init_process_group(backend, **options)
        where = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
        return cls(place.rank, place.local_rank, place.world_size, where)

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Destroy the process group; not after a failure, when other ranks may be gone and destroying could hang."""
        if dist.is_initialized() and (kind is None or issubclass(kind, UserError)):
            dist.destroy_process_group()

    def set_timeout(self, seconds: float) -> None:
        """Bound collectives from here on. The first step compiles and connects; later ones must be quick."""
        from torch.distributed.distributed_c10d import _set_pg_timeout, _world

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for group in list(_world.pg_map):
            _set_pg_timeout(datetime.timedelta(seconds=seconds), group)

    @overload
    def on_main(self, action: Callable[[], T]) -> T: ...
    @overload
    def on_main(self, action: Callable[[], T], *, share: Literal[False]) -> T | None: ...
    def on_main(self, action: Callable[[], T], *, share: bool = True) -> T | None:
        """Run ``action`` on rank 0 while the others wait; its result, UserError or CheckpointError is everybody's.

        With ``share`` off the result stays on rank 0, and the others get None.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except (UserError, CheckpointError) as error:
                outcome[1] = _kind(error), str(error)
        sent = outcome if share else [None, outcome[1]]
        if self.size > 1:
            dist.broadcast_object_list(sent, src=0)
        if sent[1] is not None:
            kind, text = sent[1]
            raise kind(text)
        result: T | None = outcome[0] if self.is_main else sent[0]
        return result

    def everywhere(self, action: Callable[[], T]) -> T:
        """Run ``action`` on every rank. A UserError or CheckpointError on any is raised on all, in one text that names
        the ranks."""
        result, problem = None, None
        kind: type[UserError | CheckpointError] = UserError
        try:
            result = action()
        except (UserError, CheckpointError) as error:
            problem = _kind(error), str(error)
        problems = [problem]
        if self.size > 1:
            problems = [None] * self.size
            dist.all_gather_object(problems, problem)
        ranks: dict[str, list[str]] = {}
        for rank, found in enumerate(problems):
            if found is not None:
                kind = found[0]
                ranks.setdefault(found[1], []).append(str(rank))
        if ranks:
            shared = len(next(iter(ranks.values()))) == self.size
            texts = [text if shared else f"rank {', '.join(where)}: {text}" for text, where in ranks.items()]
            raise kind(UserError.one_text(texts))
        return cast(T, result)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank; the same answer on every rank."""
        flags = torch.tensor(int(flag))
        if self.size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def barrier(self) -> None:
        """Wait for every rank."""
        self.any(False)


def _kind(error: UserError | CheckpointError) -> type[UserError | CheckpointError]:
    """The most special of the kinds that are told to other ranks."""
    return next(kind for kind in (NewerCheckpointError, CheckpointError, UserError) if isinstance(error, kind))


def choose_device(device: str) -> str:
    """cpu or cuda; auto takes CUDA where a GPU works. Raises UserError when CUDA is asked for and absent."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={device} is not one of: auto, cpu, cuda")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        built = (
            "this torch was built without CUDA" if torch.version.cuda is None else "no usable GPU or driver was found"
        )
        raise UserError(
            f"device=cuda, but {built}; use device=cpu, or install a CUDA build of torch {torch.__version__}"
        )
    return "cuda" if available and device != "cpu" else "cpu"


def _slurm_rendezvous() -> tuple[str, int]:
    """The first node of the job, and a port that two jobs on one node do not share."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    job = int(os.environ["SLURM_JOB_ID"])
    try:
        listing = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        head = listing.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        if "[" in nodes or "," in nodes:
            raise UserError(
                f"cannot read the node list {nodes!r}: `scontrol show hostnames` is missing or failed; set "
                "MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE, or use torchrun"
            ) from None
        head = nodes
    return head, 20000 + job % 20000
