"""One GPU: the time of every kernel, forward and backward, beside torch, torch.compile and other libraries.

    python benchmarks/kernels.py

Each operation at the shapes of a model of 8e9 parameters in bf16. Everyone is held against float64 on a smaller case
first; then all take turns in one run. What a pass moves or multiplies at the least, over its time, is held against what
this GPU was measured to do in the same run: copy a large tensor, multiply large matrices. Needs torch and triton, no
package of this repository (PYTHONPATH=kernels); Liger, cut-cross-entropy and flash-attn take part where installed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import kernel_figure
import torch
import torch._functorch.config as functorch
from kernel_problems import OPS, WITHOUT_KERNEL, problems
from kernel_shapes import DESTRUCTIVE, ELSEWHERE, TOY, Least, Maker, Problem, Sizes
from kernel_timing import FLUSH_BYTES, Clock, Work, limits, quartiles
from measuring import RESULTS, commit, machine, print_table, write
from tables import kernels as markdown
from torch import Tensor
from torch.utils import _pytree

from rung_kernels.dispatch import use_backend

LARGEST_ERROR = 0.02  # relative to float64, in the norm; bf16 rounds by 0.004 at most
PACKAGES = ("triton", "liger_kernel", "cut_cross_entropy", "flash_attn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"some of {','.join(OPS)}", type=lambda text: text.split(","), default=OPS)
    parser.add_argument("--seconds", type=float, default=440.0, help="no operation begins later than this")
    parser.add_argument("--each", type=float, default=1.5, help="seconds that a pass of all contenders is repeated for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", "--tiny", action="store_true", help="toy shapes on the CPU: shows only that it works")
    parser.add_argument("--output", help="JSON file; default: in benchmarks/results/, with --toy the terminal")
    args = parser.parse_args()
    if unknown := set(args.only) - set(OPS):
        parser.error(f"--only {','.join(sorted(unknown))}: not among {','.join(OPS)}")
    if not args.toy and not torch.cuda.is_available():
        print(
            "kernels.py times a CUDA GPU, and torch finds none; --toy shows on the CPU that it works", file=sys.stderr
        )
        sys.exit(2)
    if not args.toy and not args.output:
        args.output = RESULTS / "kernels.json"
    with use_backend("triton"):
        result = measure(args)
    write(result, args.output)
    print(markdown(result))
    print("\nMEASURED_FASTER = frozenset({" + ", ".join(f'"{op}"' for op in result["faster"]) + "})")
    if not args.toy:
        kernel_figure.draw(result)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All problems, one after the other."""
    begun = time.monotonic()
    torch.manual_seed(args.seed)
    functorch.donated_buffer = False  # backward passes are repeated
    clock = Clock(torch.device("cpu" if args.toy else "cuda"))
    roofline = limits(clock, args.toy)
    rows: list[dict[str, Any]] = []
    for problem in problems(Maker(clock.device, TOY if args.toy else Sizes()), args.only):
        row: dict[str, Any] = {"op": problem.op, "shape": problem.shape}
        if time.monotonic() - begun > args.seconds:
            row["skipped"] = f"not begun after {args.seconds:.0f} s"
        else:
            row |= contest(problem, clock, args)
        rows.append(row)
        report(row, roofline)
    again = limits(clock, args.toy)
    roofline = {name: max(value, again[name]) for name, value in roofline.items()}  # of a GPU that is not too warm
    for row in rows:
        judge(row, roofline)
    return {
        "benchmark": "kernels",
        "tiny": args.toy,
        "commit": commit(),
        "machine": machine(),
        "settings": {"seed": args.seed, "precision": "bf16", "flush_bytes": FLUSH_BYTES, "seconds_each": args.each},
        "versions": {name: version(name) for name in PACKAGES},
        "seconds": round(time.monotonic() - begun, 1),
        "roofline": roofline,
        "problems": rows,
        "faster": faster(rows),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- one problem


def contenders(problem: Problem, toy: bool) -> dict[str, Callable[..., Any]]:
    """By name, Rung first; without its kernels where they cannot run."""
    compiled = functools.partial(torch.compile, dynamic=False, backend="aot_eager" if toy else "inductor")
    everyone: dict[str, Callable[..., Any] | None] = {
        "rung": problem.rung if not toy or os.environ.get("TRITON_INTERPRET") == "1" else None,
        "eager": problem.plain,
        "compiled": compiled(problem.formula or problem.plain),
        **problem.others,
    }
    return {name: function for name, function in everyone.items() if function is not None}


def contest(problem: Problem, clock: Clock, args: argparse.Namespace) -> dict[str, Any]:
    """Errors of all, then times of those who are right."""
    everyone = contenders(problem, args.toy)
    small = problem.make(problem.checked_tokens)
    truth = results(problem, problem.plain, doubled(small))
    found: dict[str, dict[str, Any]] = {name: {} for name in everyone}
    for name, function in everyone.items():
        try:
            found[name]["error"] = float(f"{error(results(problem, function, copied(small)), truth):.2g}")
            if not found[name]["error"] <= LARGEST_ERROR:
                found[name]["failed"] = f"wrong: relative error {found[name]['error']}"
        except Exception as problem_with_it:
            found[name]["failed"] = said(problem_with_it)
    del small, truth
    arguments = problem.make(problem.tokens)
    own = {name: copied(arguments) for name in DESTRUCTIVE if name in everyone}
    passes: dict[str, Any] = {}
    for name, least in problem.passes.items():
        works: dict[str, Work] = {}
        for who in [who for who in everyone if "failed" not in found[who]]:
            try:
                works[who] = work(name, everyone[who], own.get(who, arguments))
                works[who]()
            except Exception as problem_with_it:
                works.pop(who, None)
                found[who]["failed"] = said(problem_with_it)
        times = clock.interleaved(works, args.each, 2 if args.toy else 50)
        passes[name] = {
            "goal": least.goal,
            "bytes": least.bytes,
            "flops": least.flops,
            "seconds": {who: quartiles(values) for who, values in times.items()},
        }
        del works
    del arguments, own
    gc.collect()
    torch._dynamo.reset()
    if clock.on_gpu:
        torch.cuda.empty_cache()
    return {"contenders": found, "passes": passes}


def said(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".strip().splitlines()[0][:200]


def copied(arguments: Sequence[Any]) -> Sequence[Any]:
    """Tensors of their own, each requiring a gradient if it did."""
    return _pytree.tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), arguments)


