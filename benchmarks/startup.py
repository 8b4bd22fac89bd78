"""How long `rung train` takes until it could start to work, beyond `import torch`.

    python benchmarks/startup.py

Each stage is a fresh interpreter that goes one step further than the one before; stages take turns, and what is
reported is the difference to `import torch` within a round. A last run with -X importtime says what the imports cost.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from measuring import RESULTS, Ticks, commit, machine, print_table, spread, wait_for_quiet, write

LOAD = "from rung.recipes.config import load_config; load_config(['model=llama_60m', 'optim=muon'], 1)"
STAGES = {
    "torch": "import torch",
    "rung": "import torch; import rung",
    "validated": f"import torch; {LOAD}",
    "ready": f"import torch; {LOAD}; import rung.recipes.pretrain",
}
MEANINGS = {
    "torch": "import torch",
    "rung": "and import rung",
    "validated": "and compose and validate a configuration",
    "ready": "and import all that `rung train` needs to begin",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--max-disturbance", type=float, default=0.1, help="share of the processors others may have in a counted round"
    )
    parser.add_argument("--patience", type=float, default=20, help="minutes to wait in all for others to be quiet")
    parser.add_argument("--worst", type=int, default=15, help="imports that are named")
    parser.add_argument("--tiny", action="store_true", help="one round, which shows only that the script works")
    parser.add_argument("--output", help="JSON file; default: in benchmarks/results/, with --tiny the terminal")
    args = parser.parse_args()
    if args.tiny:
        args.rounds, args.max_disturbance, args.patience = 1, 1.0, 0.0
    elif not args.output:
        args.output = RESULTS / "startup.json"
    result = measure(args)
    beyond = result["seconds_beyond_torch"]
    print_table(
        ("", "seconds", "beyond torch", "min", "max"),
        [
            [
                MEANINGS[stage],
                f"{result['seconds'][stage]['median']:.2f}",
                *(f"{beyond[stage][key]:.2f}" for key in ("median", "min", "max") if stage in beyond),
                *([""] * 3 if stage not in beyond else []),
            ]
            for stage in STAGES
        ],
    )
    print_table(("import", "own seconds, with what only it imports"), list(result["worst_imports"].items()))
    write(result, args.output)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every stage, round by round, after one round that fills the disk cache and writes compiled files.

    A round in which others had more than ``max_disturbance`` of the processors is made again, up to as many times as
    there are rounds; where none could be counted, all are.
    """
    if not args.tiny:
        _round(list(STAGES))
    counted: list[dict[str, float]] = []
    left_out: list[dict[str, float]] = []
    patience = 60 * args.patience
    for attempt in range(2 * args.rounds):
        if len(counted) == args.rounds:
            break
        patience -= wait_for_quiet(args.max_disturbance, patience)
        names = list(STAGES)
        first = attempt % len(names)
        this = _round(names[first:] + names[:first])
        (counted if this["disturbance"] <= args.max_disturbance else left_out).append(this)
    if not counted:
        counted, left_out = left_out, counted
    beyond = {stage: spread([this[stage] - this["torch"] for this in counted]) for stage in STAGES if stage != "torch"}
    return {
        "benchmark": "startup",
        "tiny": args.tiny,
        "commit": commit(),
        "machine": machine(),
        "settings": {"rounds": len(counted), "max_disturbance": args.max_disturbance, "stages": MEANINGS},
        "seconds": {stage: spread([this[stage] for this in counted]) for stage in STAGES},
        "seconds_beyond_torch": beyond,
        "worst_imports": worst_imports(args.worst),
        "disturbed_rounds": {
            "number": len(left_out),
            **{stage: [round(this[stage] - this["torch"], 3) for this in left_out] for stage in beyond},
        },
        "disturbance": spread([this["disturbance"] for this in counted]),
    }


def _round(stages: Sequence[str]) -> dict[str, float]:
    """Seconds of each stage, and what share of the processors others had meanwhile."""
    before = Ticks.now([])
    seconds, ours = {}, 0.0
    for stage in stages:
        seconds[stage], processor = _run(STAGES[stage])
        ours += processor
    after = Ticks.now([])
    own_share = ours * os.sysconf("SC_CLK_TCK") / max(1, after.total - before.total)
    return seconds | {"disturbance": max(0.0, after.disturbance_since(before) - own_share)}


def _run(code: str) -> tuple[float, float]:
    """Wall-clock and processor seconds of an interpreter."""
    before, started = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    elapsed, after = time.perf_counter() - started, os.times()
    return elapsed, after.children_user - before.children_user + after.children_system - before.children_system


def worst_imports(count: int) -> Mapping[str, float]:
    """Packages, and rung's and torch's subpackages, by the seconds that importing them adds beyond `import torch`.

    A module's own time counts for it; nothing is counted twice. importtime itself slows imports somewhat.
    """
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", STAGES["ready"]], capture_output=True, text=True, check=True
    )
    costs: dict[str, float] = {}
    beyond_torch = False
    for own, name in re.findall(r"import time:\s*(\d+) \|\s*\d+ \|\s*(\S+)", run.stderr):
        if beyond_torch:
            parts = name.split(".")
            key = ".".join(parts[:2] if parts[0] in ("rung", "torch") else parts[:1])
            costs[key] = costs.get(key, 0.0) + int(own) / 1e6
        beyond_torch = beyond_torch or name == "torch"  # it is listed when it is complete
    worst = sorted(costs.items(), key=lambda item: -item[1])[:count]
    return {name: round(cost, 3) for name, cost in worst}


if __name__ == "__main__":
    main()
