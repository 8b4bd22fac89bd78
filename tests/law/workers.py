"""A pool of processes that serves many distributed cases: processes and imports are paid once."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Workers"]

IMPORTED = ["torch._inductor.compile_fx", "rung.recipes.pretrain", "rung.rollout", "hydra", "pytest"]
"""What takes seconds to import and starts no threads: imported once, by the process that every rank is forked from."""


class Workers:
    """Groups of processes, one for each world size that was asked for; each serves case after case.

    A process never changes its group: torch keeps meshes of a group that was destroyed in its caches.
    """

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 180.0) -> list[Any]:
        """``[function(*args) on rank 0, on rank 1, ...]``. RuntimeError with the traceback of a rank that failed."""
        if world_size not in self._groups:
            self._groups[world_size] = _Group(world_size)
        try:
            return self._groups[world_size].run(function, args, timeout)
        except RuntimeError:
            self._groups.pop(world_size).close()  # its members may be out of step
            raise

    def close(self) -> None:
        """End every process."""
        for group in self._groups.values():
            group.close()


class _Group:
    def __init__(self, world_size: int) -> None:
        context = mp.get_context("forkserver" if sys.platform == "linux" else "spawn")
        context.set_forkserver_preload(IMPORTED)
        port = _free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args))
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                raise RuntimeError(f"rank {rank} gave no answer within {timeout} s")
            answer, error = pipe.recv()
            results.append(answer)
            if error is not None:
                errors.append(f"rank {rank}: {error}")
        if errors:
            raise RuntimeError("\n".join(errors))
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(*args), None))
        except BaseException:
            dist.destroy_process_group()  # so that the others do not wait for this rank
            pipe.send((None, traceback.format_exc()))
            return
