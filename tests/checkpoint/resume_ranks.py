"""What one rank does in test_resume.py: some steps of a law case on one layout, from what another layout left."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from law.covering import Case
from law.harness import Record, Recorder, RecordingOptimizer, UnevenLabels, overrides, perturb_norms

from rung.checkpoint import Reader, open_storage
from rung.data import open_data
from rung.layout import clean_name
from rung.loop import train
from rung.parallel import World
from rung.recipes.config import load_config
from rung.recipes.folder import Origin
from rung.recipes.pretrain import assemble
from rung.recipes.resume import checkpointer, go_on


class Follower(Recorder):
    """A recorder of a run that saves and goes on."""

    def start(self, step: int, state: Mapping[str, Any], *, keep_metrics: bool = True) -> None:
        del step, state, keep_metrics

    def state(self, step: int) -> dict[str, int]:
        del step
        return {}

    def saved(self, checkpoints: Any) -> None:
        self.record.problems += [report.error for report in checkpoints.poll() if report.error]

    def message(self, text: str) -> None:
        if text.startswith("!!"):
            self.record.problems.append(text)


def take_steps(case: Case, corpus: str, folder: str, first: int, last: int) -> tuple[Record, str, str] | None:
    """Steps ``first`` to ``last`` of a case, from the checkpoint of the step before; and save.

    On rank 0: what was done, the digest of what was loaded as this layout would have saved it, and that of the end.
    """
    settings = [f"run.dir={folder}", f"checkpoint.dir={folder}", "checkpoint.interval=1", "checkpoint.keep=0"]
    composed = [load_config([*overrides(case, corpus), *settings], dist.get_world_size()) if is_main() else None]
    dist.broadcast_object_list(composed)
    assert composed[0] is not None
    config, layout = composed[0]
    world = World(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    monitor = Follower()
    torch._dynamo.reset()
    source = UnevenLabels(open_data(config.data, config.run.seed))
    run = assemble(config, layout, world, source, monitor)  # type: ignore[arg-type]
    if first == 1:
        perturb_norms(run.model)
    go_on(config, run, Origin(folder, (first - 1,), fall_back=False, is_own=True) if first > 1 else None)
    copied = Path(folder, "copies")
    copies = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, dir=str(copied)))
    again = checkpointer(copies, run)
    again.save(run.progress(first - 1), last=True)
    again.finish(run.progress(first - 1))
    run.checkpoints = checkpointer(config, run)
    run.optimizer = RecordingOptimizer(run.optimizer, run.parameters, monitor.record)  # type: ignore[assignment]
    run.settings = dataclasses.replace(run.settings, steps=last)
    train(run)
    run.checkpoints.finish(run.progress(last))
    run.checkpoints.close()
    if not is_main():
        return None
    return monitor.record, digest(str(copied), first - 1), digest(folder, last)


class Counter:
    """A recipe's state."""

    def __init__(self) -> None:
        self.rollouts = 0

    def state(self) -> dict[str, int]:
        return {"rollouts": self.rollouts}

    def load(self, state: dict[str, int]) -> None:
        self.rollouts = state["rollouts"]


def keep_more(case: Case, corpus: str, folder: str, step: int) -> tuple[list[float], int]:
    """Save (step 1) or load (step 2) a run with a buffer in each layer and a recipe that counts; what is there then."""
    settings = [f"run.dir={folder}", f"checkpoint.dir={folder}"]
    config, layout = load_config([*overrides(case, corpus), *settings], dist.get_world_size())
    world = World(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    source = UnevenLabels(open_data(config.data, config.run.seed))
    run = assemble(config, layout, world, source, Follower())  # type: ignore[arg-type]
    counter = Counter()
    run.recipe_state = {"rollouts": counter}
    layers = {clean_name(name): m for part in run.model.parts for name, m in part.named_modules() if m in part.blocks()}
    for name, layer in layers.items():
        layer.register_buffer("seen", torch.tensor([float(name.rpartition(".")[2])] if step == 1 else [-1.0]))
        layer.register_buffer("scratch", torch.zeros(3), persistent=False)
    if step == 1:
        counter.rollouts = 7
        saver = checkpointer(config, run)
        saver.save(run.progress(1), last=True)
        saver.finish(run.progress(1))
    else:
        go_on(config, run, Origin(folder, (1,), fall_back=False, is_own=True))
    return [layer.seen.item() for layer in layers.values()], counter.rollouts


def is_main() -> bool:
    return dist.get_rank() == 0


def digest(folder: str, step: int) -> str:
    with Reader(open_storage(folder), step) as reader:
        assert not list(reader.verify())
        return reader.manifest.digest
