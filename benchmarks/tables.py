"""Writes the tables of docs/performance.md from the files in benchmarks/results/, so that no figure is copied by hand.

python benchmarks/tables.py            # rewrite the page
python benchmarks/tables.py --check    # say whether it is up to date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from measuring import RESULTS, ROOT

PAGE = ROOT / "docs" / "performance.md"
NEVER_RUN = "never run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    before = PAGE.read_text()
    after = filled(before)
    if args.check:
        sys.exit(0 if after == before else f"{PAGE} differs from benchmarks/results/: run benchmarks/tables.py")
    PAGE.write_text(after)


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


LABELS = {"rung": "Rung", "bare": "`bare_llama.py`", "huggingface": "Hugging Face Trainer"}
CONTENDERS = ("Rung, compiled", "Rung", f"{LABELS['bare']}, compiled", LABELS["huggingface"])
TABLES: dict[str, Callable[[Mapping[str, Any] | None], str]] = {
    "overhead": overhead,
    "startup": startup,
    "cross_entropy": cross_entropy,
    "mfu": mfu,
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
