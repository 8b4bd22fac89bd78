"""Out of memory: a snapshot to look at and one change to try."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MemoryConfig", "MemorySettings", "explain_out_of_memory", "suggest"]


@dataclass
class MemoryConfig:
    """What is recorded about device memory."""

    snapshot: bool = False
    """Whether CUDA allocations are recorded and written to `memory/` when the device runs out (a few % slower)."""
    max_entries: int = 100000
    """Allocations that are remembered, the newest ones."""


@dataclass(frozen=True)
class MemorySettings:
    """The settings that decide how much memory a run needs, by their names in the config."""

    activation_checkpointing: str = "none"
    micro_batch_size: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    pp_schedule: str | None = None
    """None without a pipeline."""
    world_size: int = 1


def suggest(settings: MemorySettings) -> str:
    """The one change to try next, as an override and a reason.

    Ordered by what it costs in speed: another pipeline schedule is free, selective recomputation and a smaller
    micro-batch nearly so, full recomputation costs about a third more compute, other layouts cost communication. The
    layout law makes every one of them safe: none changes what is learned.
    """
    if settings.pp_schedule == "gpipe":
        return "parallel.pp_schedule=1f1b (gpipe keeps the activations of every micro-batch until the last has passed)"
    if settings.activation_checkpointing == "none":
        return "parallel.activation_checkpointing=selective (recomputes what is cheap to recompute)"
    if settings.micro_batch_size > 1:
        half = settings.micro_batch_size // 2
        return f"train.micro_batch_size={half} (was {settings.micro_batch_size}; the global batch stays the same)"
    if settings.activation_checkpointing == "selective":
        return "parallel.activation_checkpointing=full (keeps only the blocks' inputs, for about a third more compute)"
    if settings.dp_replicate > 1:
        return (
            f"parallel.dp_replicate=1 parallel.dp_shard={settings.dp_replicate * settings.dp_shard} "
            f"(was {settings.dp_replicate} and {settings.dp_shard}; shards the whole state over every data rank)"
        )
    return (
        f"more ranks: with twice as many (now {settings.world_size}), parallel.dp_shard=-1 halves "
        "what each holds of the parameters and the optimizer's state; or another layout: `rung doctor --layout` says "
        "what each rank would hold"
    )


@contextmanager
def explain_out_of_memory(
    config: MemoryConfig, settings: MemorySettings, run_dir: str | Path, rank: int = 0
) -> Iterator[None]:
    """Run a block; if the CUDA allocator runs out in it, raise its error again with one suggested change.

    With `config.snapshot`, the allocations on record go to `memory/rank0.pickle` (for https://pytorch.org/memory_viz).
    """
    import torch

    recording = config.snapshot and torch.cuda.is_available()
    if recording:
        torch.cuda.memory._record_memory_history(max_entries=config.max_entries)
    try:
        yield
    except torch.OutOfMemoryError as error:
        lines = [str(error), f"rank {rank} ran out of device memory. One change to try: {suggest(settings)}"]
        if recording:
            lines.append(_write_snapshot(Path(run_dir) / "memory" / f"rank{rank}.pickle"))
        raise torch.OutOfMemoryError("\n".join(lines)) from error
    finally:
        if recording:
            torch.cuda.memory._record_memory_history(enabled=None)


def _write_snapshot(path: Path) -> str:
    import torch

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except Exception as error:  # the reason the run ended must not be hidden by this
        return f"the memory snapshot could not be written: {error}"
    return f"memory snapshot: {path} (open it in https://pytorch.org/memory_viz)"
