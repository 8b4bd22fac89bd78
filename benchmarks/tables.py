"""Writes the tables of the pages in docs/ from the files in benchmarks/results/, so that no figure is copied by hand.

python benchmarks/tables.py            # rewrite the pages
python benchmarks/tables.py --check    # say whether they are up to date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from measuring import RESULTS, ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
NEVER_RUN = "never run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    pages = {page: filled(page.read_text()) for page in PAGES}
    changed = {page: text for page, text in pages.items() if text != page.read_text()}
    if args.check:
        names = ", ".join(page.name for page in changed)
        sys.exit(f"{names}: not what benchmarks/results/ says; run benchmarks/tables.py" if changed else 0)
    for page, text in changed.items():
        page.write_text(text)


def filled(page: str) -> str:
    """The page with every ``<!-- table: NAME ARGUMENT -->`` block made anew; a block ends with ``<!-- end -->``."""
    return re.sub(r"(<!-- table: (\w+) (\S+) -->\n).*?(<!-- end -->)", _block, page, flags=re.DOTALL)


def _block(match: re.Match[str]) -> str:
    path = RESULTS / match[3]
    result = json.loads(path.read_text()) if path.exists() else None
    return match[1] + "\n" + TABLES[match[2]](result) + "\n\n" + match[4]


def overhead(result: Mapping[str, Any] | None) -> str:
    """Speeds and ratios of overhead.py."""
    header = ("", "tokens/s", "Rung ÷ this", "peak GiB")
    if result is None:
        return _table(header, [(NEVER_RUN, "", "", "")])
    rows = []
    for name, row in result["contenders"].items():
        over = result["ratios"].get(f"rung / {name}")
        speed = _span(row["tokens_per_second"], ".0f")
        rows.append((LABELS[name], speed, _span(over, ".3f") if over else "", f"{row['peak_gib']:.2f}"))
    settings = result["settings"]
    text = (
        f"{settings['rounds']} rounds of {settings['steps_per_turn']} steps each, {settings['model']} "
        f"({settings['parameters']:,} parameters), {settings['sequences']} × {settings['seq_len']} tokens a step, "
        f"{settings['precision']}. {_left_out(result)}Largest relative difference between their losses: "
        f"{result['relative_loss_difference']:.1e}. {_disturbance(result)}"
    )
    return _table(header, rows) + f"\n\n{text} {_machine(result)}"


def startup(result: Mapping[str, Any] | None) -> str:
    """Stages of startup.py."""
    header = ("", "seconds", "beyond `import torch`")
    if result is None:
        return _table(header, [(NEVER_RUN, "", "")])
    rows = [
        (result["settings"]["stages"][stage], _span(seconds, ".2f"), _span(beyond, ".2f") if beyond else "")
        for stage, seconds in result["seconds"].items()
        for beyond in [result["seconds_beyond_torch"].get(stage)]
    ]
    worst = ", ".join(f"`{name}` {cost:.2f} s" for name, cost in list(result["worst_imports"].items())[:5])
    text = f"{result['settings']['rounds']} rounds. {_left_out(result)}The dearest imports: {worst}."
    return _table(header, rows) + f"\n\n{text} {_disturbance(result)} {_machine(result)}"


def cross_entropy(result: Mapping[str, Any] | None) -> str:
    """Peaks of cross_entropy_memory.py."""
    header = ("", "peak MiB beside the logits", "÷ logits", "ms", "relative error of the gradient")
    if result is None:
        return _table(header, [(NEVER_RUN, "", "", "", "")])
    rows = []
    for row in result["ways"].values():
        milliseconds = {key: 1000 * row["seconds"][key] for key in ("median", "min", "max")}
        over = row["peak_bytes"] / result["bytes_of_logits"]
        peak = f"{row['peak_bytes'] / 2**20:.0f}"
        rows.append(
            (f"`{row['call']}`", peak, f"{over:.2f}", _span(milliseconds, ".0f"), f"{row['gradient_error']:.1e}")
        )
    settings = result["settings"]
    logits, copy = result["bytes_of_logits"] / 2**20, result["bytes_of_full_float32_copy"] / 2**20
    text = (
        f"{settings['tokens']} tokens × {settings['vocab_size']}: logits in bf16 {logits:.0f} MiB, a full float32 copy "
        f"{copy:.0f} MiB."
    )
    return _table(header, rows) + f"\n\n{text} {_machine(result)}"


def mfu(result: Mapping[str, Any] | None) -> str:
    """Speeds of gpu_mfu.py."""
    header = ("", "tokens/s", "MFU", "MFU, full square", "peak GiB")
    if result is None:
        return _table(header, [(name, NEVER_RUN, "", "", "") for name in CONTENDERS])
    rows = []
    for name, row in result["contenders"].items():
        label = LABELS[name.removesuffix("_compile")] + (", compiled" if name.endswith("_compile") else "")
        if "tokens_per_second" not in row:
            rows.append((label, str(row["error"]).splitlines()[0], "", "", ""))
            continue
        shares = [f"{row[key]:.1%}" if key in row else "" for key in ("mfu", "mfu_full_square")]
        rows.append((label, _span(row["tokens_per_second"], ".0f"), *shares, f"{row['peak_gib']:.1f}"))
    ratios = "; ".join(f"{pair.replace('_', ' ')}: {_span(over, '.3f')}" for pair, over in result["ratios"].items())
    return _table(header, rows) + f"\n\n{ratios}. {_machine(result)}"


def layout_steps(result: Mapping[str, Any] | None, cases: Sequence[str]) -> str:
    """Step times of layouts.py over plain runs of a rank's work."""
    header = ("", "model", "ms a step", "÷ one process", "÷ processes side by side", "arithmetic alone")
    if result is None or "steps" not in result:
        return _table(header, [(LAYOUTS[case], NEVER_RUN, "", "", "", "") for case in cases])
    rows, notes = [], []
    settings = result["settings"]
    for size, part in result["steps"].items():
        for case in cases:
            row = part["rows"][case]
            if "seconds" not in row:
                rows.append((LAYOUTS[case], size, str(row["error"]).splitlines()[0], "", "", ""))
                continue
            milliseconds = {key: 1000 * row["seconds"][key] for key in ("median", "min", "max")}
            over = [_span(row[key], ".2f") for key in ("over_one", "over_side_by_side")]
            rows.append((LAYOUTS[case], size, _span(milliseconds, ".0f"), *over, f"{row['expected']:.2f}"))
        model = " ".join(part["model"])
        notes.append(
            f"{size}: `{model}`, {part['parameters']:,} parameters, {part['sequences']} × {part['seq_len']} tokens a "
            f"step, {part['rounds']} rounds of {part['steps_per_turn']} steps; losses differ by "
            f"{part['relative_loss_difference']:.1e} at most. {_left_out(part | {'settings': settings})}"
            f"{_disturbance(part)}"
        )
    cores = f"; fewer cores than the {settings['ranks']} ranks" if settings["oversubscribed"] else ""
    return _table(header, rows) + f"\n\n{settings['ranks']} ranks{cores}. {' '.join(notes)} {_machine(result)}"


