"""Next-token prediction.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

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

    name: ClassVar[str] = "causal_lm"
    weights: ClassVar[dict[str, float]] = {"loss": 1.0}

    def counts(self, batch: _Labelled) -> dict[str, Tensor]:
        """{"loss": number of labels that count}, 0-dim int64; needs no model, so it can be agreed on beforehand."""
        return {"loss": (batch.labels_BT != IGNORED_LABEL).sum()}

    def sums(self, outputs: Tensor, batch: _Labelled) -> dict[str, Tensor]:
        """{"loss": Σ -log p(label)}, 0-dim in promote(dtype, float32), from outputs = logits_BTV."""
        losses = rung_kernels.cross_entropy(outputs.flatten(0, 1), batch.labels_BT.flatten(), IGNORED_LABEL)
        return {"loss": losses.sum()}
