"""Writes the golden checkpoint of the present schema: ``PYTHONPATH=tests python -m checkpoint.make_golden``.

What was written once stays as it is and is read for ever; a new schema gets a folder of its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from checkpoint.writing import Cuts, Values, write

from rung.checkpoint.format import SCHEMA_VERSION, Manifest
from rung.layout import Box

GOLDEN = Path(__file__).parent / "golden"

WEIGHT = (np.arange(35, dtype="<f4").reshape(5, 7) - 17) / 8
BFLOAT16 = ((np.arange(24, dtype="<u2") + 0x3F80).reshape(4, 6)).astype("<u2")
"""1, 1.0078125, 1.015625, …: the numbers from 1 on."""
TENSORS: dict[str, Values] = {
    "embed.weight": ("bfloat16", BFLOAT16),
    "layers.0.proj.weight": ("float32", WEIGHT),
    "layers.0.proj.weight/exp_avg": ("float64", WEIGHT.astype("<f8") / 3),
    "layers.1.proj.weight": ("float32", -WEIGHT),
    "layers.1.proj.weight/exp_avg": ("float64", WEIGHT.astype("<f8") / -3),
    "norm.weight": ("float32", np.array([0.5, np.inf, np.nan, -0.0], "<f4")),
    "step/count": ("int64", np.array(-1234567890123, "<i8")),
}
CUTS: Cuts = {
    "embed.weight": [(0, Box((0, 0), (3, 6))), (1, Box((3, 0), (1, 6)))],
    "layers.0.proj.weight": [(0, Box((0, 0), (5, 3))), (1, Box((0, 3), (5, 4)))],
    "layers.0.proj.weight/exp_avg": [(1, Box((2, 0), (3, 7))), (0, Box((0, 0), (2, 7)))],
    "step/count": [(1, Box((), ()))],
}
CONFIG = {
    "data": {"seq_len": 16},
    "model": {"hidden_size": 7, "num_hidden_layers": 2, "tie_word_embeddings": False},
    "optim": {"name": "adamw", "lr": 0.001, "betas": [0.9, 0.95]},
    "parallel": {"dp_shard": 2, "tp": 1},
}


def make(folder: Path) -> Manifest:
    progress = {"step": 3, "consumed_samples": 24, "skipped_steps": 0, "note": "π", "nested": {"b": 1.5, "a": None}}
    return write(folder, TENSORS, CUTS, progress=progress, config=CONFIG)


if __name__ == "__main__":
    print(make(GOLDEN / f"schema-{SCHEMA_VERSION}" / "step-00000003").digest)