def layout_bytes(result: Mapping[str, Any] | None, cases: Sequence[str]) -> str:
    """Bytes that layouts.py wrote down, over the least."""
    header = ("", "ranks", "MB sent in a step, all ranks", "÷ least")
    if result is None or "bytes" not in result:
        return _table(header, [(LAYOUTS[case], NEVER_RUN, "", "") for case in cases])
    rows = []
    for ranks, part in result["bytes"].items():
        for case in cases:
            row = part["rows"][case]
            if "sent" not in row:
                rows.append((LAYOUTS[case], ranks, str(row["error"]).splitlines()[0], ""))
                continue
            megabytes = sum(row["sent"].values()) / 1e6
            rows.append((LAYOUTS[case], ranks, f"{megabytes:.2f}", f"{row['ratio']:.4f}"))
    size = f"`{' '.join(part['model'])}`, {part['sequences']} × {part['seq_len']} tokens, float32"
    return _table(header, rows) + f"\n\nRecorded in one step of {size}."


def layout_ring(result: Mapping[str, Any] | None) -> str:
    """Balance of the ring, by arithmetic."""
    header = ("tokens", "ranks", "documents", "zigzag, computed", "zigzag, visible", "contiguous, visible")
    header = (*header, "computed ÷ visible")
    if result is None or "ring" not in result:
        return _table(header, [(NEVER_RUN, *[""] * 6)])
    rows = []
    for row in result["ring"]:
        ratios = [row[key] for key in ("computed", "visible", "contiguous_visible", "computed_over_visible")]
        documents = f"{row['documents']} ({row['number']})"
        rows.append((str(row["seq_len"]), str(row["ranks"]), documents, *(f"{ratio:.3f}" for ratio in ratios)))
    return _table(header, rows)


