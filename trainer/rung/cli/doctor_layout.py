"""``rung doctor --layout``: a layout on paper, before any process is started."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from math import prod
from typing import Any

from rung.errors import UserError
from rung.layout import Layout
from rung.parallel.report import Collective, LayoutReport, RankReport, layout_report
from rung.recipes.config import Config

__all__ = ["report_of", "show_layout"]

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def show_layout(overrides: Sequence[str], world_size: int | None, ranks_per_node: int, as_json: bool) -> int:
    """Print the report on what ``rung train`` would run with these overrides.

    Without a world size it is the product of the degrees, where dp_shard=-1 counts as 1. Raises UserError with every
    reason why the layout cannot run.
    """
    from rung.config import compose
    from rung.recipes.config import NODES, validate

    if ranks_per_node < 1:
        raise UserError(f"--ranks-per-node={ranks_per_node} must be 1 or more")
    if world_size is not None and world_size < 1:
        raise UserError(f"--world-size={world_size} must be 1 or more")
    config = compose(Config, overrides, nodes=NODES)
    parallel = config.parallel
    degrees = (parallel.pp, parallel.dp_replicate, parallel.dp_shard, parallel.cp, parallel.tp)
    layout = validate(config, world_size or max(1, prod(degree for degree in degrees if degree != -1)))
    report = report_of(config, layout)
    if as_json:
        print(json.dumps(_as_json(report, ranks_per_node), indent=1))
    else:
        print("\n".join(_lines(report, config, ranks_per_node)))
    return 0


def report_of(config: Config, layout: Layout) -> LayoutReport:
    """The report on what a configuration would run."""
    return layout_report(
        config.parallel,
        config.model,
        layout,
        seq_len=config.data.seq_len,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        precision=config.precision,
        optimizer=config.optim,
        compile=config.compile,
        document_mask=config.data.document_mask,
        device=config.device,
    )


def _as_json(report: LayoutReport, ranks_per_node: int) -> dict[str, Any]:
    by_report: dict[RankReport, list[int]] = {}
    for rank, of_rank in enumerate(report.ranks):
        by_report.setdefault(of_rank, []).append(rank)
    return {
        "world_size": report.layout.world_size,
        "ranks_per_node": ranks_per_node,
        "degrees": report.layout.mesh,
        "num_micro_batches": report.num_micro_batches,
        "bubble_share": report.bubble_share,
        "flops_balance": report.flops_balance,
        "ring_balance": report.ring_balance,
        "ranks": [
            {
                "ranks": ranks,
                **dataclasses.asdict(of_rank),
                "total_bytes": of_rank.total_bytes,
                "sent_bytes": {" ".join(axes): sent for axes, sent in of_rank.sent_bytes().items()},
            }
            for of_rank, ranks in by_report.items()
        ],
        "notes": list(report.notes),
    }


def _lines(report: LayoutReport, config: Config, ranks_per_node: int) -> Iterator[str]:
    layout, parallel = report.layout, config.parallel
    axes = [axis for axis, size in layout.mesh.items() if size > 1]
    degrees = " × ".join(f"{axis} {layout.mesh[axis]}" for axis in axes) or "one rank"
    num_nodes = -(-layout.world_size // ranks_per_node)
    yield f"{degrees}: {layout.world_size} ranks on {num_nodes} node{'s' * (num_nodes > 1)} of up to {ranks_per_node}"
    if axes:
        yield ""
        yield from _grid(layout, axes, ranks_per_node)
    yield ""
    yield from _held(report)
    yield ""
    yield from _sent(report)
    yield ""
    if layout.pp > 1:
        yield (
            f"pipeline: {parallel.pp_schedule}, {report.num_micro_batches} micro-batches: ranks wait "
            f"{report.bubble_share:.1%} of a step; the busiest has {report.flops_balance:.3f} × the mean FLOPs"
        )
    if layout.cp > 1 and parallel.ulysses_degree < layout.cp:
        yield f"ring: the busiest rank of a step has {report.ring_balance:.3f} × the mean work"
    yield from (f"note: {note}" for note in report.notes)


def _grid(layout: Layout, axes: Sequence[str], ranks_per_node: int) -> Iterator[str]:
    """Who is where: a line for each node; of nodes that differ in where they begin only, the first in
    full, the last by its ends, those between as a count."""
    yield f"ranks by node, each with its place on ({', '.join(axes)})"
    world = layout.world_size
    nodes = [range(first, min(first + ranks_per_node, world)) for first in range(0, world, ranks_per_node)]

    def place(rank: int) -> tuple[int, ...]:
        coordinate = layout.coordinate(rank)
        return tuple(coordinate[axis] for axis in axes)

    def pattern(node: range) -> list[tuple[int, ...]]:
        first = place(node[0])
        return [tuple(there - here for there, here in zip(place(rank), first, strict=True)) for rank in node]

    width = len(str(world - 1))
    numbered = list(enumerate(nodes))
    for _, alike in groupby(numbered, key=lambda item: pattern(item[1])):
        (number, node), *others = alike
        cells = [f"{rank:{width}} ({_joined(place(rank))})" for rank in node]
        yield f"  node {number}: " + "  ".join(cells)
        if len(others) > 1:
            yield f"  … {len(others) - 1} more like it …"
            others = others[-1:]
        for number, node in others:
            first, end = place(node[0]), place(node[-1])
            yield f"  node {number}: {node[0]:{width}} ({_joined(first)}) … {node[-1]} ({_joined(end)})"
    for axis in axes:
        spans = max(len({rank // ranks_per_node for rank in ranks}) for ranks in layout.groups(axis))
        where = "inside a node" if spans == 1 else f"across {spans} nodes"
        yield f"  {axis}: groups of {layout.mesh[axis]}, {where}"


def _joined(place: Sequence[int]) -> str:
    return ",".join(map(str, place))


COLUMNS = {
    "parameters": "parameter_bytes",
    "gradients": "gradient_bytes",
    "optimizer": "optimizer_bytes",
    "unsharded grads": "unsharded_gradient_bytes",
    "gathered": "gathered_bytes",
    "activations": "activation_bytes",
    "recomputed": "recomputed_bytes",
    "logits": "logits_bytes",
    "boundaries": "boundary_bytes",
    "total": "total_bytes",
}


def _held(report: LayoutReport) -> Iterator[str]:
    """A line for all ranks that hold the same."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for rank, of_rank in enumerate(report.ranks):
        held = [getattr(of_rank, field) for field in COLUMNS.values()]
        key = of_rank.stages, of_rank.num_layers, of_rank.live_micro_batches, *held
        alike.setdefault(key, []).append(rank)
    used = [i for i, title in enumerate(COLUMNS) if title == "total" or any(key[3 + i] for key in alike)]
    titles = list(COLUMNS)
    yield "bytes on each rank, the most within a step (activations are an estimate)"
    rows = [["ranks", "stages", "layers", "live", *(titles[i] for i in used)]]
    for (stages, layers, live, *held), ranks in alike.items():
        rows.append([_ranges(ranks), _joined(stages), str(layers), str(live), *(_size(held[i]) for i in used)])
    yield from _table(rows, left=1)


