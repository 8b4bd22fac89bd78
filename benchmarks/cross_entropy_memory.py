"""Memory and time of a cross-entropy's forward and backward pass, beside its logits: Rung's and torch's.

    python benchmarks/cross_entropy_memory.py

Logits in bf16, as a bf16 run has them. The peak is the allocator's own count, between the call and the end of backward,
of everything that is alive beside the logits and labels: on CPU from the profiler's allocation events (which see what
kernels allocate inside), on CUDA from the caching allocator. The gradient, as large as the logits, is part of it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measuring import RESULTS, commit, machine, print_table, spread, write
from torch import Tensor

import rung_kernels


def ours(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    return rung_kernels.cross_entropy(logits_NV, labels_N).sum() / labels_N.numel()


def in_float32(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV.float(), labels_N)


def in_bf16(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV, labels_N)


WAYS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "rung": ("rung_kernels.cross_entropy(logits)", ours),
    "torch_float32": ("F.cross_entropy(logits.float())", in_float32),
    "torch_bf16": ("F.cross_entropy(logits), rounded to bf16 inside", in_bf16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="rows of the logits")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a toy size that shows only that the script works")
    parser.add_argument("--output", help="JSON file; default: a file in benchmarks/results/, with --tiny the terminal")
    args = parser.parse_args()
    if args.tiny:
        args.tokens, args.vocab, args.rounds = 2048, 4096, 1
    elif not args.output:
        args.output = RESULTS / f"cross_entropy_memory_{args.device}.json"
    result = measure(args)
    full_copy = result["bytes_of_full_float32_copy"]
    print(f"logits {result['bytes_of_logits'] / 2**20:.0f} MiB, a full float32 copy {full_copy / 2**20:.0f} MiB")
    print_table(
        ("", "peak MiB beside logits", "/ logits", "ms", "min", "max", "relative error of the gradient"),
        [
            [
                row["call"],
                f"{row['peak_bytes'] / 2**20:.0f}",
                f"{row['peak_bytes'] / result['bytes_of_logits']:.2f}",
                *(f"{1000 * row['seconds'][key]:.0f}" for key in ("median", "min", "max")),
                f"{row['gradient_error']:.1e}",
            ]
            for row in result["ways"].values()
        ],
    )
    write(result, args.output)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Peaks, errors against float64, and times of all ways in turn."""
    torch.manual_seed(args.seed)
    logits_NV = torch.randn(args.tokens, args.vocab, device=args.device).mul_(3).bfloat16().requires_grad_()
    labels_N = torch.randint(args.vocab, (args.tokens,), device=args.device)
    ways: dict[str, dict[str, Any]] = {}
    rows = slice(0, 64)  # float64 of all would not fit where the rest does
    reference = logits_NV.detach()[rows].double().requires_grad_()
    (F.cross_entropy(reference, labels_N[rows], reduction="sum") / args.tokens).backward()
    assert reference.grad is not None
    exact_NV = reference.grad
    for name, (call, way) in WAYS.items():
        backward(way, logits_NV, labels_N)  # first-use allocations of kernels are not counted
        assert logits_NV.grad is not None
        error = (logits_NV.grad[rows].double() - exact_NV).norm() / exact_NV.norm()
        peak = peak_bytes(lambda way=way: backward(way, logits_NV, labels_N), logits_NV)
        ways[name] = {"call": call, "peak_bytes": peak, "gradient_error": float(f"{error.item():.3g}")}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(args.rounds):
        for name, (_, way) in WAYS.items():
            synchronize(args.device)
            started = time.perf_counter()
            backward(way, logits_NV, labels_N)
            synchronize(args.device)
            seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        ways[name]["seconds"] = spread(values)
    return {
        "benchmark": "cross_entropy_memory",
        "tiny": args.tiny,
        "commit": commit(),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "settings": {"tokens": args.tokens, "vocab_size": args.vocab, "logits": "bf16", "seed": args.seed},
        "device": args.device,
        "bytes_of_logits": 2 * args.tokens * args.vocab,
        "bytes_of_full_float32_copy": 4 * args.tokens * args.vocab,
        "ways": ways,
    }


def backward(way: Callable[[Tensor, Tensor], Tensor], logits_NV: Tensor, labels_N: Tensor) -> None:
    """One forward and one backward pass; leaves the gradient."""
    logits_NV.grad = None
    way(logits_NV, labels_N).backward()


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(action: Callable[[], None], logits_NV: Tensor) -> int:
    """The most bytes that were alive at once during ``action`` beyond those before it."""
    logits_NV.grad = None
    if logits_NV.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


if __name__ == "__main__":
    main()