def layout_start(result: Mapping[str, Any] | None) -> str:
    """Start-up of layouts.py."""
    header = ("", "seconds to the first finished step")
    if result is None or "startup" not in result:
        return _table(header, [(NEVER_RUN, "")])
    part = result["startup"]
    rows = [
        (f"{part['ranks']} ranks: `{' '.join(part['layouts'][name])}`", _span(seconds, ".1f") if seconds else "failed")
        for name, seconds in part["seconds"].items()
    ]
    text = f"{part['rounds']} rounds. {_left_out(part | {'settings': result['settings']})}"
    return _table(header, rows) + f"\n\n{text}{_disturbance(part)} {_machine(result)}"


def gpu_paths(result: Mapping[str, Any] | None) -> str:
    """Every path with groups of one rank."""
    header = ("one GPU, groups of one rank", "ms, forward and backward", "÷ plain", "relative difference of the loss")
    if result is None:
        return _table(header, [(NEVER_RUN, "", "", "")])
    rows = []
    for name, row in result["paths"]["rows"].items():
        milliseconds = {key: 1000 * row["seconds"][key] for key in ("median", "min", "max")}
        rows.append((name, _span(milliseconds, ".1f"), f"{row['over_plain']:.3f}", f"{row['loss_difference']:.1e}"))
    return _table(header, rows) + f"\n\n{_machine(result)}"


def gpu_ring(result: Mapping[str, Any] | None) -> str:
    """Kernel time of a ring, rank by rank."""
    header = ("one GPU in the place of each rank", "kernel ms of a rank", "busiest ÷ mean", "contiguous")
    if result is None:
        return _table(header, [(NEVER_RUN, "", "", "")])
    part = result["ring"]
    rows = []
    for name, row in part["rows"].items():
        balances = [f"{row[key]:.3f}" if row[key] else "" for key in ("balance", "contiguous_balance")]
        rows.append((name, f"{1000 * row['seconds']:.1f}", *balances))
    return _table(header, rows) + f"\n\n{part['ranks']} ranks, {part['seq_len']} tokens. {_machine(result)}"


def gpu_shapes(result: Mapping[str, Any] | None) -> str:
    """A layer at the shapes of a rank."""
    header = ("a layer of llama3_8b on one rank of", "ms, forward and backward", "tp × this ÷ whole layer")
    if result is None:
        return _table(header, [(NEVER_RUN, "", "")])
    rows = []
    for tp, row in result["shapes"]["rows"].items():
        milliseconds = {key: 1000 * row["seconds"][key] for key in ("median", "min", "max")}
        rows.append((f"tp {tp}", _span(milliseconds, ".2f"), f"{row['over_whole']:.3f}"))
    return _table(header, rows) + f"\n\n1 × {result['shapes']['seq_len']} tokens, bf16. {_machine(result)}"


LAYOUTS = {
    "dp_shard": "`dp_shard`",
    "dp_shard, kept": "`dp_shard`, `reshard_after_forward=false`",
    "dp_replicate": "`dp_replicate`",
    "ring": "`cp`, ring",
    "ulysses": "`cp`, ulysses",
    "tp": "`tp`",
    "tp, whole stream": "`tp`, `sequence_parallel=false`",
    "1f1b": "`pp`, 1f1b",
    "zbv": "`pp`, zbv",
}
AXES = {
    "data": ("dp_shard", "dp_shard, kept", "dp_replicate"),
    "tensor": ("tp", "tp, whole stream"),
    "pipeline": ("1f1b", "zbv"),
    "context": ("ring", "ulysses"),
}
LABELS = {"rung": "Rung", "bare": "`bare_llama.py`", "huggingface": "Hugging Face Trainer"}
CONTENDERS = ("Rung, compiled", "Rung", f"{LABELS['bare']}, compiled", LABELS["huggingface"])
CHECKPOINT_RATIOS = {
    "rung async stall / torch.save": "wait of an asynchronous save ÷ blocking `torch.save`, both durable",
    "rung async stall / memcpy": "the same ÷ a copy of the state in memory",
    "dcp thread stall / torch.save": "wait of DCP's asynchronous save (thread) ÷ blocking `torch.save`",
    "save: rung / dcp": "blocking save ÷ DCP's",
    "save: rung async / dcp thread": "asynchronous save until committed ÷ DCP's, thread",
    "save: rung async / dcp process": "the same ÷ DCP's, process",
    "load: rung / dcp, same": "load on the same ranks ÷ DCP's, files in the page cache",
    "load: rung / dcp, same, cold": "the same, page cache dropped",
    "load: rung / dcp, columns": "load of rows as columns ÷ DCP's",
    "load: rung / dcp, fewer": "load on half the ranks ÷ DCP's",
}


