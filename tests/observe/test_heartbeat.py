import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rung.observe import Heartbeat, HeartbeatConfig, RankLost, read_status

WORKER = Path(__file__).with_name("watched_ranks.py")
KILLED = -signal.SIGKILL


class Ranks:
    """The processes of watched_ranks.py."""

    def __init__(self, folder: Path, scenario: str) -> None:
        self.folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        self.parent = subprocess.Popen(
            [sys.executable, WORKER, folder, scenario], stdout=subprocess.PIPE, text=True, env=environment
        )
        self.pids = [int(pid) for pid in self.parent.stdout.readline().split()[1:]]

    def __enter__(self) -> "Ranks":
        deadline = time.monotonic() + 60
        while not all((self.folder / f"rank{rank}.ready").exists() for rank in range(len(self.pids))):
            assert time.monotonic() < deadline and self.parent.poll() is None, self.log(0)
            time.sleep(0.05)
        return self

    def __exit__(self, *_) -> None:
        for pid in self.pids:
            if pid not in self.ended_pids:
                os.kill(pid, signal.SIGKILL)
        self.parent.wait(30)

    ended_pids: tuple[int, ...] = ()

    def ends(self, count: int = 3) -> dict[int, int]:
        """Exit statuses of the first `count` ranks to end, by rank."""
        ends = {}
        for _ in range(count):
            _, rank, status = self.parent.stdout.readline().split()
            ends[int(rank)] = int(status)
            self.ended_pids += (self.pids[int(rank)],)
        return ends

    def log(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.log").read_text()


def test_a_killed_rank_is_named_by_all(tmp_path):
    with Ranks(tmp_path, "run") as ranks:
        os.kill(ranks.pids[1], signal.SIGKILL)
        ends = ranks.ends()
        assert ends.pop(1) == KILLED and all(ends.values())
        # gloo breaks at once: RankLost out of the step, or the thread where the main thread did not notice.
        for rank in (0, 2):
            assert "rank 1 (host " in ranks.log(rank) and "has been silent for" in ranks.log(rank)


def test_a_stopped_rank_is_named_by_all_and_ends_too(tmp_path):
    with Ranks(tmp_path, "run") as ranks:
        os.kill(ranks.pids[2], signal.SIGSTOP)
        assert all(ranks.ends().values())  # all three: the stopped one is woken to see that the run is over
        for rank in (0, 1):
            assert "rank 2 (host " in ranks.log(rank) and "has been silent for" in ranks.log(rank)
            assert ranks.log(rank).count("ending this run") == 1, ranks.log(rank)
        status = read_status(tmp_path)
        assert status.state == "failed" and "rank 2 (host " in status.error


def test_killed_rank_0_takes_the_store_along(tmp_path):
    with Ranks(tmp_path, "run") as ranks:
        os.kill(ranks.pids[0], signal.SIGKILL)
        ends = ranks.ends()
        assert ends.pop(0) == KILLED and all(ends.values())
        for rank in (1, 2):
            assert "rank 0's store at 127.0.0.1:" in ranks.log(rank) and "has broken off" in ranks.log(rank)


def test_stopped_rank_0_stops_the_store(tmp_path):
    with Ranks(tmp_path, "run") as ranks:
        os.kill(ranks.pids[0], signal.SIGSTOP)
        assert all(ranks.ends().values())
        logs = ranks.log(1) + ranks.log(2)
        assert "rank 0's store at 127.0.0.1:" in logs and "has not answered for" in logs


def test_a_rank_that_raises_ends_the_others_with_its_reason(tmp_path):
    with Ranks(tmp_path, "raise") as ranks:
        assert all(ranks.ends().values())
        for rank in range(3):
            assert "ValueError: bad sample 17" in ranks.log(rank)


def test_hanging_but_alive_is_not_dead(tmp_path):
    # Beats come from a thread: a rank that computes for long is left alone (the process group's timeout is for that).
    with Ranks(tmp_path, "hang") as ranks:
        time.sleep(3)  # twice the timeout
        assert ranks.parent.poll() is None and not any("silent" in ranks.log(rank) for rank in range(3))


def test_leaving_at_different_times_is_orderly(tmp_path):
    with Ranks(tmp_path, "finish") as ranks:
        assert ranks.ends() == {0: 0, 1: 0, 2: 0}
        assert [ranks.log(rank) for rank in range(3)] == [f"rank {rank} done\n" for rank in range(3)]


def test_alone_it_does_nothing():
    with Heartbeat.start(HeartbeatConfig()) as heartbeat:
        heartbeat.at(1)
        assert heartbeat.blame() is None
    with pytest.raises(RuntimeError, match="mine") as caught, Heartbeat.start(HeartbeatConfig()):
        raise RuntimeError("mine")
    assert caught.type is not RankLost


def test_settings_problems():
    assert HeartbeatConfig().validate() == []
    assert len(HeartbeatConfig(interval_seconds=0, timeout_seconds=-1).validate()) == 2