def doubled(arguments: Sequence[Any]) -> Sequence[Any]:
    """The same numbers in float64."""

    def double(t: Tensor) -> Tensor:
        return (t.detach().double() if t.is_floating_point() else t.clone()).requires_grad_(t.requires_grad)

    return _pytree.tree_map_only(Tensor, double, arguments)


def differentiable(outputs: Any) -> list[Tensor]:
    return [t for t in _pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]


def leaves(arguments: Sequence[Any]) -> list[Tensor]:
    return [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]


def results(problem: Problem, function: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
    """Outputs and gradients, or, of a step, what it wrote into its arguments."""
    outputs = function(*arguments)
    if "step" in problem.passes:
        outputs = arguments[:4]
    found = [t.detach().clone() for t in _pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
    if inputs := leaves(arguments):
        through = differentiable(outputs)
        generator = torch.Generator().manual_seed(1)  # everyone's gradients arrive the same
        grads = [torch.randn(t.shape, generator=generator).to(t) for t in through]
        found += torch.autograd.grad(through, inputs, grads)
    return found


def error(mine: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative difference, in the norm; of integers, the share that differs."""
    worst = 0.0
    for a, b in zip(mine, truth, strict=True):
        if b.is_floating_point():
            worst = max(worst, float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)))
        else:
            worst = max(worst, float((a != b).double().mean()))
    return worst


def work(name: str, function: Callable[..., Any], arguments: Sequence[Any]) -> Work:
    """What is timed of a pass."""
    inputs = leaves(arguments)
    if name in ("forward", "step"):
        return lambda: function(*arguments)
    if name == "both":

        def both() -> object:
            through = differentiable(function(*arguments))
            return torch.autograd.grad(through, inputs, [torch.ones_like(t) for t in through])

        return both
    through = differentiable(function(*arguments))
    grads = [torch.randn_like(t) for t in through]
    return lambda: torch.autograd.grad(through, inputs, grads, retain_graph=True)


# --- what it means


def judge(row: dict[str, Any], roofline: Mapping[str, float]) -> None:
    """Add rates, shares of the roofline, and the best of the others to every pass."""
    for part in row.get("passes", {}).values():
        least = Least(part["goal"], part["bytes"], part["flops"])
        limit = roofline["product_flops_per_second" if least.flops else "copy_bytes_per_second"]
        part["rate"] = {who: (least.flops or least.bytes) / s["median"] for who, s in part["seconds"].items()}
        part["share"] = {who: rate / limit for who, rate in part["rate"].items()}
        others = {who: s["median"] for who, s in part["seconds"].items() if who != "rung"}
        part["best_other"] = min(others, key=lambda who: others[who]) if others else None
        if "rung" in part["seconds"] and part["best_other"]:
            part["best_other_over_rung"] = others[part["best_other"]] / part["seconds"]["rung"]["median"]


def faster(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Operations that, over all passes together, beat every contender of torch at every shape, beyond the spread."""
    verdicts: dict[str, list[bool]] = {}
    for row in rows:
        if "passes" not in row:
            verdicts.setdefault(row["op"], []).append(False)  # not known
            continue
        parts = [part["seconds"] for part in row["passes"].values()]
        whole = [who for who in parts[0] if all(who in part for part in parts)]
        high, low = ({who: sum(part[who][key] for part in parts) for who in whole} for key in ("high", "low"))
        torchs = [low[who] for who in whole if who != "rung" and who not in ELSEWHERE]
        verdicts.setdefault(row["op"], []).append(bool("rung" in high and torchs and high["rung"] < min(torchs)))
    return sorted(op for op, won in verdicts.items() if all(won) and op not in WITHOUT_KERNEL)


def report(row: Mapping[str, Any], roofline: Mapping[str, float]) -> None:
    """Lines for a person who waits."""
    print(f"\n{row['op']}, {row['shape']}{': ' + row['skipped'] if 'skipped' in row else ''}", flush=True)
    lines = []
    for name, part in row.get("passes", {}).items():
        amount, key = (part["flops"], "product_flops") if part["flops"] else (part["bytes"], "copy_bytes")
        for who, seconds in part["seconds"].items():
            share = amount / seconds["median"] / roofline[f"{key}_per_second"]
            times = [f"{1e6 * seconds[at]:.1f}" for at in ("median", "low", "high")]
            lines.append((name, who, *times, f"{share:.1%}", f"{row['contenders'][who]['error']:.1e}"))
    if lines:
        print_table(("", "", "µs", "quartiles", "", "of the limit", "error"), lines)
    for who, found in row.get("contenders", {}).items():
        if "failed" in found:
            print(f"{who}: {found['failed']}")


if __name__ == "__main__":
    main()
