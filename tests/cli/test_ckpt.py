"""``rung ckpt`` shows, checks and compares checkpoints, and says in words what is wrong with them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint.make_golden import CONFIG, GOLDEN, TENSORS
from checkpoint.writing import tiling, write

Rung = Callable[..., Any]
STEP = GOLDEN / "schema-1" / "step-00000003"
DIGEST = "7cd140072767dc0f40bce16b465f9e14"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The golden checkpoint as a run's."""
    shutil.copytree(STEP, tmp_path / "run" / "checkpoints" / STEP.name)
    return tmp_path / "run"


def refused(result: Any, status: int, *parts: str) -> None:
    assert result.status == status, result
    assert result.err.count("rung: error: ") == 1 and "Traceback" not in result.err
    for part in parts:
        assert part in result.err, (part, result.err)


def test_inspect(rung: Rung, copy: Path) -> None:
    shown = rung("ckpt", "inspect", copy)
    assert shown.status == 0 and not shown.err
    lines = [line.rstrip() for line in shown.out.splitlines()]
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines[: lines.index("")])
    assert facts["checkpoint"] == str(copy / "checkpoints" / STEP.name)
    assert (facts["step"], facts["consumed_samples"]) == ("3", "24")
    assert facts["size"] == "1.2 KiB in 2 files" and facts["digest"] == DIGEST
    assert facts["written by"] == "rung 0.1.0, torch 2.13.0" and facts["corpus"] == "c0ffee"
    assert facts["model"] == "hidden_size=7 num_hidden_layers=2" and facts["parallel"] == "dp_shard=2 tp=1"
    table = lines[lines.index("") + 1 :]
    assert table[0] == "7 tensors, 912 bytes"
    assert [re.split(r"\s{2,}", line) for line in table[1:]] == [
        ["embed.weight", "bfloat16", "[4, 6]", "48 bytes"],
        ["layers.*.proj.weight", "float32", "[5, 7]", "× 2", "280 bytes"],
        ["norm.weight", "float32", "[4]", "16 bytes"],
        ["layers.*.proj.weight/exp_avg", "float64", "[5, 7]", "× 2", "560 bytes"],
        ["step/count", "int64", "[]", "8 bytes"],
    ]


def test_inspect_part(rung: Rung) -> None:
    shown = rung("ckpt", "inspect", STEP, "--all", "--prefix", "layers.1")
    assert "layers.1.proj.weight " in shown.out and "layers.1.proj.weight/exp_avg " in shown.out
    assert "layers.0" not in shown.out and "2 tensors" in shown.out
    assert "/" not in rung("ckpt", "inspect", STEP, "--model-only").out.split("tensors")[1]
    found = json.loads(rung("ckpt", "inspect", STEP, "--json", "--model-only").out)
    assert found["digest"] == DIGEST and found["step"] == 3 and found["config"] == CONFIG
    assert list(found["tensors"]) == [name for name in sorted(TENSORS) if "/" not in name]
    assert found["tensors"]["embed.weight"]["shape"] == [4, 6]


def test_verify(rung: Rung, copy: Path) -> None:
    good = rung("ckpt", "verify", copy)
    assert good.status == 0 and not good.err
    assert good.out.splitlines()[-1] == "whole: 1,184 bytes in 2 files, 2 blocks and 7 tensors checked"
    folder = copy / "checkpoints" / STEP.name
    (folder / "stray").write_text("")
    assert f"note: {folder}/stray is no part" in rung("ckpt", "verify", copy).out
    data = bytearray((folder / "data-00001.bin").read_bytes())
    data[70] ^= 16
    (folder / "data-00001.bin").write_bytes(data)
    (folder / "data-00000.bin").unlink()
    bad = rung("ckpt", "verify", folder)
    assert bad.status == 1 and not bad.err
    _, one, two, note, summary = bad.out.splitlines()
    assert one.startswith(f"{folder}/data-00000.bin is missing") and "layers.1.proj.weight/exp_avg" in one
    assert two.startswith(f"{folder}/data-00001.bin: block 0 (bytes 0 to 648) is damaged") and "step/count" in two
    assert note.startswith("note: ") and summary.startswith("damaged, 2 problems: 1,184 bytes")


def test_digest(rung: Rung, copy: Path, tmp_path: Path) -> None:
    assert rung("ckpt", "digest", copy).out == DIGEST + "\n"
    model = rung("ckpt", "digest", copy, "--model-only").out
    layer = rung("ckpt", "digest", copy, "--prefix", "layers.0").out
    assert all(re.fullmatch(r"[0-9a-f]{32}\n", digest) for digest in (model, layer))
    assert len({DIGEST + "\n", model, layer}) == 3
    later = {**TENSORS, "step/count": ("int64", np.array(7, "<i8"))}
    write(tmp_path / "step-00000009", later)
    assert rung("ckpt", "digest", tmp_path).out != DIGEST + "\n"
    assert rung("ckpt", "digest", tmp_path, "--model-only").out == model


