"""Whose folder it is, and from where a run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Rung = Callable[..., Any]


@pytest.fixture
def quick(tiny: list[str]) -> list[str]:
    more = ["export.huggingface=false", "eval.final_batches=1", "checkpoint.interval=1", "logging.tensorboard=false"]
    return [setting for setting in tiny if not setting.startswith("run.dir=")] + more


def steps(run: Path) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def test_begun_from_another_run_and_run_again(rung: Rung, quick: list[str], tmp_path: Path) -> None:
    first, second, foreign = (tmp_path / name for name in ("first", "second", "foreign"))
    assert rung("train", *quick, f"run.dir={first}").status == 0
    origin = first / "checkpoints" / "step-00000002"
    from_there = [*quick, f"run.resume={origin}"]

    (foreign / "export").mkdir(parents=True)
    (foreign / "metrics.jsonl").write_text("somebody else's\n")
    refused = rung("train", *from_there, f"run.dir={foreign}")
    assert refused.status == 2 and "no run of Rung's" in refused.err
    assert (foreign / "metrics.jsonl").read_text() == "somebody else's\n" and (foreign / "export").exists()

    begun = rung("train", *from_there, f"run.dir={second}")
    assert begun.status == 0 and "begins from step 2" in begun.out, begun.err
    assert steps(second) == [3]
    shutil.rmtree(origin)  # as the other run's retention would
    again = rung("train", *from_there, f"run.dir={second}", "train.steps=4")
    assert again.status == 0 and "going on after step 3" in again.out, again.err
    assert steps(second) == [3, 4]

    own = f"run.resume={second / 'checkpoints' / 'step-00000003'}"
    back = rung("train", *quick, own, f"run.dir={second}", "train.steps=5")
    assert back.status == 2 and "goes back to step 3" in back.err and "up to step 4" in back.err


def test_a_run_never_starts_over_unasked(
    rung: Rung, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [*quick, f"run.dir={tmp_path / 'run'}"]
    assert rung("train", *run).status == 0
    elsewhere = rung("train", *run, f"checkpoint.dir={tmp_path / 'elsewhere'}")
    assert elsewhere.status == 2 and "newest: step 3" in elsewhere.err and "run.resume=never" in elsewhere.err
    assert steps(tmp_path / "run") == [1, 2, 3]
    done = rung("train", *run)
    assert done.status == 0 and "nothing to train" in done.out

    over = rung("train", *run, "run.resume=never", "train.steps=1")
    assert over.status == 0, over.err
    assert steps(tmp_path / "run") == [1] and steps(tmp_path / "run" / "earlier-1") == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints-1" / "step-00000003" / "manifest.json").exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the same job, from the queue again
    requeued = rung("train", *run, "run.resume=never", "train.steps=2")
    assert requeued.status == 0 and "going on after step 1" in requeued.out


def test_two_runs_do_not_share_a_folder_of_checkpoints(rung: Rung, quick: list[str], tmp_path: Path) -> None:
    import fcntl

    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused = rung("train", *quick, f"run.dir={tmp_path / 'other'}", f"checkpoint.dir={folder}")
    assert refused.status == 2 and f"checkpoint.dir={folder} is in use by another run" in refused.err
