"""Compiles the kernels that every operation launches, for GPUs that need not be there, and says what they take.

    python tests/kernel_cases/compiling.py --capability 90

Operations run on meta tensors at real sizes while launches are only recorded, and Triton specialises each recorded one
as it would on a GPU: on dtypes, on integers that are 1 or multiples of 16, on 16-byte alignment. Prints JSON, or, with
--table, what a person can read. Must not run in Triton's interpreter, under which nothing can be compiled.

Legend: B batch, T tokens, S keys, D features, H heads, K key/value heads (router: chosen experts), E head size, F inner
size, V vocabulary, X experts, R rows of chosen experts (T · K).
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import rung_kernels
import rung_kernels.random
from rung_kernels import triton_kernels
from rung_kernels.triton_kernels.launch import Launch, launch, recording

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What a program may have of shared memory, by compute capability: CUDA C Programming Guide."""


@dataclass(frozen=True)
class Sizes:
    """Of a model and its batch."""

    tokens: int
    features: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocab: int
    moe_features: int = 2048
    moe_inner: int = 768
    experts: int = 128
    chosen: int = 8


SIZES = {
    "reference": Sizes(8192, 4096, 32, 8, 128, 14336, 128256),
    "narrow": Sizes(4096, 2048, 32, 4, 64, 8192, 32000, 2048, 1408, 64, 6),
    "wide": Sizes(4096, 8192, 64, 8, 128, 28672, 152064, 7168, 2048, 256, 8),
    "odd": Sizes(77, 123, 3, 1, 40, 251, 1003, 123, 77, 7, 3),
    "tiny": Sizes(1, 64, 4, 4, 16, 128, 257, 64, 32, 4, 1),
}


# --- what is recorded


