"""Pretraining: next-token prediction on a corpus. Composes the floors below into one run."""

from __future__ import annotations

import contextlib
import os

import torch

import rung_kernels
from rung import __version__
from rung.config import differences, flatten
from rung.data import DataSource, check_vocab, open_data, prepare
from rung.errors import UserError
from rung.layout import Layout
from rung.layout.stages import bubble_share, splits_backward
from rung.loop import Training, train
from rung.loop.monitor import Monitor, MonitorConfig, RunFacts
from rung.models import build, num_parameters, train_flops_per_token
from rung.objectives import CausalLM
from rung.observe import MemorySettings, human_count, peak_flops
from rung.optim import build_optimizer, lr_at, needs_whole_tensors
from rung.parallel import Groups, SpreadModel, World, dtypes, initialize, parallelize
from rung.recipes.config import Config
from rung.recipes.finish import finish
from rung.recipes.folder import Claim
from rung.recipes.resume import checkpointer, go_on

__all__ = ["assemble", "pretrain", "pretrain_in", "spread_model", "spread_without_storage"]

STOPPED_AFTER_SAVING = 75
"""Exit status of a run that a signal stopped: run it again to go on."""


def pretrain(config: Config, layout: Layout) -> int:
    """Train, evaluate, export; returns the exit status. Collective over the ranks that the launcher started."""
    set_numerics(config)
    with World.join(config.device) as world:
        world.set_timeout(config.train.first_timeout_seconds)
        return pretrain_in(world, config, layout)


def pretrain_in(world: World, config: Config, layout: Layout) -> int:
    """``pretrain`` among ranks that have found each other."""
    agree_on_settings(world, config)
    claim = world.on_main(lambda: Claim(config), share=False)  # holds the lock on run.dir while this function runs
    origin = world.on_main(lambda: None if claim is None else claim.origin)
    world.on_main(lambda: prepare(config.data))
    source = world.everywhere(lambda: opened(config))
    agree_on_data(world, source)
    world.on_main(lambda: None if claim is None else claim.commit())
    with Monitor(monitor_config(config), world, run_facts(config, layout, world, source)) as monitor:
        for note in claim.notes if claim is not None else ():
            monitor.message(note)
        if source.num_eval_windows == 0:
            monitor.message("nothing is held out of this corpus: there will be no evaluation")
        run = assemble(config, layout, world, source, monitor)
        world.set_timeout(config.train.first_timeout_seconds)  # of the groups that were made for it, too
        go_on(config, run, origin)
        with contextlib.closing(checkpointer(config, run)) as run.checkpoints:
            outcome = train(run)
            world.set_timeout(config.train.first_timeout_seconds)  # writing large weights takes its time
            run.checkpoints.finish(run.progress(outcome.step))
            monitor.saved(run.checkpoints)
        facts = {"checkpoint": f"step {outcome.step} in {config.checkpoint.dir}"}
        if outcome.state == "completed":
            facts |= finish(config, run, outcome)
        else:
            facts["go on"] = "run the same command again"
        monitor.finish(outcome.state, outcome.step, facts)
    return 0 if outcome.state == "completed" else STOPPED_AFTER_SAVING


def assemble(config: Config, layout: Layout, world: World, source: DataSource, monitor: Monitor) -> Training:
    """Everything a loop needs: the model spread and initialised, the optimizer over this rank's part of it."""
    model = spread_model(config, layout, world)
    parameters = model.local_parameters(whole_tensors=needs_whole_tensors(config.optim))
    return Training(
        world=world,
        layout=layout,
        model=model,
        objective=CausalLM(model.cross_entropy),
        parameters=parameters,
        optimizer=build_optimizer(config.optim, parameters, seed=config.run.seed),
        learning_rate=lambda step: lr_at(config.schedule, step, config.train.steps, config.optim.lr),
        source=source,
        monitor=monitor,
        settings=config.train,
        evaluation=config.eval,
    )


def spread_model(config: Config, layout: Layout, world: World) -> SpreadModel:
    """Meta device -> spread (see ``parallelize``) -> storage -> initial values of the boxes this rank holds."""
    spread = spread_without_storage(config, layout, world)
    initialize(spread, world.device, config.run.seed)
    return spread


def spread_without_storage(config: Config, layout: Layout, world: World) -> SpreadModel:
    """Meta device -> spread (see ``parallelize``)."""
    types = dtypes(config.precision)
    with torch.device("meta"):
        model = build(config.model, draws_seed=config.run.seed).to(types.parameters)
    return parallelize(
        model,
        Groups(layout, world.rank, world.device.type),
        config.parallel,
        types,
        seq_len=config.data.seq_len,
        num_micro_batches=layout.accumulation(config.train.global_batch_size, config.train.micro_batch_size),
        compile_blocks=config.compile,
    )


