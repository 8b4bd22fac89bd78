"""The whole configuration: one field per component, each component's settings beside its code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from rung.checkpoint.config import CheckpointConfig
from rung.config import Node, choice_problem, compose, key_of, positive_problems
from rung.data import DataConfig
from rung.errors import UserError
from rung.layout import Layout
from rung.loop.config import EvalConfig, RunConfig, TrainConfig
from rung.models import ModelConfig
from rung.observe import GarbageConfig, HeartbeatConfig, LoggingConfig, MemoryConfig, ProfileConfig
from rung.optim import (
    AdamWConfig,
    MuonConfig,
    OptimConfig,
    ScheduleConfig,
    SpamConfig,
    StableSpamConfig,
)
from rung.parallel.config import PRECISIONS, ParallelConfig
from rung.parallel.legal import layout_problems
from rung_kernels.dispatch import BACKENDS, HAS_TRITON, IS_INTERPRETED

__all__ = [
    "NODES",
    "Config",
    "ExportConfig",
    "RecipeConfig",
    "changes_that_matter",
    "config_from",
    "load_config",
    "validate",
]


@dataclass
class RecipeConfig:
    """Which recipe runs."""

    name: str = "pretrain"
    """pretrain: next-token prediction on a corpus."""


@dataclass
class ExportConfig:
    """What a finished run leaves behind beside its metrics."""

    huggingface: bool = True
    """Write the weights as a Hugging Face directory, run.dir/export."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts continued and shown at the end of the run."""
    sample_tokens: int = 64
    """Tokens generated per prompt."""

    def validate(self) -> list[str]:
        """Problems with these settings."""
        problems = positive_problems(export__sample_tokens=self.sample_tokens)
        if self.sample_prompts and not self.huggingface:
            problems.append(
                "export.sample_prompts needs export.huggingface=true: samples come from the exported weights"
            )
        return problems