Case = Callable[[Sizes, torch.dtype], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Runs operations forward and backward on meta tensors, as a caller would."""
    CASES[function.__name__] = function
    return function


def meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    """A tensor without memory; a leaf that wants a gradient where that can be."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad and dtype.is_floating_point)


def differentiate(outputs: Tensor | Sequence[Tensor], *inputs: Tensor) -> None:
    """The backward pass from every output that has one."""
    outputs = [outputs] if isinstance(outputs, Tensor) else [o for o in outputs if o.requires_grad]
    grads = [torch.empty_like(o) for o in outputs]
    torch.autograd.grad(outputs, inputs, grads, allow_unused=True, retain_graph=True)


@case
def rms_norm(size: Sizes, dtype: torch.dtype) -> None:
    widths = [(size.tokens, size.features), (size.tokens, size.heads, size.head_size)]
    for shape in widths:
        x, weight = meta(*shape, dtype=dtype), meta(shape[-1], dtype=dtype)
        differentiate(rung_kernels.rms_norm(x, weight, 1e-5), x, weight)


@case
def add_rms_norm(size: Sizes, dtype: torch.dtype) -> None:
    for wide in {dtype, torch.float32}:
        x, residual = meta(size.tokens, size.features, dtype=dtype), meta(size.tokens, size.features, dtype=wide)
        weight = meta(size.features, dtype=dtype)
        normed, stream = rung_kernels.add_rms_norm(x, residual, weight, 1e-5)
        differentiate((normed, stream), x, residual, weight)
        differentiate(rung_kernels.add_rms_norm(x, residual, weight, 1e-5)[0], x, residual, weight)


@case
def rope(size: Sizes, dtype: torch.dtype) -> None:
    heads, kv_heads, width = size.heads, size.kv_heads, size.head_size
    q, k = meta(2, size.tokens, heads, width, dtype=dtype), meta(2, size.tokens, kv_heads, width, dtype=dtype)
    cos, sin = meta(1, size.tokens, width, grad=False), meta(1, size.tokens, width, grad=False)
    differentiate(rung_kernels.rope(q, k, cos, sin), q, k)
    both = meta(2, size.tokens, heads + kv_heads, width, dtype=dtype)  # views of one projection
    differentiate(rung_kernels.rope(*both.split([heads, kv_heads], 2), cos, sin), both)


@case
def swiglu(size: Sizes, dtype: torch.dtype) -> None:
    gate, up = meta(size.tokens, size.inner, dtype=dtype), meta(size.tokens, size.inner, dtype=dtype)
    differentiate(rung_kernels.swiglu(gate, up), gate, up)
    both = meta(size.tokens, 2 * size.inner, dtype=dtype)  # halves of one projection
    differentiate(rung_kernels.swiglu(*both.chunk(2, -1)), both)


@case
def merge_lse(size: Sizes, dtype: torch.dtype) -> None:
    out, new = meta(1, size.tokens, size.heads, size.head_size), meta(1, size.tokens, size.heads, size.head_size)
    lse, new_lse = meta(1, size.tokens, size.heads), meta(1, size.tokens, size.heads)
    differentiate(rung_kernels.merge_lse(out, lse, new.to(dtype), new_lse), out, lse, new, new_lse)
    # As torch's attention has it.
    lse, new_lse = meta(1, size.heads, size.tokens).mT, meta(1, size.heads, size.tokens).mT
    differentiate(rung_kernels.merge_lse(out.to(dtype), lse, new.to(dtype), new_lse), out, lse, new, new_lse)


@case
def cross_entropy(size: Sizes, dtype: torch.dtype) -> None:
    from rung_kernels.cross_entropy import TRITON
    from rung_kernels.reference.cross_entropy import Loss

    labels = meta(size.tokens, dtype=torch.int64)
    for vocab in (size.vocab, size.vocab + 1):  # rows that do not all begin at 16 bytes
        for z_loss, smoothing in ((0.0, 0.0), (1e-4, 0.1)):
            logits = meta(size.tokens, vocab, dtype=dtype)
            options = {"z_loss": z_loss, "label_smoothing": smoothing}
            differentiate(rung_kernels.cross_entropy(logits, labels, **options), logits)
            # A rank of a group that shares the vocabulary.
            loss = Loss(-100, vocab, z_loss, smoothing)
            facts = TRITON.facts(logits.detach(), labels, loss)
            total = meta(grad=False) if smoothing else None
            rows = (meta(size.tokens, grad=False), logits.detach(), labels, facts[0], facts[1])
            TRITON.gradient(*rows, loss, total, torch.empty_like(logits))


@case
def linear_cross_entropy(size: Sizes, dtype: torch.dtype) -> None:
    from rung_kernels.linear_cross_entropy import linear_cross_entropy as lose

    labels = meta(size.tokens, dtype=torch.int64)
    for reduction in ("sum", "none"):
        for smoothing in (0.0, 0.1):
            x, weight = meta(size.tokens, size.features, dtype=dtype), meta(size.vocab, size.features, dtype=dtype)
            losses = lose(x, weight, labels, z_loss=smoothing, label_smoothing=smoothing, reduction=reduction)
            differentiate(losses, x, weight)


@case
def random(size: Sizes, dtype: torch.dtype) -> None:
    key, table = (meta(dtype=torch.int64), 7), meta(3, 2048, dtype=torch.int64)
    ids, positions = meta(4, dtype=torch.int64), meta(4, size.tokens, dtype=torch.int64)
    for start in (0, 1, 3, 2**40):
        rung_kernels.random.philox_words(key, start, size.tokens, device="meta")
        for number in {dtype, torch.float64}:
            rung_kernels.random.normals(key, start, size.tokens * size.features, table, number)
    for features, first, p in ((size.features, 0, 0.1), (1, 4, 0.5), (size.features, size.features & -4, 1.0)):
        rung_kernels.random.dropout_mask(key, ids, positions.mT.contiguous().mT, features, first, p)


@case
def router(size: Sizes, dtype: torch.dtype) -> None:
    for score, bias, normalize in (("softmax", None, True), ("softmax", None, False), ("sigmoid", meta, True)):
        logits = meta(size.tokens, size.experts, dtype=dtype)
        addend = None if bias is None else bias(size.experts, grad=False)
        outputs = rung_kernels.router(logits, size.chosen, bias=addend, score=score, normalize=normalize, scale=2.5)
        differentiate(outputs, logits)
        differentiate(outputs[0], logits)


@case
def permute(size: Sizes, dtype: torch.dtype) -> None:
    for integer in (torch.int64, torch.int32):
        x = meta(size.tokens, size.moe_features, dtype=dtype)
        experts = meta(size.tokens, size.chosen, dtype=integer)
        y, _, row_of = rung_kernels.permute(x, experts, size.experts)
        differentiate(y, x)
        y = meta(size.tokens * size.chosen, size.moe_features, dtype=dtype)
        for weights in (meta(size.tokens, size.chosen), meta(size.tokens, size.chosen, dtype=dtype)):
            differentiate(rung_kernels.unpermute(y, row_of, weights), y, weights)
        differentiate(rung_kernels.unpermute(y, row_of), y)


@case
def grouped_mm(size: Sizes, dtype: torch.dtype) -> None:
    from rung_kernels.grouped_mm import grouped_mm as multiply
    from rung_kernels.triton_kernels import grouped_mm as kernels

    rows, groups = size.tokens * size.chosen, size.experts
    for inner, columns in ((size.moe_features, 2 * size.moe_inner), (size.moe_inner, size.moe_features)):
        for integer in (torch.int32, torch.int64):
            x, offsets = meta(rows, inner, dtype=dtype), meta(groups, dtype=integer)
            for weights in (meta(groups, inner, columns, dtype=dtype), meta(groups, columns, inner, dtype=dtype).mT):
                y = multiply(x, weights, offsets)
                differentiate(y, x, weights)
                # What is done after torch's own product.
                kernels.clear_rows(y.detach(), offsets)
                kernels.clear_weights(torch.empty_like(weights), offsets, rows)


@case
def optimizer(size: Sizes, dtype: torch.dtype) -> None:
    from rung_kernels.optimizer import adamw_step, spam_step
    from rung_kernels.reference.optimizer import Rounding

    def tensors(kind: torch.dtype) -> list[Tensor]:
        return [meta(size.features, size.features, dtype=kind, grad=False), meta(size.features, dtype=kind, grad=False)]

    per_tensor = meta(2, dtype=torch.float64, grad=False)
    factors, counts = meta(12, dtype=torch.float64, grad=False), meta(2, dtype=torch.int64)
    stable = {"levels": per_tensor, "maxima": per_tensor, "gains": per_tensor, "counts": counts}
    rounding = Rounding(meta(2, 2, dtype=torch.int64), meta(2, dtype=torch.int64), meta(dtype=torch.int64))
    copied = {"copies": tensors(torch.bfloat16), "rounding": rounding}
    states = [
        [tensors(kind) for kind in kinds] for kinds in ([dtype] * 4, [torch.float32, dtype] + [torch.float32] * 2)
    ]
    for state in states:
        for options in ({}, stable, copied, stable | copied):
            adamw_step(*state, factors, **options)
        for options in ({}, {"counts": counts}, {"counts": counts} | copied):
            spam_step(*state, factors, **options)


def record(name: str, sizes: Sizes, dtype: torch.dtype) -> list[Launch]:
    """The launches of a case."""
    with recording() as launches:
        (CASES | {"spills": spills})[name](sizes, dtype)
    return launches


def run_kernels_on_meta_tensors() -> None:
    """Every operation takes its kernel wherever dtypes allow, whatever the device."""
    from rung_kernels import dispatch

    def uses_triton(op: str, *tensors: Tensor | None) -> bool:
        return all(t is None or t.dtype in dispatch._KERNEL_DTYPES for t in tensors)

    choices = {"uses_triton": uses_triton, "runs_on": lambda op, device: True}
    for name, module in list(sys.modules.items()):
        for choice, always in choices.items():
            if name.startswith("rung_kernels.") and hasattr(module, choice):
                setattr(module, choice, always)


# --- which kernels there are


def all_kernels() -> set[str]:
    """Names of the package's kernels: compiled functions that no other compiled function calls."""
    functions: dict[str, JITFunction[Any]] = {}
    for info in pkgutil.iter_modules(triton_kernels.__path__):
        module = importlib.import_module(f"{triton_kernels.__name__}.{info.name}")
        functions |= {name: f for name, f in vars(module).items() if isinstance(f, JITFunction)}
    called: set[str] = set()
    for function in functions.values():
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
        called |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - {function.fn.__name__}
    return set(functions) - called


# --- what is compiled


class NoGPU:
    """Stands where Triton asks for a device: compiles for one of this kind, launches nothing."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Compiled(NamedTuple):
    """What a kernel takes of a GPU, or why it does not compile."""

    kernel: str
    case: str
    sizes: str
    dtype: str
    capability: int
    num_warps: int
    num_stages: int
    constants: dict[str, Any]
    registers: int = 0
    local_bytes: int = 0
    """Of a thread: spilled registers, and arrays that are indexed by what only runs know. Both live in slow memory."""
    shared_bytes: int = 0
    widest_bytes: int = 0
    """Of the accesses to global memory."""
    products: str = ""
    """Instructions of the tensor cores."""
    error: str = ""

    def complaint(self) -> str:
        """What is wrong with it; nothing: empty."""
        limit = SHARED_BYTES[self.capability]
        if self.error:
            return self.error
        if self.local_bytes:
            return f"{self.local_bytes} bytes of local memory a thread, with {self.registers} registers"
        if self.shared_bytes > limit:
            return f"{self.shared_bytes} bytes of shared memory; a program may have {limit}"
        return ""


def compiled(launches: Sequence[Launch], capability: int, **where: str) -> Iterator[Compiled]:
    """Each launch that differs, once."""
    for entry in launches:
        options = {k: v for k, v in entry._asdict().items() if k not in ("kernel", "grid", "arguments")}
        about: dict[str, Any] = {
            "kernel": entry.kernel.fn.__name__,
            "capability": capability,
            "num_warps": entry.num_warps,
            "num_stages": entry.num_stages,
            "constants": {k: str(v) for k, v in entry.arguments.items() if k.isupper()},
            **where,
        }
        try:
            binary = entry.kernel.warmup(grid=entry.grid, **entry.arguments, **options)
        except Exception as error:
            yield Compiled(**about, error=f"{type(error).__name__}: {error}")
            continue
        if binary.hash not in _seen[capability]:
            _seen[capability].add(binary.hash)
            yield Compiled(**about, **usage(binary))


_seen: dict[int, set[str]] = {capability: set() for capability in SHARED_BYTES}


def usage(binary: Any) -> dict[str, Any]:
    """Registers and memory, as the assembler wrote them into the binary, and some of what stands in the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Spilled registers are counted with the stack: LOCAL is what a kernel of an older ABI would have.
    registers, stack, local = (
        max(int(n) for n in re.findall(rf"\b{word}:(\d+)", text)) for word in ("REG", "STACK", "LOCAL")
    )
    ptx = binary.asm["ptx"]
    widths = re.findall(r"\b(?:ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[bufs](\d+)", ptx)
    widest = max((int(n or 1) * int(bits) // 8 for n, bits in widths), default=0)
    products = sorted(set(re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|cp\.async\.bulk\.tensor)\b", ptx)))
    return {
        "registers": registers,
        "local_bytes": stack + local,
        "shared_bytes": binary.metadata.shared,
        "widest_bytes": widest,
        "products": " ".join(products),
    }


# --- a kernel that must be complained about


@triton.jit
def _spills(x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    values = tl.load(x + at)
    tl.debug_barrier()
    tl.store(x + at, values)


def spills(size: Sizes, dtype: torch.dtype) -> None:
    """A case of itself: 256 numbers a thread, all alive at once, beside their addresses."""
    launch(_spills, (1,), x=meta(size.tokens, dtype=dtype), SIZE=8192, num_warps=1)


def show(rows: Sequence[Compiled]) -> None:
    """A line each, for a person."""
    print(f"{'kernel':40} {'sizes':9} {'dtype':8} sm  warps stages  regs local shared bytes  products  constants")
    for row in rows:
        constants = " ".join(f"{k}={v}" for k, v in row.constants.items())
        print(
            f"{row.kernel:40} {row.sizes:9} {row.dtype:8} {row.capability:3} {row.num_warps:4} {row.num_stages:6} "
            f"{row.registers:6} {row.local_bytes:5} {row.shared_bytes:6} {row.widest_bytes:5}  {row.products:9} "
            f"{constants} {row.complaint().strip().splitlines()[-1:] or ''}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", choices=sorted(SHARED_BYTES), default=[90])
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=["reference"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "spills"], default=list(CASES))
    parser.add_argument("--one", action="store_true", help="of each kernel, only a case's first launch")
    parser.add_argument("--table", action="store_true", help="lines for a person")
    args = parser.parse_args()
    kernels = all_kernels()
    run_kernels_on_meta_tensors()
    rows: list[Compiled] = []
    for capability in args.capability:
        triton.runtime.driver.set_active(NoGPU(capability))
        for name in args.cases:
            for size in args.sizes:
                for dtype in args.dtypes:
                    launches = record(name, SIZES[size], getattr(torch, dtype))
                    if args.one:
                        launches = list({entry.kernel: entry for entry in reversed(launches)}.values())
                    rows += compiled(launches, capability, case=name, sizes=size, dtype=dtype)
    if args.table:
        show(rows)
    else:
        complaints = [row._asdict() | {"complaint": row.complaint()} for row in rows]
        print(json.dumps({"kernels": sorted(kernels), "compiled": complaints}))


if __name__ == "__main__":
    main()
