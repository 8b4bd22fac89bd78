"""What checkpoints cost: time that training waits, bytes, memory, and wall-clock beside torch.distributed.checkpoint.

    python benchmarks/checkpoint.py            # ranks on the CPU, over gloo
    python benchmarks/checkpoint.py --quick    # only the smaller state
    python benchmarks/checkpoint.py --gpu      # one GPU: see checkpoint_gpu.py

Every rank of a program holds its share of the parameters and both moments of a Llama, in float32, split along the first
dim as FSDP splits them. In the same processes, from the same memory, onto the same disk, they are saved by Rung, with
and without its flush process, by torch.distributed.checkpoint (DCP) with its defaults, synchronously and with its
thread and its process, and by torch.save, each rank for itself; then loaded. Whoever saves makes its files durable,
torch.save here too, before the clock stops; its time without that is told too. All of these take turns, the order
rotates, ratios are made within a round, and before each turn the disk comes to rest. Files that are loaded are in the
page cache, but where it says cold. Every rank has one thread. DCP verifies nothing when it loads.

Asynchronous turns: save, 0.5 s of matrix products in the place of forward and backward pass, join, wait. Stall is the
time in save and join; DCP copies before it returns, so that its join has nothing to do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring import RESULTS, Failed, commit, machine, print_table, spread, write

HERE = Path(__file__).resolve().parent
SIZES = {"100 MB": (256, 768, 8, 5120), "1 GB": (768, 2048, 10, 16384)}
"""Hidden size, inner size, layers, vocabulary."""
TOY = (32, 64, 1, 128)
PARTS = ("saves", "steps")
Round = Mapping[str, Mapping[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="what one GPU can tell, instead of all else")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=tuple(SIZES))
    parser.add_argument("--ranks", nargs="+", type=int, default=(2, 4))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--minutes", type=float, default=12, help="for all; the first round of a program is always made"
    )
    parser.add_argument(
        "--folder", help="an existing folder on the disk to write to; default: where temporary files go"
    )
    parser.add_argument(
        "--max-disturbance", type=float, default=0.1, help="share of the processors others may have in a counted round"
    )
    parser.add_argument(
        "--patience", type=float, default=1, help="minutes to wait in each program for others to be quiet"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="with --gpu; cpu only with --tiny")
    parser.add_argument("--quick", action="store_true", help="only the smaller state, three rounds; writes no result")
    parser.add_argument("--tiny", action="store_true", help="a toy size that shows only that the script works")
    parser.add_argument(
        "--output", help="JSON file; default: in benchmarks/results/, with --tiny or --quick the terminal"
    )
    args = parser.parse_args()
    if args.gpu:
        import checkpoint_gpu

        checkpoint_gpu.main(args)
        return
    if args.tiny:
        args.sizes, args.ranks, args.rounds, args.max_disturbance, args.patience = ("toy",), (2,), 1, 1.0, 0
    elif args.quick:
        args.sizes, args.rounds, args.minutes = ("100 MB",), min(args.rounds, 3), min(args.minutes, 4)
    elif not args.output and (tuple(args.parts), tuple(args.sizes)) == (PARTS, tuple(SIZES)):
        args.output = RESULTS / "checkpoint.json"
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="rung-checkpoint-") as folder:
        result = measure(args, Path(folder))
    _show(result)
    write(result, args.output)
    errors = [row["error"] for part in PARTS for row in result.get(part, []) if row["error"]]
    if errors:
        sys.exit("\n".join(errors))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All programs, one after another, each within its share of the time."""
    from checkpoint_ranks import SIDE, STEP_SECONDS, Spec, state_bytes

    deadline = time.monotonic() + 60 * args.minutes
    cores = len(os.sched_getaffinity(0))
    stand_in_steps = 3 if args.tiny else 25
    result: dict[str, Any] = {
        "benchmark": "checkpoint",
        "tiny": args.tiny,
        "quick": args.quick,
        "commit": commit(),
        "machine": machine() | {"threads": 1},
        "settings": {
            "optimizer": "adamw",
            "precision": "float32",
            "file_system": _file_system(folder),
            "stand_in_seconds": stand_in_steps * STEP_SECONDS,
            "matrix_side": SIDE,
            "max_disturbance": args.max_disturbance,
            "minutes": args.minutes,
        },
    }
    programs: list[tuple[str, str, int]] = [("saves", size, n) for size in args.sizes for n in args.ranks]
    programs += [("steps", "toy" if args.tiny else "steps", n) for n in ((1,) if args.tiny else (1, cores))]
    programs = [program for program in programs if program[0] in args.parts]
    models = {**SIZES, "toy": TOY, "steps": SIZES["100 MB" if args.quick else "1 GB"]}
    # In time: what must be written, and what starting takes.
    weights = [state_bytes(models[size]) * (1.0 if part == "saves" else 0.5) + 1e8 for part, size, _ in programs]
    fewer: dict[str, dict[str, str]] = {}
    for number, (part, size, ranks) in enumerate(programs):
        share = weights[number] / sum(weights[number:])
        where = folder / f"{part}_{size.replace(' ', '_')}_{ranks}"
        where.mkdir()
        spec = Spec(
            part=part,
            model=list(models[size]),
            folder=str(where),
            facts=str(folder / f"{where.name}.json"),
            stand_in_steps=stand_in_steps,
            rounds=args.rounds,
            seconds=max(0.0, deadline - time.monotonic()) * share,
            max_disturbance=args.max_disturbance,
            patience_seconds=60 * args.patience,
            with_process=not args.tiny,
            fewer=fewer.get(size, {}) if part == "saves" else {},
        )
        row: dict[str, Any] = {
            "size": size,
            "model": list(models[size]),
            "state_bytes": state_bytes(models[size]),
            "ranks": ranks,
            "free_cores": max(0, cores - ranks),
            "error": None,
        }
        try:
            found = run(spec, ranks, timeout=max(120.0, 3 * spec.seconds))
            row |= {"tensors": found["tensors"], **summary(found, args.max_disturbance)}
            if part == "saves":
                row |= costs(found, row["state_bytes"])
                fewer[size] = found["saved"]
        except Failed as error:
            row["error"] = f"{part}, {size}, {ranks} ranks: {error}"
            print(row["error"], file=sys.stderr, flush=True)
        kept = {Path(path) for path in fewer.get(size, {}).values()}
        for path in where.iterdir():  # the disk is wanted
            if path not in kept and not any(path in other.parents for other in kept):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        result.setdefault(part, []).append(row)
    return result


