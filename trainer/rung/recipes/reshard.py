"""One checkpoint written again by another layout: what `rung train` would do on it before its first step, and after."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from rung.checkpoint import CheckpointConfig, Checkpointer, CheckpointError, Manifest, Reader, load_state, open_storage
from rung.checkpoint.format import is_optimizer_state, state_digest
from rung.checkpoint.storage import Storage, step_name
from rung.config import compose, nested
from rung.errors import UserError
from rung.layout import Layout
from rung.optim import StateTensor, build_optimizer, needs_whole_tensors
from rung.parallel import World
from rung.parallel.config import ParallelConfig
from rung.parallel.world import world_size_from_environment
from rung.recipes.config import NODES, Config, config_from, validate
from rung.recipes.pretrain import spread_without_storage

__all__ = ["free_for", "ranks_to_start", "reshard", "reshard_in"]

AXES = ("dp_replicate", "dp_shard", "tp", "pp", "cp", "ep")


def ranks_to_start(source: str, destination: str, overrides: Sequence[str]) -> int:
    """The ranks that the layout takes, where no launcher has started any and one is not enough; otherwise 0.

    Raises UserError, for all of them, with what is wrong about the layout or the folders.
    """
    if "RANK" in os.environ or world_size_from_environment() > 1:
        return 0
    parallel = _parallel(overrides)
    degrees = [getattr(parallel, axis) for axis in AXES if axis != "ep"]
    world_size = prod(max(1, degree) for degree in degrees)  # what is no degree, the layout says
    if world_size == 1:
        return 0
    with Reader.open(source) as reader:
        _plan(reader.manifest, parallel, world_size)
        free_for(open_storage(destination), reader.manifest.step)
    return world_size


def reshard(source: str, destination: str, overrides: Sequence[str], *, model_only: bool = False) -> list[str]:
    """Load ``source`` on the layout that ``overrides`` (of ``parallel.*``) ask for, and write ``destination`` from it.

    Collective over the ranks that a launcher started, or for one process alone; on the CPU, as nothing is computed.
    Returns what is to be told, on rank 0. The state keeps its digest; of the settings only ``parallel`` changes.

    Raises UserError where the layout is none for this model, or ``destination`` has this step already; CheckpointError
    where ``source`` cannot be read, or holds what this layout's model and optimizer have no place for.
    """
    with World.join("cpu") as world:
        return reshard_in(world, source, destination, overrides, model_only=model_only)


def reshard_in(
    world: World, source: str, destination: str, overrides: Sequence[str], *, model_only: bool = False
) -> list[str]:
    """``reshard`` among ranks that have found each other."""
    parallel = world.everywhere(lambda: _parallel(overrides))
    address, step = world.on_main(lambda: _chosen(source))
    with world.everywhere(lambda: Reader(open_storage(address), step)) as reader:
        manifest = reader.manifest
        plan = world.everywhere(lambda: _plan(manifest, parallel, world.size))
        target = world.everywhere(lambda: open_storage(destination))
        world.on_main(lambda: free_for(target, manifest.step))
        world.set_timeout(plan.config.train.first_timeout_seconds)
        tensors = _state(plan, world, model_only or not manifest.has_optimizer_state)
        report = load_state(reader, tensors, world)
    if lost := [name for name in report.unused if not (model_only and is_optimizer_state(name))]:
        more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
        raise CheckpointError(
            f"{reader.where()} holds what this model and its optimizer have no place for, and nothing may be lost: "
            f"{', '.join(lost[:8])}{more}"
        )
    written = _write(plan, target, manifest, tensors, world)
    world.on_main(lambda: _check(target, manifest, model_only))
    if not world.is_main:
        return []
    return [
        *plan.notes,
        *([f"every rank reads for itself alone: {report.not_shared}"] if report.not_shared else []),
        f"read {reader.where()}: {report.bytes_read_total / 1e6:,.1f} MB in {report.seconds:.2f} s",
        f"wrote {target.where(step_name(manifest.step))}: {written.num_bytes / 1e6:,.1f} MB in {written.seconds:.2f} s "
        f"on {plan.words}",
    ]


def free_for(storage: Storage, step: int) -> None:
    """Raise UserError where a folder of checkpoints cannot take one of ``step``."""
    if re.fullmatch(r"step-\d+", storage.address.rpartition("/")[2]):
        raise UserError(
            f"{storage.address} is the name of one checkpoint; give the folder of checkpoints that is to hold "
            f"{step_name(step)}"
        )
    if os.path.lexists(storage.address) and not os.path.isdir(storage.address):
        raise UserError(f"{storage.address} is no folder; choose another destination")
    if "resolved.yaml" in storage.names(""):
        raise UserError(f"{storage.address} is a run's folder; choose another one for checkpoints")
    if step in storage.steps():
        raise UserError(f"{storage.address} already holds {step_name(step)}; choose another folder, or move it away")


@dataclass(frozen=True)
class _Plan:
    """What is to be done to a checkpoint."""

    config: Config
    """The run as it would be here: only what spreads a model counts."""
    layout: Layout
    stored: dict[str, Any]
    """The settings that the new checkpoint holds."""
    notes: list[str]

    @property
    def words(self) -> str:
        """The layout, for people."""
        degrees = {axis: getattr(self.layout, axis) for axis in AXES}
        return " × ".join(f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1) or "one rank"


@dataclass(frozen=True)
class _Written:
    num_bytes: int
    seconds: float


def _parallel(overrides: Sequence[str]) -> ParallelConfig:
    """The settings that overrides ask for, of a layout whose every other setting is the default."""
    if wrong := [text for text in overrides if not text.lstrip("+").startswith("parallel.")]:
        raise UserError(
            f"{', '.join(wrong)}: reshard changes the layout alone; settings begin with parallel., as parallel.tp=2"
        )
    return compose(Config, overrides, nodes=NODES).parallel


def _chosen(source: str) -> tuple[str, int]:
    """The checkpoint that a path names, the same for all ranks."""
    with Reader.open(source) as reader:
        return reader.storage.address, reader.step


def _plan(manifest: Manifest, parallel: ParallelConfig, world_size: int) -> _Plan:
    config = config_from(manifest.config)
    config.parallel, config.device = copy.deepcopy(parallel), "cpu"
    notes = []
    with suppress(UserError):  # validate says what is wrong with a layout that cannot be
        layout = parallel.layout(world_size)
        if problems := layout.check_batch(config.train.global_batch_size, 1):
            notes.append(f"note: to train on this layout the batch must change: {'; '.join(problems)}")
        # Nothing is trained here; this is a batch that every schedule runs.
        config.train.global_batch_size, config.train.micro_batch_size = layout.data_size * layout.pp, 1
    layout = validate(config, world_size)
    config.compile = False
    degrees = {axis: getattr(layout, axis) for axis in AXES}
    stored = {**manifest.config, "parallel": nested(replace(parallel, **degrees, auto=False))}
    return _Plan(config, layout, stored, notes)


def _state(plan: _Plan, world: World, model_only: bool) -> dict[str, StateTensor]:
    """This rank's tensors, of undefined values."""
    model = spread_without_storage(plan.config, plan.layout, world)
    model.materialize(world.device)
    if model_only:
        return model.state_tensors()
    optim = plan.config.optim
    parameters = model.local_parameters(whole_tensors=needs_whole_tensors(optim))
    optimizer = build_optimizer(optim, parameters, seed=plan.config.run.seed)
    return model.state_tensors() | optimizer.named_state()


def _write(plan: _Plan, target: Storage, manifest: Manifest, tensors: dict[str, StateTensor], world: World) -> _Written:
    settings = CheckpointConfig(
        interval=0,
        keep=0,
        async_=False,
        dir=target.address,
        write_timeout_seconds=plan.config.checkpoint.write_timeout_seconds,
    )
    saver = Checkpointer(
        settings, world, tensors, run_config=plan.stored, fingerprints=manifest.fingerprints, saved_step=-1
    )
    saver.finish(manifest.progress)
    reports = saver.poll()
    saver.close()
    return _Written(sum(report.num_bytes for report in reports), sum(report.seconds for report in reports))


def _check(target: Storage, manifest: Manifest, model_only: bool) -> None:
    """What was written is the state that was read."""
    kept = [tensor for name, tensor in manifest.tensors.items() if not (model_only and is_optimizer_state(name))]
    with Reader(target, manifest.step) as reader:
        if reader.manifest.digest != state_digest(kept, manifest.progress):
            raise CheckpointError(f"{reader.where()} is not the state that was read: do not use it, and report this")
