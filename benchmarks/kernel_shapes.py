"""What a problem of kernels.py is, and the sizes of a model.

Legend: T tokens, D features, H heads, K key/value heads, E head size, F inner size, V vocabulary, X experts, C chosen
experts of a token.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ELSEWHERE = ("Liger", "CCE", "flash-attn")
"""Contenders that are not torch."""
DESTRUCTIVE = ("Liger",)
"""Contenders that write into their arguments: they get their own."""


@dataclass(frozen=True)
class Least:
    """The least that a pass moves or multiplies, and the share of the device's limit that is to be reached."""

    goal: float | None
    bytes: float = 0.0
    flops: float = 0.0


@dataclass
class Problem:
    """An operation at one shape. Passes: forward, backward, both (one after the other), or step (in place)."""

    op: str
    shape: str
    make: Callable[[int], Sequence[Any]]
    """Arguments for so many tokens; tensors that require a gradient are differentiated by."""
    plain: Callable[..., Any]
    """Torch's arithmetic, which must take float64."""
    rung: Callable[..., Any]
    passes: dict[str, Least]
    tokens: int
    checked_tokens: int
    """Of the small case on which everyone is held against ``plain`` in float64."""
    others: dict[str, Callable[..., Any] | None] = field(default_factory=dict)
    """None: not installed."""
    formula: Callable[..., Any] | None = None
    """What torch.compile is given, where that is not ``plain``."""


@dataclass(frozen=True)
class Sizes:
    """Of a model of 8e9 parameters, and of a mixture's layer beside it."""

    tokens: int = 8192
    features: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    inner: int = 14336
    vocab: int = 128256
    moe_features: int = 2048
    moe_inner: int = 768
    experts: int = 128
    chosen: int = 8
    checked: int = 256


TOY = Sizes(12, 32, 4, 2, 16, 48, 40, 32, 16, 8, 2, 6)


def elsewhere(module: str, name: str) -> Any:
    """Something of another package; None where it is not installed, or cannot be used here."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # whatever a package does on import where it does not fit the machine
        return None


def having(function: Any, use: Callable[..., Any]) -> Callable[..., Any] | None:
    """``use`` where the function it needs is there."""
    return None if function is None else use


class Maker:
    """Random tensors on a device."""

    def __init__(self, device: torch.device, size: Sizes, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device, self.size, self.dtype = device, size, dtype

    def randn(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = True, scale: float = 1.0) -> Tensor:
        """In the model's dtype if in no other."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype).mul_(scale).requires_grad_(grad)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, device=self.device)
