"""benchmarks/kernels.py at toy shapes, and what it makes of its times."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("kernels")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    everything = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | settings
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=everything)


def measured(tmp_path: Path, only: str, **environment: str) -> dict[str, Any]:
    done = run("--toy", "--only", only, "--output", str(tmp_path / "result.json"), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
    for row in result["problems"]:
        for who, found in row["contenders"].items():
            assert "failed" not in found, (row["op"], who, found)
            assert found["error"] < 0.01
    return result


def test_torch_alone_where_no_kernel_can_run(tmp_path: Path, scripts: ModuleType) -> None:
    result = measured(tmp_path, ",".join(scripts.OPS))
    assert {"benchmark", "tiny", "commit", "machine", "settings", "roofline"} <= result.keys()
    assert {row["op"] for row in result["problems"]} == set(scripts.OPS)
    assert result["faster"] == []
    for row in result["problems"]:
        assert "rung" not in row["contenders"] and {"eager", "compiled"} <= row["contenders"].keys()
        for part in row["passes"].values():
            assert part["share"].keys() == row["contenders"].keys()


def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    result = measured(tmp_path, "rms_norm,swiglu,adamw_step", TRITON_INTERPRET="1")
    for row in result["problems"]:
        for part in row["passes"].values():
            assert part["share"]["rung"] > 0 and part["best_other_over_rung"] > 0


def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "CUDA GPU" in done.stderr


def test_an_operation_nobody_knows() -> None:
    done = run("--toy", "--only", "rms_norm,sofmax")
    assert done.returncode == 2 and "--only sofmax: not among rms_norm," in done.stderr


def problem(**medians: float) -> dict[str, Any]:
    """A row with two passes, in which each took so long, give or take a hundredth."""
    seconds = {who: {"median": s, "low": 0.99 * s, "high": 1.01 * s, "runs": 9} for who, s in medians.items()}
    part = {"goal": 0.8, "bytes": 2e9, "flops": 0.0, "seconds": seconds}
    return {"op": "rope", "shape": "8", "contenders": {}, "passes": {"forward": part, "backward": dict(part)}}


def test_faster_is_beyond_the_spread_at_every_shape_and_of_torch_alone(scripts: ModuleType) -> None:
    won, close, lost = (
        problem(rung=1.0, eager=2.0, Liger=0.5),
        problem(rung=1.0, eager=1.01),
        problem(rung=2.0, eager=1),
    )
    assert scripts.faster([won]) == ["rope"]
    assert scripts.faster([close]) == scripts.faster([won, lost]) == scripts.faster([problem(eager=1.0)]) == []
    assert scripts.faster([won, {"op": "rope", "shape": "9", "skipped": "no time"}]) == []


def test_shares_tables_and_figure(scripts: ModuleType, tmp_path: Path) -> None:
    row = problem(rung=1.0, eager=2.0, Liger=0.5)
    roofline = {"copy_bytes_per_second": 4e9, "product_flops_per_second": 1.0}
    scripts.judge(row, roofline)
    part = row["passes"]["forward"]
    assert part["share"] == {"rung": 0.5, "eager": 0.25, "Liger": 1.0}
    assert part["best_other"] == "Liger" and part["best_other_over_rung"] == 0.5
    skipped = {"op": "router", "shape": "9", "skipped": "not begun after 3 s"}
    result = {"problems": [row, skipped], "roofline": roofline, "machine": scripts.machine()}
    table = scripts.markdown(result)
    assert (
        "| `rope` 8 | forward | 1000000.0 (990000.0 to 1010000.0) | 2 GB/s | 50% | 80% | Liger, 500000.0 | 0.50 |"
        in table
    )
    assert "| `router` 9 | not begun after 3 s |" in table and "never run" in scripts.markdown(None)
    scripts.kernel_figure.draw(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