def _sent(report: LayoutReport) -> Iterator[str]:
    """A table for each pipeline place whose ranks take part in the same messages."""
    layout = report.layout
    busiest: dict[tuple[Collective, ...], list[int]] = {}
    for pp in range(layout.pp):
        there = [report.ranks[rank] for rank in range(layout.world_size) if layout.coordinate(rank)["pp"] == pp]
        most = max(there, key=lambda of_rank: sum(of_rank.sent_bytes().values()))
        busiest.setdefault(most.collectives, []).append(pp)
    if not any(busiest):
        yield "collectives of a step: none"
        return
    spread = [axis for axis, size in layout.mesh.items() if size > 1]
    for collectives, places in busiest.items():
        where = f", on the ranks of pp {_ranges(places)}" if layout.pp > 1 else ""
        yield f"collectives of a step{where}: messages, and bytes that a rank sends"
        rows = [["axis", "operation", "of", "messages", "sent"]]
        totals: dict[str, int] = {}
        for one in collectives:
            axis = "world" if len(spread) > 1 and set(one.axes) == set(spread) else " × ".join(one.axes)
            least = "≥ " * one.at_least
            rows.append([axis, one.op, one.what, f"{least}{one.count}", f"{least}{_size(one.sent_bytes)}"])
            totals[axis] = totals.get(axis, 0) + one.sent_bytes
        yield from _table(rows, left=3)
        yield "  in all: " + ", ".join(f"{axis} {_size(total)}" for axis, total in totals.items())


def _table(rows: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """Columns, the first ``left`` of them set to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()


def _ranges(numbers: Sequence[int]) -> str:
    """0-3,8-11; long lists are cut."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    if len(texts) > 4:
        texts = [*texts[:2], f"… {texts[-1]} ({len(numbers)})"]
    return ",".join(texts)


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in UNITS:
        if value < 1024 or unit == UNITS[-1]:
            return f"{num_bytes} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError
