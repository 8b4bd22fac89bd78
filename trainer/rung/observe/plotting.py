"""Loss curves of one or several runs, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rung.errors import UserError
from rung.observe.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot"]

# Okabe and Ito's palette, told apart by colour-blind readers too; grey is left for the baseline.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#555555"
_Points = tuple[list[float], list[float]]


@dataclass
class _Curves:
    """What is drawn of one run; x is tokens."""

    name: str
    train: _Points = field(default_factory=lambda: ([], []))
    evaluation: _Points = field(default_factory=lambda: ([], []))
    bits_per_byte: _Points = field(default_factory=lambda: ([], []))


def plot(
    run_dirs: Sequence[str | Path],
    out_png: str | Path,
    *,
    gzip_bits_per_byte: float | None = None,
    log_x: bool = False,
    title: str = "",
) -> Path:
    """Draw the runs' losses over tokens to `out_png` and return its path.

    Left: training loss of every step (light) and smoothed (bold), evaluations as points. Right, if any run has
    evaluated bits per byte: those, and what gzip needs as a horizontal line. A run with nothing to draw is an error.
    """
    folders = [Path(run_dir) for run_dir in run_dirs]
    runs = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    UserError.raise_all(
        [f"{folder}: no metrics.jsonl with a step in it; name folders that `rung train` wrote (run.dir)"
         for folder, run in zip(folders, runs, strict=True) if not run.train[0]]
        if runs else ["no run to plot; name at least one run folder"]
    )  # fmt: skip

    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, and no pyplot state to leak into callers
    from matplotlib.figure import Figure

    two_panels = any(run.bits_per_byte[0] for run in runs)
    figure = Figure(figsize=(11.5 if two_panels else 7.5, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if two_panels else 1, squeeze=False, sharex=True)[0]
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        _draw_loss(axes[0], run, colour)
        if two_panels:
            x, y = run.bits_per_byte
            axes[1].plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.6, label=run.name)
    _focus(axes[0], [run.train[1] for run in runs])
    _finish(axes[0], "loss (nats per token)", log_x, "Training loss; points are evaluations")
    if two_panels:
        if (gzip := gzip_bits_per_byte) is not None:
            axes[1].axhline(gzip, color=_GREY, linewidth=1.2, linestyle=(0, (5, 3)))
            axes[1].annotate(
                f"gzip -9  {gzip:.3f}", (0.995, gzip), xycoords=("axes fraction", "data"), color=_GREY,
                xytext=(0, 3), textcoords="offset points", ha="right", va="bottom", fontsize=9,
            )  # fmt: skip
        axes[1].margins(y=0.12)
        _finish(axes[1], "bits per byte (lower is better)", log_x, "Evaluation, per byte of text")
    handles, labels = axes[0].get_legend_handles_labels()
    if len(runs) > 1:
        axes[0].legend(handles, labels, framealpha=0.85, edgecolor="none", fontsize=9, loc="upper right")
    if title or len(runs) == 1:
        figure.suptitle(title or runs[0].name, fontsize=12, fontweight="bold")
    out = Path(out_png)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def smooth(values: Sequence[float], half_window: int, stride: int = 1) -> list[float]:
    """The median of every `stride`-th value and its neighbours, up to `half_window` of them on either side.

    A median, so that a spike stays a spike of the raw curve; centred, and symmetric at the steep start, so that the
    bold curve does not lag behind a falling loss. Values that are not finite stay as they are (a gap) and count for
    none of their neighbours.
    """
    smoothed = []
    for index in range(0, len(values), stride):
        before = min(half_window, index)
        near = [v for v in values[index - before : index + before + 1] if math.isfinite(v)]
        smoothed.append(median(near) if math.isfinite(values[index]) else values[index])
    return smoothed


def _read(folder: Path, name: str) -> _Curves:
    curves = _Curves(name)
    tokens = 0.0
    for values in read_metrics(folder):
        if "loss" in values:
            tokens = values.get("tokens") or values["step"]
            _append(curves.train, tokens, values["loss"])
        if "eval_loss" in values:  # an evaluation's line follows the line of its step
            _append(curves.evaluation, tokens, values["eval_loss"])
            if values.get("bits_per_byte") is not None:
                _append(curves.bits_per_byte, tokens, values["bits_per_byte"])
    return curves


def _append(points: _Points, x: float, y: float | None) -> None:
    points[0].append(x)
    points[1].append(math.nan if y is None else y)  # a gap in the curve


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell the runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max((len(part) for part in parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _colours(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _draw_loss(axes: Axes, run: _Curves, colour: str) -> None:
    x, y = run.train
    axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
    stride = 1 + len(y) // 4000  # more than there are pixels
    smoothed = smooth(y, min(100, len(y) // 50), stride)
    marker = "o" if len(y) == 1 else None
    axes.plot(x[::stride], smoothed, color=colour, linewidth=1.8, label=run.name, marker=marker)
    if run.evaluation[0]:
        axes.plot(
            *run.evaluation, color=colour, linestyle="none", marker="o", markersize=5,
            markeredgecolor="white", markeredgewidth=0.8, zorder=3,
        )  # fmt: skip


def _focus(axes: Axes, losses: Sequence[Sequence[float]]) -> None:
    """Let one spike not flatten the rest: the panel shows the curves up to a little above where they start."""
    finite = [[value for value in run if math.isfinite(value)] for run in losses]
    finite = [run for run in finite if run]
    if finite:
        low, high = min(min(run) for run in finite), max(max(run[:3]) for run in finite)
        margin = 0.06 * max(high - low, 0.05)
        axes.set_ylim(low - margin, high + margin)


def _finish(axes: Axes, y_label: str, log_x: bool, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_title(title, fontsize=10, loc="left", color=_GREY)
    axes.set_xlabel("tokens")
    axes.set_ylabel(y_label)
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.grid(True, color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _tick(value: float, position: int | None = None) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
