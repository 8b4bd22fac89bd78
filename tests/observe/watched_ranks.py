"""Three bare gloo ranks under a heartbeat (no launcher: rank 0 holds the store); run by test_heartbeat.py.

Usage: watched_ranks.py FOLDER SCENARIO. Each rank writes FOLDER/rank<r>.ready once it takes part in steps and its
output to FOLDER/rank<r>.log; this process prints their ids and writes each one's exit status to FOLDER/rank<r>.exit.
"""

import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rung.observe import Heartbeat, HeartbeatConfig, write_status

WORLD_SIZE = 3
CONFIG = HeartbeatConfig(interval_seconds=0.2, timeout_seconds=2.5, start_timeout_seconds=30)


def rank_main(rank: int, port: int, folder: Path, scenario: str) -> None:
    store = dist.TCPStore("127.0.0.1", port, WORLD_SIZE, rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=600))

    def on_failure(message: str, step: int) -> None:
        write_status(folder, "failed", step, message)

    with Heartbeat.start(CONFIG, on_failure) as heartbeat:
        for step in range(1, 4 if scenario == "finish" else 10**6):
            heartbeat.at(step)
            if scenario == "finish" and step == 2 and rank == 1:
                time.sleep(2 * CONFIG.timeout_seconds)  # computes, beating, while the others wait in the collective
            if scenario == "raise" and step == 3 and rank == 2:
                raise ValueError("bad sample 17")
            dist.all_reduce(torch.ones(1))
            time.sleep(0.02)
            if heartbeat._first_rank_beat is not None:  # beats are going round
                (folder / f"rank{rank}.ready").touch()
        if rank == 2 and scenario == "finish":
            time.sleep(1.5 * CONFIG.timeout_seconds)  # writes a checkpoint, beating, while the others leave
    dist.destroy_process_group()
    print(f"rank {rank} done")


def main() -> None:
    folder, scenario = Path(sys.argv[1]), sys.argv[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {}
    for rank in range(WORLD_SIZE):
        pid = os.fork()  # before torch has started any thread: one import for all ranks
        if pid == 0:
            log = os.open(folder / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                rank_main(rank, port, folder, scenario)
            except BaseException as error:
                write_status(folder, "failed", -1, str(error))
                print(f"{type(error).__name__}: {error}", flush=True)
                os._exit(3)
            sys.stdout.flush()
            os._exit(0)
        ranks[pid] = rank
    print(*ranks, flush=True)
    while ranks:
        pid, status = os.wait()
        (folder / "exit").write_text(str(os.waitstatus_to_exitcode(status)))
        (folder / "exit").rename(folder / f"rank{ranks.pop(pid)}.exit")


main()