def checkpoint_times(result: Mapping[str, Any] | None) -> str:
    """Waits and wall-clock of checkpoint.py beside torch.distributed.checkpoint."""
    if result is None:
        return _table(("", "ratio"), [(NEVER_RUN, "")])
    programs = result["saves"]
    header = ("", *(f"{part['size']}, {part['ranks']} ranks" for part in programs))
    rows = [
        (label, *(_span(part["ratios"][name], ".2f") if name in part["ratios"] else "" for part in programs))
        for name, label in CHECKPOINT_RATIOS.items()
    ]
    rows.append(("rounds", *(str(part["rounds"]) for part in programs)))
    for name, label in {"rung": "blocking save, seconds", "load rung, same": "load on the same ranks, seconds"}.items():
        rows.append((label, *(_span(part["ways"][name]["seconds"], ".2f") for part in programs)))
    return _table(header, rows) + f"\n\n{_machine(result)}"


def checkpoint_bytes(result: Mapping[str, Any] | None) -> str:
    """Bytes of checkpoint.py, on disk and in memory."""
    if result is None:
        return _table(("", "ratio"), [(NEVER_RUN, "")])
    programs = result["saves"]
    header = ("", *(f"{part['size']}, {part['ranks']} ranks" for part in programs))
    rows = [
        ("written ÷ state", *(f"{part['written_over_state']:.4f}" for part in programs)),
        ("read ÷ blocks touched, most", *(f"{max(part['read_over_touched'].values()):.4f}" for part in programs)),
        ("rows read as columns ÷ state", *(f"{part['read_over_state']['rung, columns']:.2f}" for part in programs)),
        ("the same, DCP", *(f"{part['read_over_state']['dcp, columns']:.2f}" for part in programs)),
        ("more memory ÷ state", *(f"{part['memory_over_local']['extra']:.2f}" for part in programs)),
        ("of it the flush processes, MiB", *(f"{part['flush_process_bytes'] / 2**20:.0f}" for part in programs)),
    ]
    return _table(header, rows)


def checkpoint_steps(result: Mapping[str, Any] | None) -> str:
    """What a step costs while checkpoint.py has a checkpoint written."""
    header = ("", "cores free", "step ÷ step alone", "seconds until committed")
    if result is None:
        return _table(header, [(NEVER_RUN, "", "", "")])
    labels = {"rung async": "Rung", "dcp thread": "DCP, thread", "dcp process": "DCP, process"}
    rows = [
        (
            f"{labels[name]}, {part['ranks']} rank{'s' * (part['ranks'] > 1)}",
            str(part["free_cores"]),
            _span(way["slower"], ".2f"),
            _span(way["seconds"], ".2f"),
        )
        for part in result["steps"]
        for name, way in part["ways"].items()
    ]
    return _table(header, rows)


def kernels(result: Mapping[str, Any] | None) -> str:
    """Passes of kernels.py: time, rate, share of the measured limit, and the best of the others."""
    header = ("operation", "pass", "µs", "rate", "of the limit", "goal", "best of the others", "its time ÷ Rung's")
    if result is None:
        return _table(header, [(NEVER_RUN, *[""] * 7)])
    rows = []
    for row in result["problems"]:
        what = f"`{row['op']}` {row['shape']}"
        if "passes" not in row:
            rows.append((what, row["skipped"], *[""] * 6))
            continue
        for name, part in row["passes"].items():
            best = part["best_other"]
            goal = f"{part['goal']:.0%}" if part["goal"] else "the best"
            theirs = f"{best}, {1e6 * part['seconds'][best]['median']:.1f}" if best else ""
            if "rung" not in part["seconds"]:
                why = row["contenders"].get("rung", {}).get("failed", "not run")
                rows.append((what, name, why, "", "", goal, theirs, ""))
                continue
            seconds, rate = part["seconds"]["rung"], part["rate"]["rung"]
            times = f"{1e6 * seconds['median']:.1f} ({1e6 * seconds['low']:.1f} to {1e6 * seconds['high']:.1f})"
            speed = f"{rate / 1e12:.0f} TFLOP/s" if part["flops"] else f"{rate / 1e9:.0f} GB/s"
            over = f"{part['best_other_over_rung']:.2f}" if best else ""
            rows.append((what, name, times, speed, f"{part['share']['rung']:.0%}", goal, theirs, over))
    limits = result["roofline"]
    text = (
        f"Median and quartiles. Limits measured in the same run: {limits['copy_bytes_per_second'] / 1e9:.0f} GB/s of a "
        f"copy, {limits['product_flops_per_second'] / 1e12:.0f} TFLOP/s of a bf16 product."
    )
    return _table(header, rows) + f"\n\n{text} {_machine(result)}"


