"""Draws benchmarks/results/kernels.json: what each kernel reaches of the GPU's limit, beside the best of the others.

python benchmarks/kernel_figure.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measuring import RESULTS, ROOT

FIGURE = ROOT / "docs" / "assets" / "kernels.png"


def draw(result: Mapping[str, Any], path: Path = FIGURE) -> None:
    """Bars of shares, a line where the goal is. Says so where Matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: Matplotlib is not installed; python benchmarks/kernel_figure.py draws it where it is")
        return
    bars = []
    for row in result["problems"]:
        for name, part in row.get("passes", {}).items():
            share = part["share"]
            others = share.get(part["best_other"], 0.0)
            label = f"{row['op']} {row['shape']}" + ("" if name in ("both", "step") else f", {name}")
            bars.append((label, share.get("rung", 0.0), others, part["goal"]))
    figure = Figure(figsize=(9, 0.8 + 0.34 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(bars), 0, -1)
    axes.barh([at + 0.18 for at in places], [bar[1] for bar in bars], 0.34, label="Rung's kernel", color="#1f77b4")
    axes.barh([at - 0.18 for at in places], [bar[2] for bar in bars], 0.34, label="best of the others", color="#c7c7c7")
    for at, (_, _, _, goal) in zip(places, bars, strict=True):
        if goal:
            axes.plot(
                [goal, goal], [at - 0.4, at + 0.4], color="black", linewidth=1.2, label="goal" if at == 1 else None
            )
    axes.set_yticks(list(places), [bar[0] for bar in bars], fontsize=7)
    axes.set_xlabel(f"share of the limit measured on this GPU ({result['machine'].get('gpu', 'CPU, a toy')})")
    axes.axvline(1.0, color="grey", linewidth=0.5)
    axes.legend(loc="lower right", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"drawn into {path}")


if __name__ == "__main__":
    draw(json.loads((RESULTS / "kernels.json").read_text()))
