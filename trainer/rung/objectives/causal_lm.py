"""Next-token prediction.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

from torch import Tensor

import rung_kernels

__all__ = ["IGNORED_LABEL", "CausalLM"]

IGNORED_LABEL = -100


class _Labelled(Protocol):
    labels_BT: Tensor


class CausalLM:
    """Cross-entropy of the next token, in nats. Labels arrive shifted; -100 is not counted.

    Minimised is Σ over components of weight · sum / count, with sums and counts taken over the whole step.
    """

    def __init__(self, cross_entropy: Callable[[Tensor, Tensor, int], Tensor] = rung_kernels.cross_entropy) -> None:
        """``cross_entropy``: (logits_NV, labels_N, ignored label) -> losses_N, for logits however they are spread."""
        self._cross_entropy = cross_entropy

    name: ClassVar[str] = "causal_lm"
    weights: ClassVar[dict[str, float]] = {"loss": 1.0}

    def counts(self, batch: _Labelled) -> dict[str, Tensor]:
        """{"loss": number of labels that count}, 0-dim int64; needs no model, so it can be agreed on beforehand."""
        return {"loss": (batch.labels_BT != IGNORED_LABEL).sum()}

    def sums(self, outputs: Tensor, batch: _Labelled) -> dict[str, Tensor]:
        """{"loss": Σ -log p(label)}, 0-dim in promote(dtype, float32), from outputs = logits_BTV."""
        losses = self._cross_entropy(outputs.flatten(0, 1), batch.labels_BT.flatten(), IGNORED_LABEL)
        return {"loss": losses.sum()}
