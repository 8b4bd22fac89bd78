"""AdamW, with and without clipping, SPAM and Stable-SPAM on the standard-library corpus, with and without spikes.

    python benchmarks/spam.py            # half an hour on two cores
    python benchmarks/spam.py --keep DIR # the same; finished runs are kept there, and not made again
    python benchmarks/spam.py --tiny     # shows in a minute that the script works; writes no result

Every optimizer gets the same budget: each learning rate of one grid is tried once, on a seed of its own, with and
without spikes, and the best of each goes through the same seeds for all. Samples, initial weights and spikes of a seed
are the same for every optimizer, so that differences to AdamW are made seed by seed.

A spike: in a step with probability 1/25 one hidden matrix has every element of its gradient, with probability 1/100,
multiplied by 10^u, u uniform in [1, 3]. The reset interval and the ramp after it are shortened as the run is.
Evaluation is on held-out text at the end of a run. Loss is a matter of arithmetic: other work on the machine does not
change it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measuring import RESULTS, commit, machine, print_table, write

SPIKE_STEPS, SPIKE_ELEMENTS, SPIKE_DECADES = 1 / 25, 1 / 100, (1.0, 3.0)
TUNING_SEED = 1000
NO_CLIPPING = ["train.clip_grad_norm=0"]
BETAS = "optim.betas=[0.9,0.999]"


def contenders(steps: int) -> dict[str, list[str]]:
    """Overrides of each; resets every quarter of a run, a ramp of a tenth of the time between them."""
    interval = steps // 4
    resets = [f"optim.reset_interval={interval}"]
    ramp = [f"optim.warmup_steps={max(1, 3 * interval // 10)}", f"optim.grace_steps={min(20, interval // 5)}"]
    return {
        "AdamW": ["optim=adamw", BETAS, *NO_CLIPPING],
        "AdamW, norm clipped to 1": ["optim=adamw", BETAS, "train.clip_grad_norm=1.0"],
        "SPAM": ["optim=spam", *resets, *ramp, *NO_CLIPPING],
        "Stable-SPAM": ["optim=stable_spam", *resets, *NO_CLIPPING],
    }


MEMORY = {
    "AdamW": ["optim=adamw"],
    "SPAM": ["optim=spam"],
    "SPAM, density 0.5": ["optim=spam", "optim.density=0.5"],
    "SPAM, density 0.25": ["optim=spam", "optim.density=0.25"],
    "Stable-SPAM": ["optim=stable_spam"],
    "Muon": ["optim=muon"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3, 16e-3])
    parser.add_argument("--seeds", type=int, default=3, help="runs at the best learning rate, 3 at least")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument("--keep", type=Path, help="folder for the results of single runs")
    parser.add_argument("--only", nargs="+", default=[], help="make only these optimizers' runs, for --keep")
    parser.add_argument("--tiny", action="store_true", help="a toy size that shows only that the script works")
    parser.add_argument("--output", help="JSON file; default: in benchmarks/results/, with --tiny the terminal")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_run(**json.loads(args.one))))
        return
    if args.tiny:
        args.steps, args.lrs, args.seeds = 8, [1e-3, 4e-3], 3
    elif not args.output:
        args.output = RESULTS / "spam.json"
    if args.seeds < 3:
        parser.error(f"--seeds {args.seeds}: intervals need 3 at least")
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    result = measure(args)
    if args.only:
        return
    show(result)
    write(result, args.output)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Tune, then repeat, then weigh."""
    result: dict[str, Any] = {
        "benchmark": "spam",
        "tiny": args.tiny,
        "commit": commit(),
        "machine": machine() | {"threads": 1},
        "settings": {"steps": args.steps, "lrs": args.lrs, "seeds": args.seeds, "overrides": model(args.tiny)},
    }
    known = {k: v for k, v in contenders(args.steps).items() if not args.only or k in args.only}
    memory = {} if args.only else MEMORY
    cases = [(name, spiked) for name in known for spiked in (False, True)]
    with ThreadPoolExecutor(args.processes) as pool, tempfile.TemporaryDirectory(prefix="rung-spam-") as folder:

        def start(name: str, spiked: bool, lr: float, seed: int) -> Any:
            overrides = [*model(args.tiny), *known[name], f"train.steps={args.steps}", f"optim.lr={lr}"]
            spec = {"overrides": overrides, "seed": seed, "spiked": spiked, "folder": folder}
            return pool.submit(kept, args.keep, spec)

        first = pool.submit(in_a_process, {"overrides": [*model(args.tiny), *MEMORY["AdamW"]], "folder": folder})
        result["settings"]["parameters"] = first.result()["parameters"]  # and the corpus is built once
        tuning = {(*case, lr): start(*case, lr, TUNING_SEED) for case in cases for lr in args.lrs}
        losses = {key: future.result()["eval_loss"] for key, future in tuning.items()}
        best = {case: min(args.lrs, key=lambda lr: losses[*case, lr]) for case in cases}
        finals = {(*case, seed): start(*case, best[case], seed) for case in cases for seed in range(1, args.seeds + 1)}
        weights = {
            name: pool.submit(in_a_process, {"overrides": [*model(args.tiny), *overrides], "folder": folder})
            for name, overrides in memory.items()
        }
        result["rows"] = [
            {
                "optimizer": name,
                "spiked": spiked,
                "tuning": {f"{lr:g}": losses[name, spiked, lr] for lr in args.lrs},
                "lr": best[name, spiked],
                "at_edge": best[name, spiked] in (min(args.lrs), max(args.lrs)),
                **summary([finals[name, spiked, seed].result() for seed in range(1, args.seeds + 1)]),
            }
            for name, spiked in cases
        ]
        result["bytes_per_parameter"] = {
            name: future.result()["bytes_per_parameter"] for name, future in weights.items()
        }
    for row in [] if args.only else result["rows"]:
        base = next(r for r in result["rows"] if r["optimizer"] == "AdamW" and r["spiked"] == row["spiked"])
        row["minus_adamw"] = interval([a - b for a, b in zip(row["losses"], base["losses"], strict=True)])
    return result


