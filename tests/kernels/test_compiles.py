"""Every kernel compiles for GPUs that need not be there, and keeps what it works on in registers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "kernel_cases" / "compiling.py"
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]


def compiled(*arguments: str) -> dict[str, Any]:
    """What the script found, in a process of its own: Triton is told of a GPU that is not there."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def complaints(found: dict[str, Any]) -> str:
    """A line for each way of launching with which something is wrong."""
    lines = dict.fromkeys(
        f"{row['kernel']} on sm_{row['capability']}, {row['sizes']} {row['dtype']}, {row['constants']}, "
        f"{row['num_warps']} warps: {row['complaint']}"
        for row in found["compiled"]
        if row["complaint"]
    )
    return "\n".join(lines)


def test_every_kernel_compiles_for_hopper() -> None:
    found = compiled("--capability", "90", "--dtypes", "bfloat16")
    assert not complaints(found)
    never = set(found["kernels"]) - {row["kernel"] for row in found["compiled"]}
    assert not never, f"no case of kernel_cases/compiling.py launches {', '.join(sorted(never))}"


@pytest.mark.parametrize("capability, dtype", [("90", "float32"), ("80", "bfloat16"), ("100", "bfloat16")])
def test_compiles_otherwise(capability: str, dtype: str) -> None:
    assert not complaints(compiled("--capability", capability, "--dtypes", dtype, "--one"))


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_compiles_at_every_size(capability: str) -> None:
    sizes = ["reference", "narrow", "wide", "odd", "tiny"]
    dtypes = ["bfloat16", "float16", "float32"]
    assert not complaints(compiled("--capability", capability, "--sizes", *sizes, "--dtypes", *dtypes))


def test_spilled_registers_are_noticed() -> None:
    found = compiled("--cases", "spills", "--dtypes", "float32")
    assert "bytes of local memory" in complaints(found)
