"""``rung doctor``: what this machine has, what is missing for training, and the fix of each; ``--layout``: what a
layout would hold and send."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rung.errors import UserError

__all__ = ["Finding", "main"]

GIB = 2**30
LOOP_TEST_SECONDS = 120
EXTRAS = {
    "hf": ("transformers", "checking exports against Hugging Face's own models"),
    "megatron": ("megatron.core", "reading and writing Megatron's formats with its own code"),
    "deepspeed": ("deepspeed", "DeepSpeed's checkpoints"),
    "flash": ("flash_attn", "flash-attn's attention kernels"),
}

# Two of these form a process group and sum their ranks; a file is the meeting point, so no port can be taken.
LOOP_TEST = """
import sys
import torch
import torch.distributed as dist
backend, rank, meeting_point = sys.argv[1], int(sys.argv[2]), sys.argv[3]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
dist.init_process_group(backend, init_method=f"file://{meeting_point}", rank=rank, world_size=2)
total = torch.full((1024,), rank + 1.0, device=device)
dist.all_reduce(total)
assert bool((total == 3.0).all()), total
dist.destroy_process_group()
"""


class Finding(NamedTuple):
    """One line of the report. `fix` says what to do about a warning or a failure."""

    status: Literal["ok", "warn", "fail"]
    what: str
    found: str
    fix: str = ""


def main(argv: Sequence[str]) -> int:
    """Check this machine for training: versions, devices, compilers, folders, processes that talk to each other.

    With --layout, check a layout instead: who is where, bytes on every rank, messages of a step, idle time.
    """
    parser = argparse.ArgumentParser(prog="rung doctor", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="leave out the test of two processes (some seconds)")
    parser.add_argument("--layout", action="store_true", help="report on a layout; starts nothing, needs no GPU")
    parser.add_argument("--world-size", type=int, help="ranks of --layout (default: the product of its degrees)")
    parser.add_argument("--ranks-per-node", type=int, help="ranks of --layout on each node (default 8)")
    parser.add_argument("--json", action="store_true", help="print the report of --layout as JSON, in bytes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of --layout: what `rung train` is given")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.layout:
        if arguments.quick:
            raise UserError("--quick is about this machine, --layout about a layout; leave one of them out")
        from rung.cli.doctor_layout import show_layout

        per_node = 8 if arguments.ranks_per_node is None else arguments.ranks_per_node
        return show_layout(arguments.overrides, arguments.world_size, per_node, arguments.json)
    named = {"--world-size": arguments.world_size, "--ranks-per-node": arguments.ranks_per_node}
    stray = [*(name for name, value in named.items() if value is not None), *arguments.overrides]
    if stray := [*stray, *["--json"] * arguments.json]:
        raise UserError(f"{' '.join(stray)} without --layout; `rung doctor` alone looks at this machine")

    checks: list[Callable[[], Iterator[Finding]]] = [_python, _packages, _devices, _processor, _compiler, _folders]
    if not arguments.quick:
        checks.append(_processes)
    checks.append(_extras)
    findings = [finding for check in checks for finding in check()]
    _show(findings)
    return 2 if any(finding.status == "fail" for finding in findings) else 0


def _show(findings: Sequence[Finding]) -> None:
    """A table for a person, one plain line for each finding where the output is not a terminal."""
    if not sys.stdout.isatty():
        for status, what, found, fix in findings:
            print(f"{status:4} {what}: {found}" + (f" -> {fix}" if fix else ""))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for status, what, found, fix in findings:
        details = Text(found)
        if fix:
            details.append(f"\n-> {fix}", style=styles[status])
        table.add_row(Text(status, style=styles[status]), what, details)
    Console().print(table)


def _python() -> Iterator[Finding]:
    yield Finding("ok", "Python", f"{platform.python_version()} at {sys.executable}")


def _packages() -> Iterator[Finding]:
    """Every package that Rung needs, held against the range that its own metadata asks for."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("rung") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("warn", "Rung", "imported, but not installed", "pip install --editable . in the checkout")
        return
    import rung

    yield Finding("ok", "Rung", f"{rung.__version__} at {Path(rung.__file__).parent}")
    good = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("fail", requirement.name, "not installed", f"pip install '{requirement}'")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            good.append(f"{requirement.name} {version}")
        else:
            yield Finding(
                "fail", requirement.name, f"{version}, not {requirement.specifier}", f"pip install '{requirement}'"
            )
    if good:
        yield Finding("ok", "packages", ", ".join(good))


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("fail", "torch", f"cannot be imported: {error}", "pip install 'torch>=2.11,<2.14'")
        return
    has_driver = shutil.which("nvidia-smi") is not None
    if not torch.cuda.is_available():
        built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        if has_driver:
            fix = "install a torch whose CUDA this driver supports (nvidia-smi shows the newest it supports)"
            yield Finding("warn", "GPU", f"nvidia-smi is here, but torch sees no GPU; it is {built_for}", fix)
        else:
            yield Finding("ok", "GPU", f"none; torch is {built_for}; training runs on the CPU with gloo")
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    found = f"{torch.version.cuda}, NCCL {nccl or 'missing'}"
    if nccl is None and torch.cuda.device_count() > 1:
        yield Finding("fail", "CUDA", found, "install a torch that is built with NCCL")
    else:
        yield Finding("ok", "CUDA", found)
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        if gpu.major < 8:
            yield Finding("warn", f"GPU {index}", found, "bf16 needs 8.0 or newer; use precision=float32")
        else:
            yield Finding("ok", f"GPU {index}", found)
    if importlib.util.find_spec("triton") is None:
        yield Finding("warn", "Triton", "not installed", "pip install triton; until then compile=true fails")
    else:
        yield Finding("ok", "Triton", importlib.metadata.version("triton"))


