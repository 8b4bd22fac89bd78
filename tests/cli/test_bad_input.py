"""Every mistake a user can make: one clear message, exit status 2, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Rung = Callable[..., Any]


def refused(result: Any, *parts: str) -> None:
    assert result.status == 2, result
    assert result.err.count("rung: error: ") == 1 and "Traceback" not in result.err
    for part in parts:
        assert part in result.err, (part, result.err)


def replace(overrides: list[str], *new: str) -> list[str]:
    keys = {item.split("=")[0] for item in new}
    return [item for item in overrides if item.split("=")[0] not in keys] + list(new)


def test_unknown_key(rung: Rung, tiny: list[str]) -> None:
    refused(rung("train", *tiny, "train.stepz=3"), "train.stepz", "did you mean train.steps")


def test_wrong_type(rung: Rung, tiny: list[str]) -> None:
    refused(rung("train", *replace(tiny, "train.steps=soon")), "train.steps", "soon")


def test_impossible_layout(rung: Rung, tiny: list[str]) -> None:
    refused(rung("train", *tiny, "parallel.dp_shard=3"), "dp_shard=3", "world")


def test_batch_that_does_not_divide(rung: Rung, tiny: list[str]) -> None:
    refused(rung("train", *replace(tiny, "train.global_batch_size=5")), "global_batch_size=5", "micro_batch_size=2")


def test_missing_tokens(rung: Rung, tiny: list[str], tmp_path: Path) -> None:
    refused(rung("train", *replace(tiny, f"data.paths=[{tmp_path / 'absent'}]")), str(tmp_path / "absent"))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_tokens(rung: Rung, tiny: list[str], corpus: Path, tmp_path: Path, suffix: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(corpus, broken)
    file = broken / f"train{suffix}"
    file.write_bytes(file.read_bytes()[:-10])
    refused(rung("train", *replace(tiny, f"data.paths=[{broken}]")), f"train{suffix}")


def test_vocabulary_larger_than_the_models(rung: Rung, tiny: list[str]) -> None:
    refused(rung("train", *tiny, "model.vocab_size=50"), "model.vocab_size=50")


def test_empty_corpus(rung: Rung, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    refused(rung("data", "build", tmp_path / "empty.txt", "--out", tmp_path / "corpus"))


def test_sequence_longer_than_the_corpus(rung: Rung, tiny: list[str]) -> None:
    long = replace(tiny, "data.seq_len=100000") + ["model.max_position_embeddings=200000"]
    refused(rung("train", *long), "data.seq_len=100000")


def test_wrong_world_size(rung: Rung, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    refused(rung("train", *tiny, "parallel.dp_shard=2"), "3", "dp_shard=2")


def test_unwritable_run_dir(rung: Rung, tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(rung("train", *replace(tiny, f"run.dir={tmp_path / 'file' / 'run'}")), "run.dir", "cannot be written")


def test_cuda_asked_for_and_absent(rung: Rung, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(rung("train", *replace(tiny, "device=cuda")), "device=cuda", "device=cpu")


def test_run_dir_of_another_run(rung: Rung, tiny: list[str], tmp_path: Path) -> None:
    assert rung("train", *tiny).status == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    result = rung("train", *tiny, "optim.lr=0.5", "run.seed=3")
    refused(result, "optim.lr: 0.001 -> 0.5", "run.seed: 0 -> 3", "run.allow_changes")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "completed"
    again = rung("train", *tiny, "optim.lr=0.5", "run.seed=3", "run.allow_changes=[optim.lr,run.seed]")
    assert again.status == 0 and "optim.lr: 0.001 -> 0.5" in again.out


def test_run_dir_in_use(rung: Rung, tiny: list[str], tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(rung("train", *tiny), "in use")


def test_unknown_verb_and_option(rung: Rung) -> None:
    refused(rung("trian"), "did you mean train")
    refused(rung("train", "--stesp"), "--stesp")


def test_model_without_weights(rung: Rung, tmp_path: Path) -> None:
    refused(rung("sample", tmp_path), str(tmp_path))
    refused(rung("eval", tmp_path), str(tmp_path))


def test_a_refused_launch_changes_nothing(rung: Rung, tiny: list[str], tmp_path: Path) -> None:
    run, absent = tmp_path / "run", replace(tiny, f"data.paths=[{tmp_path / 'absent'}]")
    refused(rung("train", *absent), "absent")
    assert rung("train", *tiny).status == 0  # the mistake did not claim the folder
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    refused(rung("train", *absent, "run.allow_changes=[data.paths]"), "absent")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == before


def test_files_of_somebody_else_are_left_alone(rung: Rung, tiny: list[str], tmp_path: Path) -> None:
    thesis = tmp_path / "run" / "export" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("mine")
    refused(rung("train", *tiny), "export", "choose another run.dir")
    assert thesis.read_text() == "mine"


@pytest.mark.parametrize(
    "override", ["train.clip_grad_norm=nan", "train.timeout_seconds=inf", "run.dir=''", "optim=null"]
)
def test_values_that_are_no_values(rung: Rung, tiny: list[str], override: str) -> None:
    refused(rung("train", *replace(tiny, override)))


def test_paths_that_hydra_has_no_grammar_for(rung: Rung, tiny: list[str], tmp_path: Path) -> None:
    assert rung("train", *replace(tiny, f"run.dir={tmp_path}/müller (2)/läuft")).status == 0
    assert (tmp_path / "müller (2)" / "läuft" / "metrics.jsonl").exists()


@pytest.mark.parametrize("variables", [{"RANK": "5", "WORLD_SIZE": "4"}, {"RANK": "abc", "WORLD_SIZE": "4"}])
def test_a_rank_with_a_problem_of_its_own_says_so(
    rung: Rung, tiny: list[str], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(rung("train", *tiny), f"rank {variables['RANK']}", "WORLD_SIZE")