@dataclass
class Config:
    """Every setting of a run. `rung train --help` shows the groups, `rung train --cfg` the composed values."""

    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    heartbeat: HeartbeatConfig = field(default_factory=HeartbeatConfig)
    garbage: GarbageConfig = field(default_factory=GarbageConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    precision: str = "float32"
    """float64 (the law is exact to 1e-10), float32, or bf16 (float32 masters, bf16 gather and compute)."""
    compile: bool = False
    """Compile each layer with torch.compile, in place."""
    kernels: str = "auto"
    """Triton kernels: auto (on CUDA, those measured faster than torch), triton (all of them), torch (none)."""
    engine: str = "native"
    """Who runs the step. native: torch.distributed."""
    device: str = "auto"
    """auto takes CUDA where a GPU works; cpu; cuda."""


NODES = (
    Node("model", "model_schema", ModelConfig),
    Node("data", "data_schema", DataConfig),
    Node("optim", "adamw_schema", AdamWConfig),
    Node("optim", "muon_schema", MuonConfig),
    Node("optim", "spam_schema", SpamConfig),
    Node("optim", "stable_spam_schema", StableSpamConfig),
    Node("schedule", "schedule_schema", ScheduleConfig),
    Node("recipe", "recipe_schema", RecipeConfig),
)


def load_config(overrides: Sequence[str], world_size: int) -> tuple[Config, Layout]:
    """Compose and check a configuration for ``world_size`` ranks; no process group, no data, no GPU is touched.

    Raises UserError with every problem at once.
    """
    config = compose(Config, overrides, nodes=NODES)
    if not config.run.dir.strip() or not config.run.name.strip():
        raise UserError(f"run.dir={config.run.dir!r} and run.name={config.run.name!r} must not be empty")
    config.run.dir = _absolute(config.run.dir)
    config.checkpoint.dir = _absolute(config.checkpoint.dir)
    config.run.resume = config.run.resume.strip()
    if config.run.resume not in ("", "auto", "never"):
        config.run.resume = _absolute(config.run.resume)
    config.data.paths = [_absolute(path) for path in config.data.paths]
    return config, validate(config, world_size)


def config_from(values: Mapping[str, Any]) -> Config:
    """The configuration that a run wrote down, from ``nested`` mappings as a manifest holds them.

    What is not said, as by an older version, is as it is by default. Raises UserError that names every key that this
    version does not know: what it meant would be ignored.
    """
    problems: list[str] = []
    config: Config = _from_mapping(Config, values, "", problems)
    UserError.raise_all(problems)
    return config


def _from_mapping(kind: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = get_type_hints(kind)
    names = {key_of(entry.name): entry.name for entry in fields(kind)}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            problems.append(f"{prefix}{key}={value!r} is no setting of this version of Rung")
            continue
        hint = hints[names[key]]
        if is_dataclass(hint) and isinstance(value, Mapping):
            value = _from_mapping(_option(key, hint, value), value, f"{prefix}{key}.", problems)
        arguments[names[key]] = value
    return kind(**arguments)


def _option(group: str, kind: Any, values: Mapping[str, Any]) -> type:
    """The dataclass of what a group was chosen to be, as optim is of AdamWConfig where its name is adamw."""
    options = [node.type for node in NODES if node.group == group]
    named = [option for option in options if getattr(option(), "name", None) == values.get("name")]
    chosen: type = named[0] if len(options) > 1 and named else kind
    return chosen


def _absolute(path: str) -> str:
    """A path as it is meant here, whatever folder it is read from later; an address of fsspec's stays."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def validate(config: Config, world_size: int) -> Layout:
    """The layout of a valid configuration; UserError with every problem of every component otherwise.

    A micro-batch size of 0 becomes what it stands for.
    """
    problems: list[str] = []
    for component in (config.run, config.train, config.data, config.model, config.optim):
        problems += component.validate()
    problems += config.schedule.validate(config.train.steps)
    for other in (
        config.parallel,
        config.checkpoint,
        config.eval,
        config.logging,
        config.profile,
        config.heartbeat,
        config.garbage,
        config.export,
    ):
        problems += other.validate()
    problems += choice_problem("precision", config.precision, PRECISIONS)
    problems += choice_problem("engine", config.engine, ("native",))
    problems += choice_problem("device", config.device, ("auto", "cpu", "cuda"))
    problems += choice_problem("kernels", config.kernels, BACKENDS) or _kernel_problems(config)
    problems += choice_problem("recipe", config.recipe.name, ("pretrain",))
    if config.data.seq_len > config.model.max_position_embeddings:
        problems.append(
            f"data.seq_len={config.data.seq_len} exceeds model.max_position_embeddings="
            f"{config.model.max_position_embeddings}; shorten the sequences or raise the model's limit"
        )
    layout: Layout | None = None
    num_micro_batches: int | None = None
    try:
        layout = config.parallel.layout(world_size)
        if config.train.micro_batch_size == 0:
            config.train.micro_batch_size = config.parallel.micro_batch_for(
                config.train.global_batch_size // layout.data_size
            )
        sizes = config.train.global_batch_size, config.train.micro_batch_size
        if wrong := layout.check_batch(*sizes):
            problems += wrong
        else:
            num_micro_batches = layout.accumulation(*sizes)
    except UserError as error:
        problems.append(str(error))
    problems += layout_problems(
        config.parallel,
        config.model,
        layout,
        seq_len=config.data.seq_len,
        num_micro_batches=num_micro_batches,
        compile=config.compile,
        device=config.device,
        precision=config.precision,
    )
    UserError.raise_all(problems)
    assert layout is not None
    return layout


def _kernel_problems(config: Config) -> list[str]:
    """Kernels that were asked for and could not run: silence would be an ignored option."""
    if config.kernels != "triton":
        return []
    import torch

    problems = [] if HAS_TRITON else ["kernels=triton needs the package triton; install it, or leave it at auto"]
    if config.precision == "float64":
        problems.append("kernels=triton has no part in precision=float64, which is plain torch; leave it at auto")
    on_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    if on_cpu and not IS_INTERPRETED:
        problems.append("kernels=triton needs a GPU (or TRITON_INTERPRET=1, which is very slow); leave it at auto")
    return problems


FREE_TO_CHANGE = (
    *("run.", "parallel.", "checkpoint.", "eval.", "export."),
    *("logging.", "profile.", "memory.", "heartbeat.", "garbage."),
)
FREE_KEYS = {
    "train.micro_batch_size",
    "train.steps",
    "train.first_timeout_seconds",
    "train.timeout_seconds",
    "compile",
    "kernels",
}


def changes_that_matter(
    old: dict[str, Any], new: dict[str, Any], allowed: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Keys changed between two flat configurations: (those that may, those that may not without run.allow_changes)."""
    import fnmatch

    from rung.config import differences

    harmless: list[str] = []
    serious: list[str] = []
    for key, (before, after) in differences(old, new).items():
        line = f"{key}: {before} -> {after}"
        free = key in FREE_KEYS or (key.startswith(FREE_TO_CHANGE) and key != "run.seed")
        allow = any(fnmatch.fnmatch(key, p) or fnmatch.fnmatch(key, p + ".*") for p in allowed)
        (harmless if free or allow else serious).append(line)
    return harmless, serious
