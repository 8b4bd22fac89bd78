"""Every benchmark runs at a toy size, and the documentation shows what was measured."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


DRIVERS = {"overhead.py", "gpu_mfu.py", "startup.py", "layouts.py"}
"""Scripts whose work is done by processes that they start: run in this one, which has torch already."""


def run(script: str, *arguments: str) -> str:
    """Standard output of a script; its errors where it fails."""
    if script in DRIVERS and "--gpu" not in arguments:
        with (
            mock.patch.object(sys, "argv", [script, *arguments]),
            mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]),
            mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}),
            contextlib.redirect_stdout(io.StringIO()) as output,
        ):
            runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return output.getvalue()
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


def test_layouts_take_turns_with_plain_runs(tmp_path: Path) -> None:
    steps = measured("layouts.py", tmp_path, "--parts", "steps", "--cases", "tp")["steps"]["toy"]
    (row,) = steps["rows"].values()
    assert row["error"] is None
    assert row["expected"] == 1.0
    for key in ("seconds", "over_one", "over_side_by_side"):
        assert len(row[key]["values"]) == steps["rounds"] == 1


def test_layouts_send_the_least(tmp_path: Path) -> None:
    result = measured("layouts.py", tmp_path, "--parts", "bytes", "ring")
    rows = result["bytes"]["2"]["rows"]
    assert len(rows) == 9
    for row in rows.values():
        assert row["error"] is None
        assert 1.0 <= row["ratio"] <= 1.05
    for row in result["ring"]:
        assert row["visible"] >= 1.0 and row["contiguous_visible"] >= 1.0
        if row["number"] == 1:
            assert max(row["computed"], row["visible"]) <= 1.02 < row["contiguous_visible"]


def test_start_up_of_ranks(tmp_path: Path) -> None:
    result = measured("layouts.py", tmp_path, "--parts", "startup")["startup"]
    assert result["rounds"] == 1
    assert all(seconds["median"] > 0 for seconds in result["seconds"].values())


def test_gpu_part_of_layouts_at_a_toy_size_without_a_gpu(tmp_path: Path) -> None:
    result = measured("layouts.py", tmp_path, "--gpu")
    assert {row["loss_difference"] < 1e-2 for row in result["paths"]["rows"].values()} == {True}
    assert {"ring", "all"} <= result["paths"]["rows"].keys()
    assert result["ring"]["rows"] and result["shapes"]["rows"]


def test_checkpoints_beside_dcp(tmp_path: Path) -> None:
    (row,) = measured("checkpoint.py", tmp_path, "--parts", "saves")["saves"]
    assert row["error"] is None
    assert {"rung", "rung async", "dcp", "dcp thread", "torch.save", "memcpy"} <= row["ways"].keys()
    assert set(row["read_over_touched"].values()) == {1.0}
    assert row["flush_process_bytes"] < row["ranks"] * 40 * 2**20  # torch would be twice as much


def test_gpu_part_of_checkpoints_at_a_toy_size_without_a_gpu(tmp_path: Path) -> None:
    (row,) = measured("checkpoint.py", tmp_path, "--gpu", "--device", "cpu")["rows"].values()
    assert row["stall"]["median"] > 0


def test_bare_loop_alone() -> None:
    sizes = "--vocab 64 --hidden 16 --inner 32 --layers 2 --heads 2 --batch 2 --micro-batch 1 --seq 8 --steps 6"
    assert "tokens/s" in run("bare_llama.py", *sizes.split(), "--device", "cpu")


def test_pages_show_the_results() -> None:
    run("tables.py", "--check")


@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_every_script_is_explained(script: str) -> None:
    assert (
        f"`{script}`" in (BENCHMARKS / "README.md").read_text()
        or f"/{script}" in (BENCHMARKS / "README.md").read_text()
    )
