"""A pool of processes that serves many distributed cases: processes and imports are paid once."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Workers"]


class Workers:
    """``size`` spawned processes. ``run`` calls one function on the first ``world_size`` of them, in a gloo group."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        self._group: tuple[int, int] | None = None  # world size and port of the group that stands
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 180.0) -> list[Any]:
        """``[function(*args) on rank 0, on rank 1, ...]``. RuntimeError with the traceback of a rank that failed."""
        if self._group is None or self._group[0] != world_size:
            self._group = (world_size, _free_port())
        for pipe in self._pipes[:world_size]:
            pipe.send((self._group, function, args))
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes[:world_size]):
            if not pipe.poll(timeout):
                self.close()
                raise RuntimeError(f"rank {rank} of {world_size} gave no answer within {timeout} s")
            answer, error = pipe.recv()
            results.append(answer)
            if error is not None:
                errors.append(f"rank {rank}: {error}")
        if errors:
            self._group = None  # its members may be out of step
            raise RuntimeError("\n".join(errors))
        return results

    def close(self) -> None:
        """End every process."""
        for process in self._processes:
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _serve(rank: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    group: tuple[int, int] | None = None
    while True:
        try:
            wanted, function, args = pipe.recv()
        except EOFError:
            return
        try:
            if group != wanted:
                world_size, port = wanted
                if dist.is_initialized():
                    dist.destroy_process_group()
                os.environ.update(
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size)
                )
                dist.init_process_group("gloo", rank=rank, world_size=world_size)
                group = wanted
            pipe.send((function(*args), None))
        except BaseException:
            group = None
            if dist.is_initialized():
                dist.destroy_process_group()
            pipe.send((None, traceback.format_exc()))
