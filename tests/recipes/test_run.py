"""A whole run: what it writes, what it leaves behind, and how it ends."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Rung = Callable[..., Any]

STEP_KEYS = {
    "step", "loss", "grad_norm", "lr", "tokens", "samples_digest", "step_seconds", "tokens_per_second", "mfu",
    "phase_seconds", "memory_gib", "skipped_steps",
}  # fmt: skip


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_two_processes_write_what_the_contract_says(
    tiny: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "rung", "launch", "local", "--nproc", "2", "--"]
    extra = ["export.sample_prompts=[def]", "export.sample_tokens=5", "train.micro_batch_size=1", "eval.interval=2"]
    done = subprocess.run([*launch, *tiny, *extra], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "gzip -9" in done.stdout

    steps = [line for line in lines(run) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(line.keys() >= STEP_KEYS for line in steps)
    assert [line["tokens"] for line in steps] == [64, 128, 192]
    evaluations = [line for line in lines(run) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [2, 3] and all(line["bits_per_byte"] > 0 for line in evaluations)
    assert json.loads((run / "status.json").read_text()) == {"state": "completed", "step": 3, "error": None}
    assert (run / "resolved.yaml").exists() and (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())


def test_exported_weights_give_equal_logits_in_transformers(rung: Rung, tiny: list[str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rung.checkpoint import load_huggingface

    assert rung("train", *tiny, "model.tie_word_embeddings=true", "optim=muon").status == 0
    export = tmp_path / "run" / "export"
    theirs = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    config, ours = load_huggingface(export)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        difference = (theirs(tokens).logits - ours.eval()(tokens)).abs().max()
    assert float(difference) <= 1e-4 and config.tie_word_embeddings
    assert (
        AutoTokenizer.from_pretrained(export).decode(AutoTokenizer.from_pretrained(export)("def")["input_ids"]) == "def"
    )


def test_evaluation_by_file_agrees_with_the_run(rung: Rung, tiny: list[str], tmp_path: Path) -> None:
    assert rung("train", *tiny).status == 0
    last = [line for line in lines(tmp_path / "run") if "eval_loss" in line][-1]
    report = tmp_path / "report.json"
    shown = rung("eval", tmp_path / "run", "--json", report)
    assert shown.status == 0 and "gzip -9" in shown.out
    values = json.loads(report.read_text())
    assert math.isclose(values["bits_per_byte"], last["bits_per_byte"], rel_tol=1e-5)
    assert math.isclose(values["eval_loss"], last["eval_loss"], rel_tol=1e-5)
    assert len(values["files"]) > 3


def test_running_again_gives_the_same_run(rung: Rung, tiny: list[str], tmp_path: Path) -> None:
    keep = ("loss", "grad_norm", "lr", "samples_digest")
    assert rung("train", *tiny, "model.dropout=0.1").status == 0
    first = [[line.get(k) for k in keep] for line in lines(tmp_path / "run")]
    assert rung("train", *tiny, "model.dropout=0.1").status == 0
    assert [[line.get(k) for k in keep] for line in lines(tmp_path / "run")] == first


def test_sample_and_plot_and_runs(rung: Rung, tiny: list[str], tmp_path: Path) -> None:
    assert rung("train", *tiny).status == 0
    shown = rung("sample", tmp_path / "run", "--prompt", "def", "--tokens", 8, "--samples", 2)
    assert shown.status == 0 and shown.out.count("def") >= 2
    alone = rung("sample", tmp_path / "run", "--prompt", "def", "--tokens", 8)
    assert alone.out.strip() in shown.out
    assert rung("plot", tmp_path / "run", "--out", tmp_path / "a.png").status == 0
    assert "completed" in rung("runs", tmp_path).out


def test_signal_saves_at_the_end_of_a_step_and_the_run_goes_on_there(
    rung: Rung, tiny: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    """The launcher hands the signal on, also where its whole group is signalled, and answers as its ranks do."""
    launch = [sys.executable, "-m", "rung", "launch", "local", "--nproc", "2", "--"]
    command = [*launch, *tiny, "train.micro_batch_size=1", "train.steps=100000"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    last = status["step"]
    assert status["state"] == "stopped" and last == lines(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:08}" / "manifest.json").exists()

    # On one process, a step further than it had come.
    further = rung("train", *tiny, f"train.steps={last + 1}", "export.huggingface=false")
    assert further.status == 0, further.err
    assert f"going on after step {last}" in further.out
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == list(range(1, last + 2))


def test_a_killed_rank_is_named_and_everyone_ends(tiny: list[str], tmp_path: Path, environment: dict[str, str]) -> None:
    """Bare processes, as under srun: no agent watches them."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "rung.train", *tiny, "train.micro_batch_size=1", "train.steps=100000"]
    processes = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.1)
    processes[1].kill()
    output, _ = processes[0].communicate(timeout=60)
    assert processes[0].returncode not in (0, 2) and "rank 1" in output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "rank 1" in status["error"]
