"""One GPU: tokens/s, share of the peak FLOP/s and memory of Rung, a bare PyTorch loop and Hugging Face's Trainer.

    python benchmarks/gpu_mfu.py

bf16 with float32 parameters, llama_1b, sequences of 4096 tokens. All programs are loaded at once (three tensors of
float32 per parameter each) and take turns on the GPU; caches are emptied between turns, so the one at work has what the
others do not hold for good. Needs no network and no corpus. A program that cannot run (Transformers absent, too little
memory) says so in its row.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import contenders
from measuring import RESULTS, Program, commit, interleave, machine, print_table, write
from overhead import disturbed_rounds, ratio, summary, versions

HERE = Path(__file__).resolve().parent

# name -> what runs, and whether it is compiled
CONTENDERS = {
    "rung_compile": ("rung", True),
    "rung": ("rung", False),
    "bare_compile": ("bare", True),
    "bare": ("bare", False),
    "huggingface_compile": ("huggingface", True),
    "huggingface": ("huggingface", False),
}
DEFAULT = ("rung_compile", "rung", "bare_compile", "huggingface")
RATIOS = (
    ("rung_compile", "bare_compile"),
    ("rung_compile", "huggingface_compile"),
    ("rung_compile", "huggingface"),
    ("rung", "bare"),
    ("rung", "huggingface"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama_1b")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences per forward pass")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the first round")
    parser.add_argument(
        "--max-disturbance", type=float, default=0.2, help="share of the processors others may have in a counted round"
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of Rung")
    parser.add_argument("--minutes", type=float, default=7.0, help="no round begins later than this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy size on the CPU: shows only that it works")
    parser.add_argument("--output", help="JSON file; default: in benchmarks/results/, with --tiny the terminal")
    args = parser.parse_args()
    if args.tiny:
        args.device, args.model, args.seq, args.batch, args.micro_batch = "cpu", "tiny", 32, 4, 2
        args.rounds, args.steps, args.warmup, args.max_disturbance = 2, 1, 1, 1.0
    elif not args.output:
        args.output = RESULTS / "gpu_mfu.json"
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    print_table(
        ("", "tokens/s", "min", "max", "MFU", "MFU, full square", "peak GiB", "start s"),
        [_row(name, row) for name, row in result["contenders"].items()],
    )
    for pair, over in result["ratios"].items():
        print(f"{pair}: {over['median']:.3f} ({over['min']:.3f} to {over['max']:.3f})")
    write(result, args.output)
    if any(row["error"] for name, row in result["contenders"].items() if CONTENDERS[name][0] == "rung"):
        sys.exit("Rung itself did not get through; see above")


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare data, let all take turns."""
    begun = time.monotonic()
    from rung.models import num_parameters, train_flops_per_token
    from rung.observe import peak_flops
    from rung.recipes.config import load_config

    attempts = 2 * args.rounds
    total_steps = args.warmup + attempts * args.steps
    common = [
        f"model={args.model}",
        f"model.max_position_embeddings={args.seq}",
        f"data.seq_len={args.seq}",
        f"train.global_batch_size={args.batch}",
        f"train.micro_batch_size={args.micro_batch}",
        f"train.steps={total_steps + 1}",
        f"run.seed={args.seed}",
        "precision=bf16",
        f"device={args.device}",
        *args.set,
    ]
    config, _ = load_config(contenders.overrides(folder / "corpus", folder / "run", common), 1)
    tokens_needed = (total_steps + 1) * args.batch * args.seq + 1
    contenders.write_corpus(folder / "corpus", config.model.vocab_size, tokens_needed, args.seed)
    contenders.write_batches(config, total_steps + 1, folder / "tokens.npy")
    programs = []
    for name in args.contenders:
        kind, compiled = CONTENDERS[name]
        extra = [*common, f"compile={str(compiled).lower()}"]
        spec = contenders.Spec(
            kind=kind,
            overrides=contenders.overrides(folder / "corpus", folder / f"run_{name}", extra),
            tokens=str(folder / "tokens.npy"),
            weights=None,
            device=args.device,
            precision="bf16",
            compile=compiled,
        )
        argv = [sys.executable, str(HERE / "contenders.py"), spec.save(folder / f"{name}.json")]
        # Several programs share the GPU's memory; without this, what one frees is not quite what the next can take.
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        programs.append(Program(name, argv, environment, folder / f"{name}.log"))
    contest = interleave(
        programs,
        rounds=args.rounds,
        attempts=attempts,
        steps=args.steps,
        warmup_steps=args.warmup,
        max_disturbance=args.max_disturbance,
        together=args.device == "cuda" or args.tiny,
        deadline=begun + 60 * args.minutes,
    )
    turns, tokens = contest.turns, args.batch * args.seq * args.steps
    facts = machine()
    peak = peak_flops(facts.get("gpu", "CPU"), "bf16")
    per_token = {causal: train_flops_per_token(config.model, args.seq, causal) for causal in (True, False)}
    rows: dict[str, dict[str, Any]] = {}
    for program in programs:
        row = summary(program, turns, tokens)
        if peak and "tokens_per_second" in row:
            speed = row["tokens_per_second"]["median"]
            row |= {"mfu": speed * per_token[True] / peak, "mfu_full_square": speed * per_token[False] / peak}
        rows[program.name] = row
    return {
        "benchmark": "gpu_mfu",
        "tiny": args.tiny,
        "commit": commit(),
        "machine": facts,
        "settings": {
            "model": args.model,
            "overrides": args.set,
            "parameters": num_parameters(config.model),
            "sequences": args.batch,
            "micro_batch": args.micro_batch,
            "seq_len": args.seq,
            "precision": "bf16",
            "optimizer": "adamw",
            "seed": args.seed,
            "rounds": max(len(these) for these in turns.values()),
            "max_disturbance": args.max_disturbance,
            "steps_per_turn": args.steps,
            "warmup_steps": args.warmup,
        },
        "versions": versions("transformers", "accelerate", "triton"),
        "peak_flops": peak,
        "flops_per_token": per_token[True],
        "flops_per_token_full_square": per_token[False],
        "contenders": rows,
        "disturbed_rounds": disturbed_rounds(contest, [pair for pair in RATIOS if set(pair) <= set(turns)]),
        "ratios": {
            f"{ours} / {theirs}": ratio(turns, ours, theirs)
            for ours, theirs in RATIOS
            if turns.get(ours) and turns.get(theirs)
        },
    }


def _row(name: str, row: Mapping[str, Any]) -> list[object]:
    if "tokens_per_second" not in row:
        return [name, str(row["error"]).splitlines()[0][:70], "", "", "", "", "", ""]
    speed = row["tokens_per_second"]
    speeds = [f"{speed[key]:.0f}" for key in ("median", "min", "max")]
    shares = [f"{row[key]:.1%}" if key in row else "" for key in ("mfu", "mfu_full_square")]
    return [name, *speeds, *shares, f"{row['peak_gib']:.1f}", f"{row['start_seconds']:.0f}"]


if __name__ == "__main__":
    main()
