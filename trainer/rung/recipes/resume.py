"""Going on: the newest checkpoint that can be read is loaded on whatever layout runs now."""

from __future__ import annotations

from collections.abc import Mapping

from rung.checkpoint import Checkpointer, CheckpointError, Manifest, Reader, load_state, open_storage
from rung.config import nested
from rung.data import DataSource
from rung.errors import NewerCheckpointError, UserError
from rung.loop import Progress, Training
from rung.optim import StateTensor
from rung.optim.base import Packed
from rung.recipes.config import Config
from rung.recipes.folder import Origin, none_left

__all__ = ["checkpointer", "go_on"]


def state_tensors(run: Training) -> dict[str, StateTensor]:
    """All that a checkpoint holds in tensors: parameters by name, optimizer state by name/state."""
    return run.model.state_tensors() | run.optimizer.named_state()


def fingerprints(source: DataSource) -> dict[str, str | None]:
    """What names the data of a run, whatever folder it lies in."""
    return {"corpus": source.fingerprint, "tokenizer": source.tokenizer_fingerprint}


def checkpointer(config: Config, run: Training) -> Checkpointer:
    """What saves the run. Collective."""
    return Checkpointer(
        config.checkpoint,
        run.world,
        state_tensors(run),
        run_config=nested(config),
        fingerprints=fingerprints(run.source),
        saved_step=run.start.step,
    )


def go_on(config: Config, run: Training, origin: Origin | None) -> None:
    """Load the best of ``origin`` into the run, where there is one; the run and its monitor know where it goes on.

    Collective. Raises CheckpointError where none can be read: a run that has checkpoints never starts over unasked.
    """
    if origin is None:
        run.monitor.start(0, {})
        return
    problems: list[str] = []
    for step in origin.steps:
        try:
            manifest = _load(config, run, origin.address, step)
        except NewerCheckpointError:
            raise
        except CheckpointError as error:
            if not origin.fall_back:
                raise
            problems.append(str(error))
            for tensor, _ in run.optimizer.named_state().values():
                tensor.zero_()  # some of it may have been read, and the one before may hold none
            run.monitor.message(f"!! the checkpoint of step {step} cannot be loaded: {error}")
            run.monitor.message("!! falling back to the one before it")
            continue
        run.start = Progress(manifest.step, int(manifest.progress["consumed_samples"]))
        if step >= config.train.steps:
            more = "a larger train.steps goes on, run.resume=never starts over"
            run.monitor.message(f"step {step} of train.steps={config.train.steps} is done: nothing to train ({more})")
        else:
            run.monitor.message(f"going on after step {step} of {origin.address}")
        run.monitor.start(step, manifest.progress, keep_metrics=origin.is_own)
        return
    raise CheckpointError(none_left(origin.address, problems))


def _load(config: Config, run: Training, address: str, step: int) -> Manifest:
    reader = run.world.everywhere(lambda: Reader(open_storage(address), step))
    with reader:
        manifest = reader.manifest
        _check_data(config, manifest, fingerprints(run.source))
        held = manifest.progress.get("recipe", {})
        if manifest.has_optimizer_state and held.keys() != run.recipe_state.keys():
            raise UserError(
                f"{reader.where()} holds recipe state {sorted(held)}, and this recipe keeps {sorted(run.recipe_state)}"
            )
        report = load_state(reader, _wanted(config, run, manifest), run.world)
    if report.unused:
        names = ", ".join(report.unused[:3]) + (" ..." if len(report.unused) > 3 else "")
        run.monitor.message(f"not loaded: {len(report.unused)} tensors that this run has no use for ({names})")
    for name in held:
        run.recipe_state[name].load(held[name])
    if report.not_shared:
        run.monitor.message(f"every rank reads for itself alone: {report.not_shared}")
    run.monitor.message(
        f"loaded {manifest.nbytes / 1e6:.1f} MB written by {_layout(manifest)} in {report.seconds:.2f} s"
    )
    return manifest


def _wanted(config: Config, run: Training, manifest: Manifest) -> Mapping[str, StateTensor]:
    """What is to be loaded: everything; only the model where a checkpoint holds nothing else, or where the optimizer is
    another one and may be."""
    model, optimizer = run.model.state_tensors(), run.optimizer.named_state()
    if not manifest.has_optimizer_state:
        run.monitor.message("this checkpoint holds a model and no optimizer state, which starts at zero")
        return model
    before = manifest.config["optim"]["name"]
    if before != config.optim.name:  # named in run.allow_changes, or it would have been refused
        run.monitor.message(f"{config.optim.name} cannot use the state of {before}: it starts at zero")
        return model
    packed = {name for name, (tensor, _) in optimizer.items() if isinstance(tensor, Packed)}
    if changed := _subset_changes(config, manifest) if packed else []:
        run.monitor.message(
            f"moments of subsets start at zero: {' and '.join(changed)} changed, and other elements have moments now"
        )
        optimizer = {name: entry for name, entry in optimizer.items() if name not in packed}
    return model | optimizer


def _subset_changes(config: Config, manifest: Manifest) -> list[str]:
    """Settings that say which elements have moments in SPAM, and are not what a checkpoint was made with."""
    before, now = manifest.config, nested(config)
    keys = [("optim", "density"), ("optim", "reset_interval"), ("run", "seed")]
    return [f"{group}.{key}" for group, key in keys if before[group].get(key) != now[group].get(key)]


def _check_data(config: Config, manifest: Manifest, found: Mapping[str, str | None]) -> None:
    """Raise UserError where the data is not what the checkpoint was trained on."""
    changed = [
        f"the {what} is another one than the checkpoint was trained with (fingerprint {now}, was {before})"
        for what, before in manifest.fingerprints.items()
        if before is not None and (now := found[what]) != before
    ]
    if {"data", "data.*", "data.paths", "*"} & set(config.run.allow_changes):
        return
    UserError.raise_all(f"{line}; put it back, or say run.allow_changes=[data.*]" for line in changed)


def _layout(manifest: Manifest) -> str:
    """The axes above one of the layout that wrote a checkpoint."""
    axes = {axis: manifest.config["parallel"].get(axis, 1) for axis in ("dp_replicate", "dp_shard", "tp", "pp", "cp")}
    ranks = f"{len(manifest.files)} rank{'s' * (len(manifest.files) > 1)}"
    return ", ".join([ranks, *(f"{axis} {size}" for axis, size in axes.items() if size not in (1, -1))])