def run(spec: Any, ranks: int, timeout: float) -> dict[str, Any]:
    """What rank 0 of a program found. Raises Failed with the end of what a rank said last."""
    path = spec.save(Path(f"{spec.folder}.spec.json"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    logs = [Path(f"{spec.folder}.{rank}.log") for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(log, "wb") as said:
            command = [sys.executable, str(HERE / "checkpoint_ranks.py"), path]
            processes.append(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=None if rank == 0 else said
                )
            )
    give_up = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes):
            failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
            if failed or time.monotonic() > give_up:
                tails = "\n".join(log.read_text(errors="replace")[-2000:] for log in logs)
                raise Failed(f"ranks {failed} ended\n{tails}" if failed else f"not done after {timeout:.0f} s\n{tails}")
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if not Path(spec.facts).exists():
        raise Failed("ended without a result")
    found: dict[str, Any] = json.loads(Path(spec.facts).read_text())
    return found


def summary(found: Mapping[str, Any], max_disturbance: float) -> dict[str, Any]:
    """Medians and ranges of the rounds that count, and ratios within rounds."""
    quiet = [
        these for these in found["rounds"] if all(turn["disturbance"] <= max_disturbance for turn in these.values())
    ]
    rounds: Sequence[Round] = quiet or found["rounds"]
    ways = {
        name: {
            key: spread([these[name][key] for these in rounds]) for key in found["first"][name] if key != "disturbance"
        }
        for name in found["first"]
    }
    return {
        "rounds": len(rounds),
        "ways": ways,
        "first": {
            name: {key: float(f"{value:.5g}") for key, value in row.items()} for name, row in found["first"].items()
        },
        "ratios": {name: spread([ratio(these) for these in rounds]) for name, ratio in _ratios(ways).items()},
        "disturbed_rounds": {"number": len(found["rounds"]) - len(rounds)},
        "disturbance": spread([turn["disturbance"] for these in rounds for turn in these.values()]),
    }


def _ratios(ways: Mapping[str, Any]) -> dict[str, Callable[[Round], float]]:
    """What is held against what, in a round."""
    if "memcpy" not in ways:
        return {}

    def over(one: str, key: str, other: str, other_key: str = "seconds") -> Callable[[Round], float]:
        return lambda these: these[one][key] / these[other][other_key]

    def lost(way: str) -> Callable[[Round], float]:
        """Beside the time in save and join, the copy takes processor time from the products."""
        return lambda these: (these[way]["until_joined"] - these["alone"]["seconds"]) / these["memcpy"]["seconds"]

    ratios = {}
    for way in (way for way in ("rung async", "dcp thread", "dcp process") if way in ways):
        ratios[f"{way} stall / torch.save"] = over(way, "stall", "torch.save")
        ratios[f"{way} stall / torch.save, not durable"] = over(way, "stall", "torch.save", "unsynced")
        ratios[f"{way} stall / memcpy"] = over(way, "stall", "memcpy")
        ratios[f"{way} lost / memcpy"] = lost(way)
    ratios["save: rung / dcp"] = over("rung", "seconds", "dcp")
    for way in (way for way in ("dcp thread", "dcp process") if way in ways):
        ratios[f"save: rung async / {way}"] = over("rung async", "seconds", way)
    for name in ways:
        if name.startswith("load rung"):
            ratios[f"{name.replace('load rung', 'load: rung / dcp')}"] = over(
                name, "seconds", name.replace("rung", "dcp")
            )
    return ratios


def costs(found: Mapping[str, Any], state_bytes: int) -> dict[str, Any]:
    """Bytes and memory: counted once."""
    footprint, first = found["footprint"], found["first"]
    loads = {name.removeprefix("load "): row for name, row in first.items() if name.startswith("load ")}
    return {
        "written_over_state": footprint["written"] / state_bytes,
        "stored_over_state": footprint["stored"] / state_bytes,
        "read_over_touched": {
            name: row["read_over_touched"] for name, row in loads.items() if "read_over_touched" in row
        },
        "read_over_state": {name: row["read"] / state_bytes for name, row in loads.items()},
        "memory_over_local": {key: footprint[key] / footprint["local"] for key in ("extra", "trainer", "flush")},
        "flush_process_bytes": footprint["flush_process_itself"],
    }


def _file_system(folder: Path) -> str:
    """Of the disk that is written to."""
    done = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _show(result: Mapping[str, Any]) -> None:
    for row in result.get("saves", []):
        if row["error"]:
            continue
        print(f"\n{row['size']}, {row['ranks']} ranks, {row['rounds']} rounds")
        seconds = [
            (name, f"{way[key]['median']:.3f}", f"{way[key]['min']:.3f}", f"{way[key]['max']:.3f}")
            for label, way in row["ways"].items()
            for key in ("seconds", "stall", "unsynced")
            if key in way
            for name in [label if key == "seconds" else f"{label}: {key}"]
        ]
        print_table(("", "seconds", "min", "max"), seconds)
        ratios = [
            (name, *(f"{over[key]:.3f}" for key in ("median", "min", "max"))) for name, over in row["ratios"].items()
        ]
        ratios += [("written / state", f"{row['written_over_state']:.4f}", "", "")]
        ratios += [
            (f"read / touched blocks, {name}", f"{value:.4f}", "", "")
            for name, value in row["read_over_touched"].items()
        ]
        ratios += [(f"read / state, {name}", f"{value:.4f}", "", "") for name, value in row["read_over_state"].items()]
        ratios += [
            (f"memory / local state, {key}", f"{value:.3f}", "", "") for key, value in row["memory_over_local"].items()
        ]
        print_table(("ratio", "median", "min", "max"), ratios)
        print(f"of the flush processes, {row['flush_process_bytes'] / 2**20:.0f} MiB are their own")
    for row in result.get("steps", []):
        if row["error"]:
            continue
        print(
            f"\nsteps while {row['state_bytes'] / 1e6:.0f} MB are written: {row['ranks']} ranks, "
            f"{row['free_cores']} cores free"
        )
        print_table(
            ("", "step / step alone", "min", "max", "seconds", "steps"),
            [
                (
                    name,
                    *(f"{way['slower'][key]:.3f}" for key in ("median", "min", "max")),
                    f"{way['seconds']['median']:.2f}",
                    f"{way['steps']['median']:.0f}",
                )
                for name, way in row["ways"].items()
            ],
        )


if __name__ == "__main__":
    main()
