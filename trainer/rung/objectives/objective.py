"""What every objective offers the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Objective"]


class Objective(Protocol):
    """Named components, each a sum and a count. Minimised is Σ over components of weight · sum / count.

    The loop adds counts over the step's whole batch before the first forward pass, so counts never depend on the model;
    gradients of the sums are then only ever added, which is why the layout cannot change them.
    """

    @property
    def weights(self) -> Mapping[str, float]:
        """Component -> its weight."""

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """Component -> 0-dim int64 count in this micro-batch."""

    def sums(self, outputs: Tensor, batch: Any) -> dict[str, Tensor]:
        """Component -> 0-dim differentiable sum over this micro-batch, in promote(dtype, float32)."""
