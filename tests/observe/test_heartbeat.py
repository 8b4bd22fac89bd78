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
    """The processes of watched_ranks.py, all of them taking part in steps."""

    def __init__(self, folder: Path, scenario: str) -> None:
        self.folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        self.parent = subprocess.Popen(
            [sys.executable, WORKER, folder, scenario], stdout=subprocess.PIPE, text=True, env=environment
        )
        self.pids = [int(pid) for pid in self.parent.stdout.readline().split()]

    def files(self, suffix: str) -> list[Path]:
        """One file of every rank, once all of them are there."""
        paths = [self.folder / f"rank{rank}.{suffix}" for rank in range(len(self.pids))]
        deadline = time.monotonic() + 120
        while not all(path.exists() for path in paths):
            assert time.monotonic() < deadline, [path.name for path in paths if not path.exists()]
            time.sleep(0.05)
        return paths

    def ends(self) -> list[int]:
        """Everyone's exit status, by rank."""
        return [int(path.read_text()) for path in self.files("exit")]

    def log(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.log").read_text()

    def close(self) -> None:
        for rank, pid in enumerate(self.pids):
            if not (self.folder / f"rank{rank}.exit").exists():
                os.kill(pid, signal.SIGKILL)
        self.parent.communicate()


@pytest.fixture
def start(tmp_path):
    started = []

    def start(scenario: str) -> Ranks:
        started.append(Ranks(tmp_path, scenario))
        if scenario == "run":
            started[0].files("ready")
        return started[0]

    yield start
    for ranks in started:
        ranks.close()


def test_a_killed_rank_is_named_by_all(start):
    ranks = start("run")
    os.kill(ranks.pids[1], signal.SIGKILL)
    first, killed, third = ranks.ends()
    assert first and third and killed == KILLED
    # gloo breaks at once: RankLost out of the step, or the thread where the main thread did not notice.
    for rank in (0, 2):
        assert "rank 1 (host " in ranks.log(rank) and "has been silent for" in ranks.log(rank)


def test_a_stopped_rank_is_named_by_all_and_ends_too(start, tmp_path):
    ranks = start("run")
    os.kill(ranks.pids[2], signal.SIGSTOP)
    assert all(ranks.ends())  # all three: the stopped one is woken to see that the run is over
    for rank in (0, 1):
        assert "rank 2 (host " in ranks.log(rank) and "has been silent for" in ranks.log(rank)
        assert ranks.log(rank).count("ending this run") == 1, ranks.log(rank)
    status = read_status(tmp_path)
    assert status.state == "failed" and "rank 2 (host " in status.error


def test_killed_rank_0_takes_the_store_along(start):
    ranks = start("run")
    os.kill(ranks.pids[0], signal.SIGKILL)
    killed, second, third = ranks.ends()
    assert killed == KILLED and second and third
    for rank in (1, 2):
        assert "rank 0's store at 127.0.0.1:" in ranks.log(rank) and "has broken off" in ranks.log(rank)


def test_stopped_rank_0_stops_the_store(start, tmp_path):
    ranks = start("run")
    os.kill(ranks.pids[0], signal.SIGSTOP)
    assert all(ranks.ends())
    logs = ranks.log(1) + ranks.log(2)
    assert "rank 0's store at 127.0.0.1:" in logs and "has not answered for" in logs
    assert read_status(tmp_path).state == "failed"


def test_a_rank_that_raises_ends_the_others_with_its_reason(start):
    ranks = start("raise")
    assert all(ranks.ends())
    for rank in range(3):
        assert "ValueError: bad sample 17" in ranks.log(rank)


def test_slow_is_not_dead_and_leaving_at_different_times_is_orderly(start):
    ranks = start("finish")
    assert ranks.ends() == [0, 0, 0]
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
