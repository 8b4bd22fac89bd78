"""benchmarks/spam.py at a toy size."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_one_run_with_spikes(corpus: Path, tmp_path: Path) -> None:
    spam = importlib.import_module("spam")
    overrides = [text for text in spam.model(True) if not text.startswith("data=")]
    overrides += ["data=corpus", f"data.paths=[{corpus}]", "train.steps=8"]
    overrides += [*spam.contenders(8)["SPAM"], "optim.spike_threshold=50"]
    spec = {"overrides": overrides, "folder": str(tmp_path), "seed": 3, "spiked": True}
    command = [sys.executable, str(BENCHMARKS / "spam.py"), "--one", json.dumps(spec)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < found["eval_loss"] < 9 and found["skipped"] == 0


def test_intervals_are_students() -> None:
    spam = importlib.import_module("spam")
    found = spam.interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2 and found["half"] == pytest.approx(4.303 / 3**0.5)


def test_tables(tmp_path: Path) -> None:
    tables = importlib.import_module("tables")
    row = {
        "optimizer": "SPAM", "spiked": True, "lr": 0.002, "at_edge": True, "bits_per_byte": 2.0, "clipped": 1234.0,
        "loss": {"mean": 5.0, "half": 0.1}, "minus_adamw": {"mean": -0.05, "half": 0.01},
    }  # fmt: skip
    settings = {"seeds": 3, "steps": 400, "parameters": 10, "lrs": [0.001, 0.002]}
    machine = {"cpu": "x", "cores": 2, "threads": 1, "torch": "2", "python": "3", "platform": "Linux"}
    text = tables.spam({"rows": [row], "settings": settings, "machine": machine}, spiked=True)
    assert "| SPAM | 0.002, the edge of the grid | 5.0000 ± 0.1000 | 2.000 | -0.0500 ± 0.0100 | 1,234 |" in text
    assert (
        "SPAM"
        not in tables.spam({"rows": [row], "settings": settings, "machine": machine}, spiked=False).split("\n\n")[0]
    )
    assert tables.NEVER_RUN in tables.spam(None, spiked=False) and tables.NEVER_RUN in tables.spam_memory(None)