def _processor() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding(
        "ok", "cores", f"{cores}, OMP_NUM_THREADS {threads or 'not set (rung launch sets it for each process)'}"
    )

    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory_bytes = min(memory_bytes, int(text))
    low = memory_bytes < 4 * GIB
    fix = "train small models only; every process needs about 1 GiB before the model" if low else ""
    yield Finding("warn" if low else "ok", "memory", f"{memory_bytes / GIB:.1f} GiB", fix)

    shared = Path("/dev/shm")
    if shared.is_dir():
        shared_bytes = shutil.disk_usage(shared).total
        low = shared_bytes < GIB
        fix = "in a container start it with --ipc=host or --shm-size=16g" if low else ""
        yield Finding("warn" if low else "ok", "shared memory", f"{shared_bytes / GIB:.1f} GiB in {shared}", fix)


def _compiler() -> Iterator[Finding]:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "c++"))), None)
    if compiler is None:
        yield Finding("warn", "C++ compiler", "none", "install g++ (Debian: apt-get install g++), or use compile=false")
    else:
        yield Finding("ok", "C++ compiler", compiler)
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        fix = "install Python's headers (Debian: apt-get install python3-dev), or use compile=false"
        yield Finding("warn", "Python headers", f"no {header}", fix)


def _folders() -> Iterator[Finding]:
    from rung.data.stdlib import cache_folder

    for what, folder, key in (
        ("cache", cache_folder(), "set RUNG_CACHE to another folder"),
        ("this folder", Path.cwd(), "start in another folder, or set run.dir"),
    ):
        existing = folder
        while not existing.exists():
            existing = existing.parent
        free_bytes = shutil.disk_usage(existing).free
        found = f"{folder}, {free_bytes / GIB:.0f} GiB free"
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            yield Finding("fail", what, f"{found}, not writable", key)
        elif free_bytes < 5 * GIB:
            yield Finding("warn", what, found, f"make room, or {key}")
        else:
            yield Finding("ok", what, found)


def _processes() -> Iterator[Finding]:
    """Two processes sum a tensor: over gloo everywhere, over NCCL where there are two GPUs."""
    try:
        import torch
    except ImportError:
        return  # said already
    fix = "name the network that processes shall use: export GLOO_SOCKET_IFNAME=lo (ip -brief address lists them)"
    yield _loop_test("gloo", fix)
    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        yield _loop_test("nccl", "see what NCCL says with NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 rules out peer access")


def _loop_test(backend: str, fix: str) -> Finding:
    what = f"two processes, {backend}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", LOOP_TEST, backend]
        workers = [
            subprocess.Popen(
                [*command, str(rank), f"{folder}/meeting_point"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            errors = [worker.communicate(timeout=LOOP_TEST_SECONDS)[1] for worker in workers]
        except subprocess.TimeoutExpired:
            return Finding("fail", what, f"no answer within {LOOP_TEST_SECONDS} seconds", fix)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    failed = next((rank for rank, worker in enumerate(workers) if worker.returncode), None)
    if failed is None:
        return Finding("ok", what, "their sums agree")
    last_line = errors[failed].strip().splitlines()[-1:] or ["no message"]
    return Finding("fail", what, f"process {failed} failed: {last_line[0]}", fix)


def _extras() -> Iterator[Finding]:
    for extra, (module, purpose) in EXTRAS.items():
        try:
            spec = importlib.util.find_spec(module)
        except ImportError:  # the parent package is missing
            spec = None
        if spec is None:
            yield Finding("ok", f"extra {extra}", f"not installed ({purpose}: pip install 'rung[{extra}]')")
        else:
            yield Finding("ok", f"extra {extra}", f"{module} is installed")