def pipeline_line(config: Config, num_micro_batches: int) -> dict[str, str]:
    """What the header says of a pipeline: its schedule, what of a step it waits, and what makes it wait longer."""
    parallel = config.parallel
    if parallel.pp == 1:
        return {}
    split = parallel.backward_is_split(compiled=config.compile)
    sizes = (parallel.pp_schedule, parallel.pp, parallel.virtual_stages, num_micro_batches)
    line = f"{parallel.pp_schedule}, {parallel.pp * parallel.virtual_stages} stages"
    line += f", idle {bubble_share(*sizes, split_backward=split):.0%} of a step"
    if splits_backward(parallel.pp_schedule) and not split:
        why = "compiled" if config.compile else "recomputed"
        line += f" ({bubble_share(*sizes):.0%} where layers are not {why}: backward passes cannot be split)"
    return {"pipeline": line}


def opened(config: Config) -> DataSource:
    """The data of the run, fit for its model."""
    source = open_data(config.data, config.run.seed)
    check_vocab(source, config.model.vocab_size)
    return source


def agree_on_settings(world: World, config: Config) -> None:
    """Every rank composes for itself, from an environment of its own; a difference must not train."""
    mine = flatten(config) | {"(version of Rung)": __version__, "(version of torch)": torch.__version__}
    main = world.on_main(lambda: mine)
    changed = [f"{key}={there!r} on rank 0, {here!r} here" for key, (there, here) in differences(main, mine).items()]
    world.everywhere(
        lambda: UserError.raise_all([f"ranks were started differently: {'; '.join(changed)}"] if changed else [])
    )


def agree_on_data(world: World, source: DataSource) -> None:
    """Ranks on other machines may have built or copied other bytes under the same name."""
    mine = source.fingerprint
    main = world.on_main(lambda: mine)
    problem = (
        f"{source.path} holds other data here ({mine}) than on rank 0 ({main}); put the corpus where all nodes see it"
    )
    world.everywhere(lambda: UserError.raise_all([problem] if mine != main else []))


def set_numerics(config: Config) -> None:
    """float32 means float32: TF32 stays off. Deterministic kernels only where asked for, Triton's as asked for."""
    rung_kernels.set_backend(config.kernels)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def monitor_config(config: Config) -> MonitorConfig:
    """The settings of what watches a run."""
    return MonitorConfig(config.logging, config.profile, config.memory, config.heartbeat, config.garbage)


def run_facts(config: Config, layout: Layout, world: World, source: DataSource) -> RunFacts:
    """What the header of a run says and what its speed is measured by."""
    train, parallel = config.train, config.parallel
    tokens = train.global_batch_size * config.data.seq_len
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    axes = " × ".join(
        f"{axis} {getattr(layout, axis)}"
        for axis in ("dp_replicate", "dp_shard", "tp", "pp", "cp")
        if getattr(layout, axis) > 1
    )
    accumulation = train.global_batch_size // (layout.data_size * train.micro_batch_size)
    batch = f"{train.global_batch_size} × {config.data.seq_len} = {tokens} tokens per step"
    return RunFacts(
        run_dir=config.run.dir,
        total_steps=train.steps,
        tokens_per_step=tokens,
        flops_per_token=train_flops_per_token(config.model, config.data.seq_len),
        peak_flops=peak_flops(device, config.precision),
        memory=MemorySettings(
            activation_checkpointing=parallel.activation_checkpointing,
            micro_batch_size=train.micro_batch_size,
            dp_replicate=layout.dp_replicate,
            dp_shard=layout.dp_shard,
            pp_schedule=parallel.pp_schedule if layout.pp > 1 else None,
            world_size=world.size,
        ),
        max_skipped_steps=train.max_skipped_steps,
        gzip_bits_per_byte=source.gzip_bits_per_byte,
        title=f"rung {config.recipe.name}: {config.run.name}",
        lines={
            "model": f"{human_count(num_parameters(config.model))} parameters",
            "data": config.data.name if config.data.name != "corpus" else ", ".join(config.data.paths),
            "layout": f"{world.size} × {device}, {axes or 'one process'}",
            **pipeline_line(config, accumulation),
            "batch": f"{batch}, micro-batch {train.micro_batch_size}, accumulation {accumulation}",
            "numerics": f"{config.precision}, seed {config.run.seed}" + (", compiled" if config.compile else ""),
            "optimizer": f"{config.optim.name}, lr {config.optim.lr:g}, {config.schedule.name}, {train.steps} steps",
            "folder": config.run.dir,
        },
        settings=flatten(config),
    )
