"""What one forward pass reads."""

# B sequences, T tokens

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IGNORED", "Batch"]

IGNORED = -100
"""The label that no loss counts, as torch's ``cross_entropy`` has it."""


@dataclass(frozen=True)
class Batch:
    """A batch of windows. Labels are shifted already, so that any split along T cuts all fields alike.

    All tensors are int64.
    """

    tokens_BT: Tensor
    """Input tokens."""
    labels_BT: Tensor
    """The token that follows each input, or ``IGNORED``."""
    sample_ids_B: Tensor
    """(corpus << 40) | window; names the sample in random draws, whichever rank holds it."""
    positions_BT: Tensor
    """Index in the window."""
    document_ids_BT: Tensor | None = None
    """Index in the stream of the document each input belongs to; None when attention may cross documents."""

    @property
    def num_sequences(self) -> int:
        return self.tokens_BT.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a copy to the GPU need not block."""
        return self._map(lambda tensor: tensor.pin_memory())

    def split(self, num_sequences: int) -> list[Batch]:
        """Micro-batches of at most ``num_sequences`` rows, in order."""
        pieces = {name: tensor.split(num_sequences) for name, tensor in self._tensors().items()}
        return [Batch(**dict(zip(pieces, piece, strict=True))) for piece in zip(*pieces.values(), strict=True)]

    def take(self, positions: Tensor) -> Batch:
        """The same sequences with these indices of T only, int64; what names a sequence stays."""
        cut = {name: tensor.index_select(1, positions) for name, tensor in self._tensors().items() if tensor.dim() > 1}
        return dataclasses.replace(self, **cut)

    def _tensors(self) -> dict[str, Tensor]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(**{name: function(tensor) for name, tensor in self._tensors().items()})
