"""Launching: every kernel of this package starts here, so that launches can be counted and recorded."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Launch", "counts", "launch", "num_multiprocessors", "recording"]

counts: Counter[str] = Counter()
"""Launches so far, by the name of the kernel."""


class Launch(NamedTuple):
    """A launch that was recorded and not carried out."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By parameter name: tensors, numbers, None and compile-time constants."""
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, launches are only noted down: what would run, with which arguments. Tensors may be on the meta device."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int = 4, num_stages: int = 3, **arguments: Any) -> None:
    """Run ``kernel`` on ``grid``; an empty grid runs nothing. ``arguments``: all of its parameters, by name, and
    options of Triton's compiler."""
    arguments.setdefault("enable_fp_fusion", True)  # said, because Triton's default is about to change
    if 0 in grid:
        return
    counts[kernel.__name__] += 1
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, num_warps, num_stages))
        return
    with _device_of(arguments):
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


def _device_of(arguments: dict[str, Any]) -> Any:
    """Triton launches on the current device, which need not be where the tensors are."""
    for value in arguments.values():
        if isinstance(value, Tensor):
            return torch.cuda.device(value.device) if value.device.type == "cuda" else nullcontext()
    return nullcontext()


def num_multiprocessors(device: torch.device) -> int:
    """Of the GPU; a few in the interpreter, where each program costs time; an H200's for tensors without a device."""
    if device.type == "cuda":
        return _num_multiprocessors(device)
    return 132 if device.type == "meta" else 2


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