def model(tiny: bool) -> list[str]:
    """What all runs have in common: two million parameters, for two cores."""
    size = ["model.hidden_size=128", "model.intermediate_size=344", "data.seq_len=128", "train.global_batch_size=8"]
    if tiny:
        size = ["model.hidden_size=32", "model.intermediate_size=64", "data.seq_len=32", "train.global_batch_size=2"]
    return [
        *("data=python_stdlib", "model=tiny", "schedule=cosine", "schedule.warmup_steps=4", "device=cpu"),
        *("optim.weight_decay=0", "train.micro_batch_size=0", "precision=float32"),
        *size,
    ]


def kept(folder: Path | None, spec: Mapping[str, Any]) -> dict[str, Any]:
    """``in_a_process``, or what an earlier call of the same left in ``folder``."""
    if folder is None:
        return in_a_process(spec)
    name = hashlib.sha256(json.dumps({k: v for k, v in spec.items() if k != "folder"}).encode()).hexdigest()[:16]
    path = folder / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(in_a_process(spec)))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def in_a_process(spec: Mapping[str, Any]) -> dict[str, Any]:
    """One run in a process with one thread; its last line of output is the result."""
    command = [sys.executable, __file__, "--one", json.dumps(spec)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(spec['overrides'])} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def one_run(overrides: Sequence[str], folder: str, seed: int | None = None, spiked: bool = False) -> dict[str, Any]:
    """Train and evaluate; without a seed only build the optimizer and weigh its state."""
    from rung.data import prepare
    from rung.loop import train
    from rung.loop.monitor import Monitor
    from rung.parallel import World
    from rung.recipes.config import load_config
    from rung.recipes.pretrain import assemble, monitor_config, opened, run_facts, set_numerics

    run_dir = Path(tempfile.mkdtemp(dir=folder))
    quiet = ["logging.console.style=plain", "logging.tensorboard=false", f"run.dir={run_dir}", f"run.seed={seed or 0}"]
    config, layout = load_config([*overrides, *quiet], 1)
    config.eval.interval, config.eval.batches = config.train.steps, 32
    config.schedule.warmup_steps = max(1, config.train.steps // 20)
    set_numerics(config)
    with World.join("cpu") as world:
        prepare(config.data)
        source = opened(config)
        with Monitor(monitor_config(config), world, run_facts(config, layout, world, source)) as monitor:
            run = assemble(config, layout, world, source, monitor)
            numbers = sum(p.local.numel() for p in run.parameters)
            if seed is None:
                state = sum(entry.tensor.nbytes for entry in run.optimizer.named_state().values())
                return {"parameters": numbers, "bytes_per_parameter": state / numbers}
            run.monitor.start(0, {})
            if spiked:
                add_spikes(run, seed)
            outcome = train(run)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    skipped = [line.get("skipped_steps", 0) for line in lines if "loss" in line]
    return {
        "eval_loss": outcome.evaluation["eval_loss"],
        "bits_per_byte": outcome.evaluation["bits_per_byte"],
        "clipped": sum(line.get("spikes", 0) for line in lines),
        "skipped": skipped[-1],
    }


def add_spikes(run: Any, seed: int) -> None:
    """Spoil gradients after they are complete and before anything looks at them; the same for every optimizer."""
    import torch

    from rung.optim import is_hidden_matrix

    matrices = [p for p in run.parameters if is_hidden_matrix(p)]
    generator = torch.Generator().manual_seed(seed)
    finish = run.model.finish_gradients

    def finish_and_spoil(parameters: Any) -> None:
        finish(parameters)
        happens, which = torch.rand(2, generator=generator).tolist()
        target = matrices[int(which * len(matrices))].local
        chosen = torch.rand(target.shape, generator=generator) < SPIKE_ELEMENTS
        decades = torch.empty(target.shape).uniform_(*SPIKE_DECADES, generator=generator)
        if happens < SPIKE_STEPS and target.grad is not None:
            target.grad.mul_(torch.where(chosen, 10.0**decades, 1.0))

    run.model.finish_gradients = finish_and_spoil


STUDENT = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5% point of Student's distribution by degrees of freedom."""


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean, and half the width of its 95% interval."""
    half = STUDENT.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "half": half}


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What the seeds say together."""
    losses = [run["eval_loss"] for run in runs]
    return {
        "losses": losses,
        "loss": interval(losses),
        "bits_per_byte": statistics.fmean(run["bits_per_byte"] for run in runs),
        "clipped": statistics.fmean(run["clipped"] for run in runs),
        "skipped": sum(run["skipped"] for run in runs),
    }


def show(result: Mapping[str, Any]) -> None:
    """Tables for a person."""
    rows = [
        (
            row["optimizer"],
            "spikes" if row["spiked"] else "",
            f"{row['lr']:g}{' (edge)' if row['at_edge'] else ''}",
            f"{row['loss']['mean']:.4f} ± {row['loss']['half']:.4f}",
            f"{row['minus_adamw']['mean']:+.4f} ± {row['minus_adamw']['half']:.4f}",
            f"{row['clipped']:.0f}",
        )
        for row in result["rows"]
    ]
    print_table(("", "", "lr", "validation loss", "minus AdamW", "clipped"), rows)
    print()
    print_table(("", "bytes per parameter"), [(n, f"{b:.2f}") for n, b in result["bytes_per_parameter"].items()])


if __name__ == "__main__":
    main()
