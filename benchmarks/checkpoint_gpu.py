"""What ``checkpoint.py --gpu`` runs: what a save takes from training on one GPU, beside the device's copy to the host.

The copy of the state runs on a stream of its own while matrix products stand in for forward and backward pass; then
training waits for it on the device, before the update. ``lost`` is what save, products, join and an update take longer
than products and update, with the device synchronized; the least that a save which hides nothing could lose is the
state's bytes over the bandwidth of a copy to page-locked memory, measured in the same round. With ``--tiny`` on the
CPU it shows that the script works.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, commit, machine, print_table, spread, write

MODELS = {"1 GB": (768, 2048, 10, 16384), "10 GB": (2048, 5632, 16, 32768)}
TOY = (32, 64, 1, 128)


def main(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("checkpoint.py --gpu: no usable GPU; --tiny --device cpu shows that the script works")
    if args.device == "cpu" and not args.tiny:
        sys.exit("checkpoint.py --gpu --device cpu: only with --tiny")
    sizes = {"toy": TOY} if args.tiny else {"1 GB": MODELS["1 GB"]} if args.quick else MODELS
    if not (args.tiny or args.quick or args.output):
        args.output = RESULTS / "checkpoint_gpu.json"
    rounds = 1 if args.tiny else args.rounds
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="rung-checkpoint-") as folder:
        rows = {
            name: measure(model, args.device, rounds, Path(folder) / str(i))
            for i, (name, model) in enumerate(sizes.items())
        }
    result = {
        "benchmark": "checkpoint_gpu",
        "tiny": args.tiny,
        "commit": commit(),
        "machine": machine(),
        "settings": {"rounds": rounds, "device": args.device},
        "rows": rows,
    }
    print_table(
        ("", "GB/s to the host", "÷ best", "stall ms", "lost ms", "lost ÷ copy"),
        [
            (
                name,
                f"{row['gb_per_second']['median']:.1f}",
                f"{row['copy_over_best']['median']:.2f}",
                f"{1000 * row['stall']['median']:.1f}",
                f"{1000 * row['lost']['median']:.1f}",
                f"{row['lost_over_copy']['median']:.3f}",
            )
            for name, row in rows.items()
        ],
    )
    write(result, args.output)


def measure(model: tuple[int, ...], device: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Rounds of a bare copy, of training without a save, and with one."""
    from checkpoint_ranks import Rung, State, state_bytes

    from rung.parallel import World

    world = World(0, 0, 1, torch.device(device))
    state = State.of(model, world, 0, filled=True, device=device)
    way = Rung(world, state, str(folder), async_=True)
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    host = [torch.empty(tensor.shape, pin_memory=device == "cuda") for tensor in state.tensors]
    whole = torch.empty(min(state.local_bytes, 2**30), dtype=torch.uint8, device=device)
    best_host = torch.empty(whole.shape, dtype=torch.uint8, pin_memory=device == "cuda")
    side = 4096 if device == "cuda" else 128
    a, b, out = (torch.randn(side, side, device=device) for _ in range(3))

    def timed(action: Callable[[], object]) -> float:
        wait()
        begun = time.perf_counter()
        action()
        wait()
        return time.perf_counter() - begun

    def copy() -> None:
        for there, here in zip(host, state.tensors, strict=True):
            there.copy_(here, non_blocking=True)

    def products(number: int) -> None:
        for _ in range(number):
            torch.mm(a, b, out=out)

    def update() -> None:
        for tensor in state.tensors:
            tensor.mul_(1.0)

    stalls: list[float] = []

    def training(number: int, *, saves: bool) -> None:
        stall = time.perf_counter()
        if saves:
            way.begin()
        stall -= time.perf_counter()
        products(number)
        joining = time.perf_counter()
        if saves:
            way.join()
            stalls.append(time.perf_counter() - joining - stall)
        update()

    timed(lambda: products(3))
    # Half a second, or what the copy takes twice.
    seconds = max(0.001 if device == "cpu" else 0.5, 2 * timed(copy))
    number = max(1, round(seconds / max(1e-6, timed(lambda: products(3)) / 3)))
    found: list[Mapping[str, float]] = []
    for _ in range(1 + rounds):  # the first takes memory and starts the process
        row = {"copy": timed(copy), "best": timed(lambda: best_host.copy_(whole, non_blocking=True))}
        row["without"] = timed(lambda: training(number, saves=False))
        row["with"] = timed(lambda: training(number, saves=True))
        while not way.done():
            time.sleep(0.005)
        shutil.rmtree(way.where())
        row |= {"stall": stalls[-1], "lost": row["with"] - row["without"]}
        found.append(row)
    way.checkpointer.close()
    counted = found[1:]
    num_bytes = state_bytes(model)
    return {
        "state_bytes": num_bytes,
        "stand_in_products": number,
        "first": dict(found[0]),
        **{key: spread([row[key] for row in counted]) for key in ("stall", "lost", "without", "copy")},
        "gb_per_second": spread([num_bytes / row["copy"] / 1e9 for row in counted]),
        "copy_over_best": spread([(row["copy"] / num_bytes) / (row["best"] / whole.nbytes) for row in counted]),
        "stall_over_copy": spread([row["stall"] / row["copy"] for row in counted]),
        "lost_over_copy": spread([row["lost"] / row["copy"] for row in counted]),
    }