def test_diff_of_equal_states(rung: Rung, copy: Path, tmp_path: Path) -> None:
    """Other boxes, other files, other settings: the same state."""
    import random

    rng = random.Random(0)
    cuts = {
        name: [(rng.randrange(5), box) for box in tiling(values.shape, rng)] for name, (_, values) in TENSORS.items()
    }
    progress = json.loads((STEP / "manifest.json").read_bytes())["progress"]
    config = {**CONFIG, "parallel": {"dp_shard": 4, "tp": 1}}
    write(tmp_path / STEP.name, TENSORS, cuts, num_files=5, progress=progress, config=config)
    same = rung("ckpt", "diff", copy, tmp_path)
    assert same.status == 0 and not same.err
    assert "config parallel.dp_shard: 2 in A, 4 in B" in same.out and same.out.endswith(
        "the states are equal, by the digests in their manifests\n"
    )


def test_diff(rung: Rung, copy: Path, tmp_path: Path) -> None:
    other: dict[str, Any] = {name: (dtype, values.copy()) for name, (dtype, values) in TENSORS.items()}
    other["layers.0.proj.weight"][1][2, 3:5] += 0.25
    other["layers.1.proj.weight"] = ("float64", TENSORS["layers.1.proj.weight"][1].astype("<f8"))
    other["layers.1.proj.weight/exp_avg"] = ("float64", np.zeros((7, 5)))
    other["embed.weight"][1][0, 0] += 128  # 1.0 becomes 2.0 in bfloat16
    other["norm.weight"][1][2:] = 0.0  # not a number; -0.0
    other["step/count"] = ("int64", np.array(2**63 - 1, "<i8"))
    other["new"] = other.pop("layers.0.proj.weight/exp_avg")
    write(tmp_path / "step-00000004", other)
    shown = rung("ckpt", "diff", copy, tmp_path)
    assert shown.status == 1 and not shown.err
    lines = shown.out.splitlines()
    for line in (
        "progress step: 3 in A, 4 in B",
        "config parallel.tp: 1 in A, nothing in B",
        "layers.0.proj.weight: float32 [5, 7]: 2 of 35 elements differ, by at most 0.25",
        "layers.0.proj.weight/exp_avg: only in A",
        "new: only in B",
        "layers.1.proj.weight: float32 [5, 7] in A, float64 [5, 7] in B: 0 of 35 elements differ, by at most 0",
        "layers.1.proj.weight/exp_avg: float64 [5, 7] in A, float64 [7, 5] in B",
        "embed.weight: bfloat16 [4, 6]: 1 of 24 elements differ, by at most 1",
        "norm.weight: float32 [4]: 2 of 4 elements differ, by at most nan",
        f"step/count: int64 []: 1 of 1 elements differ, by at most {2**63 - 1 + 1234567890123}",
    ):
        assert line in lines, (line, lines)
    only = rung("ckpt", "diff", copy, tmp_path, "--prefix", "embed")
    assert only.status == 1 and "progress" not in only.out and "layers" not in only.out.split("parallel")[-1]
    assert rung("ckpt", "diff", copy, copy).status == 0


def test_wrong_paths(rung: Rung, copy: Path, tmp_path: Path) -> None:
    for verb in ("inspect", "verify", "digest"):
        refused(rung("ckpt", verb, tmp_path / "absent"), 2, str(tmp_path / "absent"))
        refused(rung("ckpt", verb, copy / "checkpoints" / "step-00000004"), 2, "step-00000004")
    refused(rung("ckpt", "diff", copy, tmp_path / "absent"), 2, str(tmp_path / "absent"))
    for verb in (["inspect"], ["digest"], ["diff", copy]):
        refused(rung("ckpt", *verb, copy, "--prefix", "layer."), 2, "'layer.'", "embed, layers, norm, step")


def test_damaged_manifest(rung: Rung, copy: Path) -> None:
    path = copy / "checkpoints" / STEP.name / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"24", b"25", 1))
    for verb in (["inspect"], ["verify"], ["digest"], ["diff", STEP]):
        refused(rung("ckpt", *verb, copy), 1, f"{path} is damaged")


def test_damage_met_by_diff(rung: Rung, copy: Path, tmp_path: Path) -> None:
    write(tmp_path / "step-00000003", {**TENSORS, "norm.weight": ("float32", np.zeros(4, "<f4"))})
    path = copy / "checkpoints" / STEP.name / "data-00001.bin"
    path.write_bytes(path.read_bytes()[:-1])
    refused(rung("ckpt", "diff", tmp_path, copy), 1, "norm.weight cannot be read", str(path))


def test_no_torch_and_both_ways_to_start() -> None:
    code = (
        "import sys; from rung.cli import main\n"
        f"step = {str(STEP)!r}\n"
        "statuses = [main(['ckpt', *verb, step]) for verb in (['inspect'], ['verify'], ['diff', step])]\n"
        "print(statuses, sorted({'torch', 'rich', 'hydra', 'fsspec'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0] []"
    command = [sys.executable, "-m", "rung.ckpt", "digest", str(STEP)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == DIGEST + "\n"
