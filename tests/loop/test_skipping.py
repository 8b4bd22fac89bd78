"""A non-finite loss or gradient costs a step, not a run; too many in a row end it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rung.parallel import spread as parts

Rung = Callable[..., Any]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Make the logits of some steps infinite."""
    real = parts.run_model

    def plant(steps: set[int]) -> None:
        def wrong(model: Any, batch: Any, step: Any = None) -> Any:
            outputs = real(model, batch, step)
            return outputs * float("inf") if step is not None and int(step) in steps else outputs

        monkeypatch.setattr(parts, "run_model", wrong)

    return plant


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_step_is_skipped_and_counted(
    rung: Rung, tiny: list[str], tmp_path: Path, poison: Callable[[set[int]], None], optimizer: str
) -> None:
    poison({2})
    arguments = [item for item in tiny if not item.startswith("train.steps")]
    assert rung("train", *arguments, "train.steps=4", f"optim={optimizer}").status == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if "grad_norm" in line]
    assert [line["skipped_steps"] for line in steps] == [0, 1, 1, 1]
    assert steps[1]["loss"] is None and "loss" in steps[1]["nonfinite"]
    assert steps[3]["loss"] is not None


def test_skipping_leaves_every_bit(tiny: list[str], poison: Callable[[set[int]], None]) -> None:
    from law.harness import Recorder

    from rung.data import open_data
    from rung.loop import train
    from rung.parallel import World
    from rung.recipes.config import load_config
    from rung.recipes.pretrain import assemble

    class Quiet(Recorder):
        def end(self, *_: Any) -> None:
            weights.append(torch.cat([p.detach().flatten() for _, p in run.model.named_parameters()]).clone())

    poison({2})
    weights: list[torch.Tensor] = []
    config, layout = load_config(tiny, 1)
    with World.join("cpu") as world:
        run = assemble(config, layout, world, open_data(config.data, 0), Quiet())  # type: ignore[arg-type]
        train(run)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_too_many_in_a_row_stop_the_run(
    rung: Rung, tiny: list[str], tmp_path: Path, poison: Callable[[set[int]], None]
) -> None:
    poison({2, 3})
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        rung("train", *tiny, "train.max_skipped_steps=2")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "in a row" in status["error"]
