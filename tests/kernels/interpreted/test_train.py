"""`rung train` with every kernel that a dense model has: the same losses as with torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kernel_cases.accuracy import DEVICE

from rung_kernels.triton_kernels import launch


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("optim", ["adamw", "spam", "stable_spam"])
def test_a_run_with_kernels(rung: Callable[..., Any], tiny: list[str], tmp_path: Path, optim: str) -> None:
    small = ["model.num_hidden_layers=2", "train.steps=2", "eval.batches=0", "export.huggingface=false"]
    small += [f"device={DEVICE}", f"optim={optim}", "model.num_key_value_heads=2"]
    found = {}
    for kernels in ("triton", "torch"):
        before = launch.counts.copy()
        done = rung("train", *tiny, *small, f"kernels={kernels}", f"run.dir={tmp_path / kernels}")
        assert done.status == 0, done.err
        launched = launch.counts - before
        found[kernels] = losses(tmp_path / kernels)
        if kernels == "torch":
            assert not launched
            continue
        for part in ("rms_norm_forward", "rms_norm_backward", "rope", "swiglu", "cross_entropy", "step"):
            assert any(part in name for name in launched), (part, launched)
    assert found["triton"] == pytest.approx(found["torch"], rel=1e-5)