def spam(result: Mapping[str, Any] | None, spiked: bool) -> str:
    """Losses of spam.py, with or without spikes."""
    header = ("", "learning rate", "validation loss", "bits per byte", "minus AdamW", "elements clipped")
    if result is None:
        return _table(header, [(NEVER_RUN, *[""] * 5)])
    rows = []
    for row in result["rows"]:
        if row["spiked"] != spiked:
            continue
        difference = "" if row["optimizer"] == "AdamW" else _interval(row["minus_adamw"], "+.4f")
        edge = ", the edge of the grid" if row["at_edge"] else ""
        clipped = f"{row['clipped']:,.0f}" if "SPAM" in row["optimizer"] else ""
        loss, bits = _interval(row["loss"], ".4f"), f"{row['bits_per_byte']:.3f}"
        rows.append((row["optimizer"], f"{row['lr']:g}{edge}", loss, bits, difference, clipped))
    settings = result["settings"]
    text = (
        f"Means over {settings['seeds']} seeds with their 95% intervals; {settings['steps']} steps, "
        f"{settings['parameters']:,} parameters; learning rates tried: "
        f"{', '.join(f'{lr:g}' for lr in settings['lrs'])}."
    )
    return _table(header, rows) + f"\n\n{text} {_machine(result)}"


def spam_memory(result: Mapping[str, Any] | None) -> str:
    """Bytes of optimizer state for each parameter of the model of spam.py."""
    header = ("", "bytes of state per parameter")
    if result is None:
        return _table(header, [(NEVER_RUN, "")])
    return _table(header, [(name, f"{value:.2f}") for name, value in result["bytes_per_parameter"].items()])


def _interval(value: Mapping[str, float], form: str) -> str:
    return f"{value['mean']:{form}} ± {value['half']:{form.lstrip('+')}}"


TABLES: dict[str, Callable[[Mapping[str, Any] | None], str]] = {
    "overhead": overhead,
    "startup": startup,
    "cross_entropy": cross_entropy,
    "mfu": mfu,
    **{f"layout_steps_{axis}": partial(layout_steps, cases=cases) for axis, cases in AXES.items()},
    **{f"layout_bytes_{axis}": partial(layout_bytes, cases=cases) for axis, cases in AXES.items()},
    "layout_ring": layout_ring,
    "layout_start": layout_start,
    "checkpoint_times": checkpoint_times,
    "checkpoint_bytes": checkpoint_bytes,
    "checkpoint_steps": checkpoint_steps,
    "gpu_paths": gpu_paths,
    "gpu_ring": gpu_ring,
    "gpu_shapes": gpu_shapes,
    "kernels": kernels,
    "spam_clean": partial(spam, spiked=False),
    "spam_spiked": partial(spam, spiked=True),
    "spam_memory": spam_memory,
}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _span(values: Mapping[str, float], form: str) -> str:
    """Median and extremes."""
    return f"{values['median']:{form}} ({values['min']:{form}} to {values['max']:{form}})"


def _left_out(result: Mapping[str, Any]) -> str:
    number, limit = result["disturbed_rounds"]["number"], result["settings"]["max_disturbance"]
    if not number:
        return ""
    rounds = "1 further round" if number == 1 else f"{number} further rounds"
    return f"Not counted: {rounds} in which other processes had more than {limit:.0%} of the processors. "


def _disturbance(result: Mapping[str, Any]) -> str:
    """What others took of the processors meanwhile."""
    others = result["disturbance"]
    return f"Other processes took {others['median']:.0%} of the processors at the median, {others['max']:.0%} at worst."


def _machine(result: Mapping[str, Any]) -> str:
    facts = result["machine"]
    parts = [f"{facts['cores']} cores of {facts['cpu']}"]
    if "threads" in facts:
        parts.append(f"{facts['threads']} thread{'s' * (facts['threads'] > 1)}")
    if "gpu" in facts:
        parts = [facts["gpu"], *parts]
    versions = [f"{name} {version}" for name, version in result.get("versions", {}).items() if version]
    parts += [f"torch {facts['torch']}", *versions, f"Python {facts['python']}"]
    return "Machine: " + ", ".join(parts) + "."


if __name__ == "__main__":
    main()
