"""Which code runs an operation: its Triton kernel or its torch reference."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = [
    "BACKENDS",
    "HAS_TRITON",
    "IS_INTERPRETED",
    "MEASURED_FASTER",
    "backend",
    "runs_on",
    "set_backend",
    "use_backend",
    "uses_triton",
]

BACKENDS = ("auto", "triton", "torch")

MEASURED_FASTER: frozenset[str] = frozenset()
"""Operations whose kernel was measured faster than the best of torch: what ``auto`` runs on CUDA. An operation enters
with a result in benchmarks/results; none was measured yet."""

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_backend = "auto"
# Constants, which torch.compile reads through. Triton decides once, too, when a kernel is defined.
HAS_TRITON = importlib.util.find_spec("triton") is not None
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def backend() -> str:
    """What ``set_backend`` chose last; auto at first."""
    return _backend


def set_backend(name: str) -> None:
    """Choose for this process. auto: kernels where ``MEASURED_FASTER``; triton: wherever there is one; torch: none.

    Kernels run on CUDA, and on the CPU under Triton's interpreter (TRITON_INTERPRET=1 from the start), where
    auto means triton. float64 and other devices always run the reference. Not to be called between the forward and the
    backward pass of anything compiled. Raises ValueError for another name, and for triton where there is no Triton.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"kernels={name!r} is none of {', '.join(BACKENDS)}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("kernels='triton' needs the package triton; install it, or choose 'auto' or 'torch'")
    _backend = name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """``set_backend`` for a while."""
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def uses_triton(op: str, *tensors: Tensor | None) -> bool:
    """Whether ``op`` on these floating-point tensors (None: not given) is to run its kernel."""
    given = [tensor for tensor in tensors if tensor is not None]
    return bool(given) and all(tensor.dtype in _KERNEL_DTYPES and runs_on(op, tensor.device) for tensor in given)


def runs_on(op: str, device: torch.device) -> bool:
    """Whether ``op`` is to run its kernel on a device, whatever the dtypes."""
    if _backend == "torch" or not HAS_TRITON:
        return False
    if device.type == "cuda":
        return _backend == "triton" or op in MEASURED_FASTER
    return device.type == "cpu" and IS_INTERPRETED
