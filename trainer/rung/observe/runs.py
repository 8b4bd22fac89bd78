"""The runs below a folder: how each stands and how well it does."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rung.observe.console import human_count, human_seconds
from rung.observe.status import read_status

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["RunSummary", "list_runs", "runs_table"]

_RUN_FILES = ("status.json", "metrics.jsonl", "resolved.yaml")
_TAIL_BYTES = 16 * 2**20
# A run that says it is running but has written nothing for this long was probably killed.
_SILENT_SECONDS = 900.0


@dataclass(frozen=True)
class RunSummary:
    """One run, as far as its files tell."""

    path: Path
    """The run's folder."""
    state: str
    """running, completed, stopped, failed; `silent` if it claims to run but has written nothing for 15 minutes;
    `unknown` without a status."""
    step: int
    """The last finished step."""
    tokens: int | None
    """Tokens consumed up to its last logged step."""
    loss: float | None
    """Loss of the last logged step; None too if it was not finite."""
    eval_loss: float | None
    """The last evaluation's loss."""
    bits_per_byte: float | None
    """The last evaluation's bits per byte."""
    error: str | None
    """What a failed run says."""
    age_seconds: float
    """Seconds since any of its files changed."""


def list_runs(folder: str | Path) -> list[RunSummary]:
    """Every run at or below `folder`, the latest changed first. A run's own folders are not searched for others."""
    return sorted((_summary(path) for path in _run_folders(Path(folder))), key=lambda run: run.age_seconds)


def runs_table(runs: list[RunSummary], root: str | Path | None = None) -> RenderableType:
    """A table for rich to print, what failed runs say below it; paths are relative to `root` where they are in it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    styles = {"completed": "green", "running": "cyan", "stopped": "yellow", "failed": "red", "silent": "red"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold", min_width=12)
    table.add_column("state", no_wrap=True)
    for name in ("step", "tokens", "loss", "eval loss", "bits/byte", "changed"):
        table.add_column(name, justify="right", no_wrap=True)
    errors = []
    for run in runs:
        name = str(run.path)
        if root is not None and run.path.resolve().is_relative_to(Path(root).resolve()):
            name = os.path.relpath(run.path, root)
        table.add_row(
            Text(name),
            Text(run.state, style=styles.get(run.state, "")),
            str(run.step),
            "" if run.tokens is None else human_count(run.tokens),
            *("" if value is None else f"{value:.4f}" for value in (run.loss, run.eval_loss, run.bits_per_byte)),
            human_seconds(run.age_seconds) + " ago",
        )
        if run.error:
            errors.append(Text(f"{name}: {run.error.partition(chr(10))[0]}", style="red"))
    return Group(table, *([Text(""), *errors] if errors else []))


def _run_folders(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        if any(name in files for name in _RUN_FILES):
            folders.clear()
            yield Path(path)
        folders[:] = [name for name in folders if not name.startswith(".")]


def _summary(path: Path) -> RunSummary:
    status = read_status(path)
    changed = max((path / name).stat().st_mtime for name in _RUN_FILES if (path / name).exists())
    age = max(0.0, time.time() - changed)
    step_line: dict[str, Any] = {}
    eval_line: dict[str, Any] = {}
    for values in _lines_from_the_end(path / "metrics.jsonl"):
        if not step_line and "loss" in values:
            step_line = values
        if not eval_line and "eval_loss" in values:
            eval_line = values
        if step_line and eval_line:
            break
    state = status.state if status else "unknown"
    return RunSummary(
        path=path,
        state="silent" if state == "running" and age > _SILENT_SECONDS else state,
        step=max(status.step if status else 0, step_line.get("step", 0)),
        tokens=step_line.get("tokens"),
        loss=step_line.get("loss"),
        eval_loss=eval_line.get("eval_loss"),
        bits_per_byte=eval_line.get("bits_per_byte"),
        error=status.error if status else None,
        age_seconds=age,
    )


def _lines_from_the_end(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of the file's last 16 MiB, the last one first."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            yield values
