"""Settings of the spreading: degrees, recomputation, FSDP policy, precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from rung.config import choice_problem
from rung.layout import Layout

if TYPE_CHECKING:
    import torch

__all__ = ["PRECISIONS", "Dtypes", "ParallelConfig", "dtypes"]

PRECISIONS = ("float64", "float32", "bf16")
RECOMPUTE = ("none", "selective", "full")


@dataclass
class ParallelConfig:
    """Degrees of the six axes and how memory is traded for work. The layout never changes the answer."""

    dp_replicate: int = 1
    """Copies of the sharded model (hybrid sharding): parameters are sharded inside a copy, gradients summed across."""
    dp_shard: int = -1
    """Ranks over which parameters, gradients and optimizer state are sharded (FSDP2). -1 takes what is left."""
    tp: int = 1
    """Tensor parallel degree. This version runs 1."""
    pp: int = 1
    """Pipeline parallel degree. This version runs 1."""
    cp: int = 1
    """Context parallel degree. This version runs 1."""
    ep: int = 1
    """Expert parallel degree. This version runs 1."""
    auto: bool = False
    """Fit data parallelism to the world size that is found: dp_shard takes what is left, dp_replicate shrinks."""
    activation_checkpointing: str = "none"
    """What is recomputed in the backward pass: none; selective (matrix products and attention outputs are kept, the
    rest recomputed); full (only each layer's input is kept)."""
    reshard_after_forward: bool = True
    """Free a layer's gathered parameters after its forward pass (least memory) instead of keeping them for backward."""
    prefetch: int = 1
    """Layers gathered ahead of the one that computes."""
    defer_gradient_sync: bool = False
    """Sum gradients over ranks once a step instead of once a micro-batch: less traffic under accumulation, but every
    rank then holds the whole unsharded gradient."""

    def layout(self, world_size: int) -> Layout:
        """The layout on ``world_size`` ranks. Raises UserError with every problem at once."""
        if self.auto:
            return Layout.auto(
                world_size, dp_replicate=self.dp_replicate, tp=self.tp, pp=self.pp, cp=self.cp, ep=self.ep
            )
        return Layout(self.dp_replicate, self.dp_shard, self.tp, self.pp, self.cp, self.ep, world_size)

    def validate(self) -> list[str]:
        """Problems that need no world size."""
        problems = choice_problem("parallel.activation_checkpointing", self.activation_checkpointing, RECOMPUTE)
        for axis in ("tp", "pp", "cp", "ep"):
            degree = getattr(self, axis)
            if degree > 1:
                problems.append(
                    f"parallel.{axis}={degree}: this version spreads over dp_replicate and dp_shard; legal value: 1"
                )
        if self.prefetch < 0:
            problems.append(f"parallel.prefetch={self.prefetch} must be 0 or more layers")
        return problems


class Dtypes(NamedTuple):
    """``parameters`` are stored and updated, layers see ``compute``, gradients are summed in ``reduce``."""

    parameters: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype


def dtypes(precision: str) -> Dtypes:
    """bf16 means float32 masters, bf16 gather and compute, float32 gradient sums."""
    import torch

    return {
        "float64": Dtypes(torch.float64, torch.float64, torch.float64),
        "float32": Dtypes(torch.float32, torch.float32, torch.float32),
        "bf16": Dtypes(torch.float32, torch.bfloat16, torch.float32),
    }[precision]
