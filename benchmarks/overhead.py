"""What Rung's loop costs: its tokens per second over those of a bare PyTorch loop and of Hugging Face's Trainer.

    python benchmarks/overhead.py --threads 2

One CPU process each, the same shape, batches, start, optimizer and threads; see contenders.py for what each runs and
measuring.py for how turns are taken. Rung runs as `rung train` does, its metrics file, console and checks included; the
others log nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import contenders
from measuring import RESULTS, Contest, Program, Turn, commit, interleave, machine, print_table, spread, write

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each process")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round")
    parser.add_argument(
        "--max-disturbance", type=float, default=0.1, help="share of the processors others may have in a counted round"
    )
    parser.add_argument("--patience", type=float, default=20, help="minutes to wait in all for others to be quiet")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a toy size that shows only that the script works")
    parser.add_argument("--output", help="JSON file; default: a file in benchmarks/results/, with --tiny the terminal")
    args = parser.parse_args()
    if args.tiny:
        args.model, args.batch, args.seq, args.rounds, args.steps, args.warmup = "tiny", 2, 32, 2, 2, 1
        args.max_disturbance, args.patience = 1.0, 0
    elif not args.output:
        args.output = RESULTS / f"overhead_{args.threads}_threads_{args.precision}.json"
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    print_table(
        ("", "tokens/s", "min", "max", "Rung / it", "min", "max"),
        [_row(name, result) for name in result["contenders"]],
    )
    others = result["disturbance"]
    print(f"disturbance by others: median {others['median']:.1%}, max {others['max']:.1%}")
    print(f"largest relative difference between their losses: {result['relative_loss_difference']:.1e}")
    write(result, args.output)
    if errors := [f"{name}: {row['error']}" for name, row in result["contenders"].items() if row["error"]]:
        sys.exit("\n".join(errors))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare data and start, let the three take turns, and make ratios within rounds."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    from rung.models import num_parameters
    from rung.recipes.config import load_config

    attempts = 2 * args.rounds
    total_steps = args.warmup + attempts * args.steps
    extra = [
        f"model={args.model}",
        f"data.seq_len={args.seq}",
        f"train.global_batch_size={args.batch}",
        f"train.micro_batch_size={args.batch}",
        f"train.steps={total_steps + 1}",
        f"run.seed={args.seed}",
        f"precision={args.precision}",
        "device=cpu",
    ]
    settings = contenders.overrides(folder / "corpus", folder / "run", extra)
    config, _ = load_config(settings, 1)
    windows = (total_steps + 1) * args.batch
    contenders.write_corpus(folder / "corpus", config.model.vocab_size, windows * args.seq + 1, args.seed)
    contenders.write_batches(config, total_steps + 1, folder / "tokens.npy")
    contenders.write_weights(config, folder / "weights.pt")
    programs = []
    for kind in contenders.CONTENDERS:
        spec = contenders.Spec(
            kind=kind,
            overrides=settings,
            tokens=str(folder / "tokens.npy"),
            weights=str(folder / "weights.pt"),
            device="cpu",
            precision=args.precision,
            compile=False,
        )
        argv = [sys.executable, str(HERE / "contenders.py"), spec.save(folder / f"{kind}.json")]
        programs.append(Program(kind, argv, {"OMP_NUM_THREADS": str(args.threads)}, folder / f"{kind}.log"))
    contest = interleave(
        programs,
        rounds=args.rounds,
        attempts=attempts,
        steps=args.steps,
        warmup_steps=args.warmup,
        max_disturbance=args.max_disturbance,
        patience_seconds=60 * args.patience,
        together=args.tiny,
    )
    turns = contest.turns
    tokens = args.batch * args.seq * args.steps
    others = [name for name, these in turns.items() if name != "rung" and these and turns["rung"]]
    return {
        "benchmark": "overhead",
        "tiny": args.tiny,
        "commit": commit(),
        "machine": machine() | {"threads": args.threads},
        "settings": {
            "model": args.model,
            "parameters": num_parameters(config.model),
            "sequences": args.batch,
            "seq_len": args.seq,
            "precision": args.precision,
            "optimizer": "adamw",
            "seed": args.seed,
            "rounds": len(turns["rung"]),
            "max_disturbance": args.max_disturbance,
            "steps_per_turn": args.steps,
            "warmup_steps": args.warmup,
        },
        "versions": versions("transformers", "accelerate"),
        "contenders": {program.name: summary(program, turns, tokens) for program in programs},
        "ratios": {f"rung / {name}": ratio(turns, "rung", name) for name in others},
        "ratios_by_processor_time": {
            f"rung / {name}": ratio(turns, "rung", name, "processor_seconds") for name in others
        },
        "disturbed_rounds": disturbed_rounds(contest, [("rung", name) for name in others]),
        "relative_loss_difference": loss_difference(turns),
        "disturbance": spread([turn.disturbance for these in turns.values() for turn in these] or [0.0]),
    }


def disturbed_rounds(contest: Contest, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """How many rounds did not count, and what they would have said."""
    left_out: dict[str, Any] = {"number": max(len(these) for these in contest.disturbed.values())}
    for ours, theirs in pairs:
        if contest.disturbed[ours] and contest.disturbed[theirs]:
            left_out[f"{ours} / {theirs}"] = ratio(contest.disturbed, ours, theirs)["values"]
    return left_out


def loss_difference(turns: Mapping[str, Sequence[Turn]]) -> float:
    """The largest relative difference between the contenders' losses at the end of any turn."""
    differences = [0.0]
    for same_step in zip(*(these for these in turns.values() if these), strict=False):
        losses = [turn.loss for turn in same_step if turn.loss is not None]
        differences.append(max(losses) / min(losses) - 1)
    return max(differences)


def summary(program: Program, turns: Mapping[str, Sequence[Turn]], tokens: int) -> dict[str, Any]:
    """What one contender did: its speed over turns of ``tokens`` tokens; only ``error`` where it never had a turn."""
    mine = turns[program.name]
    if not mine:
        return {"error": program.error}
    return {
        "error": program.error,
        "tokens_per_second": spread([tokens / turn.seconds for turn in mine]),
        "last_loss": mine[-1].loss,
        "peak_gib": max(turn.peak_gib for turn in mine),
        "start_seconds": round(program.start_seconds, 1),
    }


def ratio(turns: Mapping[str, Sequence[Turn]], ours: str, theirs: str, clock: str = "seconds") -> dict[str, Any]:
    """Speed of one contender over another's, made within rounds."""
    pairs = zip(turns[ours], turns[theirs], strict=False)
    return spread([getattr(b, clock) / getattr(a, clock) for a, b in pairs])


def _row(name: str, result: Mapping[str, Any]) -> list[object]:
    row = result["contenders"][name]
    if "tokens_per_second" not in row:
        return [name, "failed", "", "", "", "", ""]
    speed, over = row["tokens_per_second"], result["ratios"].get(f"rung / {name}")
    ratios = [f"{over[key]:.3f}" for key in ("median", "min", "max")] if over else ["", "", ""]
    return [name, *(f"{speed[key]:.1f}" for key in ("median", "min", "max")), *ratios]


def versions(*packages: str) -> dict[str, str | None]:
    """Installed versions of packages; None where absent."""
    from importlib import metadata

    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


if __name__ == "__main__":
    main()
