"""Every benchmark runs at a toy size, and the documentation shows what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


def run(script: str, *arguments: str) -> str:
    """Standard output of a script; its errors where it fails."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def measured(script: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The JSON that a script writes at its toy size."""
    output = tmp_path / "result.json"
    run(script, "--tiny", "--output", str(output), *arguments)
    result: dict[str, Any] = json.loads(output.read_text())
    assert {"benchmark", "tiny", "commit", "machine", "settings"} <= result.keys()
    assert {"cpu", "cores", "torch", "python"} <= result["machine"].keys()
    assert result["tiny"]
    return result


def test_three_loops_do_the_same_work_in_turns(tmp_path: Path) -> None:
    result = measured("overhead.py", tmp_path, "--threads", "1")
    assert set(result["contenders"]) == {"rung", "bare", "huggingface"}
    for row in result["contenders"].values():
        assert row["error"] is None
        assert len(row["tokens_per_second"]["values"]) == result["settings"]["rounds"]
    assert set(result["ratios"]) == {"rung / bare", "rung / huggingface"}
    assert result["relative_loss_difference"] < 1e-4


def test_gpu_benchmark_at_a_toy_size_without_a_gpu(tmp_path: Path) -> None:
    result = measured("gpu_mfu.py", tmp_path, "--contenders", "rung", "bare")
    assert all(row["error"] is None for row in result["contenders"].values())
    assert result["peak_flops"] is None  # what the peak of a CPU would be, nobody knows
    assert set(result["ratios"]) == {"rung / bare"}


def test_start_up(tmp_path: Path) -> None:
    result = measured("startup.py", tmp_path)
    assert result["seconds_beyond_torch"].keys() == {"rung", "validated", "ready"}
    assert result["worst_imports"]


def test_cross_entropy_keeps_no_float32_copy_of_the_logits(tmp_path: Path) -> None:
    result = measured("cross_entropy_memory.py", tmp_path, "--device", "cpu")
    gradient, whole_copy = result["bytes_of_logits"], result["bytes_of_full_float32_copy"]
    assert gradient <= result["ways"]["rung"]["peak_bytes"] < gradient + whole_copy
    assert result["ways"]["torch_float32"]["peak_bytes"] > gradient + whole_copy


def test_bare_loop_alone() -> None:
    sizes = "--vocab 64 --hidden 16 --inner 32 --layers 2 --heads 2 --batch 2 --micro-batch 1 --seq 8 --steps 6"
    assert "tokens/s" in run("bare_llama.py", *sizes.split(), "--device", "cpu")


def test_page_shows_the_results() -> None:
    run("tables.py", "--check")


@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_every_script_is_explained(script: str) -> None:
    assert (
        f"`{script}`" in (BENCHMARKS / "README.md").read_text()
        or f"/{script}" in (BENCHMARKS / "README.md").read_text()
    )
