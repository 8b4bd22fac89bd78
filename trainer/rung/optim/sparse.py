"""Sparse momentum: moments of a random subset of a logical tensor's elements, another one in each epoch.

The subset is a function of (seed, name, epoch, index in the logical tensor): nothing of it is stored, and every
sharding finds the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt, prod
from typing import Literal

import torch
from torch import Tensor

from rung.layout import Box, LogicalTensor, Piece
from rung.optim.base import Packed
from rung.random import Key, philox_torch

__all__ = ["MASK_TAG", "PackedMoment", "Subset", "kept_elements", "room"]

MASK_TAG = 0x5350414D
"""Last counter word of these draws, which no other draws have: "SPAM"."""


def kept_elements(
    key: Key, epoch: Tensor, density: float, logical: LogicalTensor, local_shape: Sequence[int]
) -> Tensor:
    """Which of its local elements this rank updates in an epoch: bool, shaped like the local tensor, on epoch's device.

    Element i of the logical tensor, row-major, is kept where word i % 4 of the Philox counter (low and high 32 bits of
    i // 4, epoch, ``MASK_TAG``) under ``key`` is below round(density · 2^32). ``epoch`` is int64 []. Padding is in no
    subset.
    """
    kept = torch.zeros(local_shape, dtype=torch.bool, device=epoch.device)
    threshold = round(density * 2**32)
    most = 1 << (18 if epoch.device.type == "cpu" else 22)
    by_length: dict[int, list[tuple[Piece, Tensor]]] = {}
    for piece in logical.pieces():
        runs, length = _runs(logical.shape, piece.box, epoch.device)
        by_length.setdefault(length, []).append((piece, runs))
    for length, pieces in by_length.items():
        starts = torch.cat([runs for _, runs in pieces])
        found = torch.empty(len(starts), length, dtype=torch.bool, device=epoch.device)
        columns = max(1, min(length, most))
        rows = max(1, most // columns)
        for top in range(0, len(starts), rows):
            for left in range(0, length, columns):
                part = found[top : top + rows, left : left + columns]
                part.copy_(_words(key, epoch, starts[top : top + rows] + left, part.shape[1]) < threshold)
        for (piece, _), part in zip(pieces, found.split([len(runs) for _, runs in pieces]), strict=True):
            kept[piece.local] = part.view(piece.box.sizes)
    return kept


def _runs(shape: tuple[int, ...], box: Box, device: torch.device) -> tuple[Tensor, int]:
    """A box as runs of consecutive elements of the logical tensor: where each starts, int64 [runs], and its length."""
    first_run_dim = max((dim for dim in range(len(shape)) if box.sizes[dim] != shape[dim]), default=0)
    starts = torch.zeros(1, dtype=torch.int64, device=device)
    for dim in range(len(shape)):
        size = box.sizes[dim] if dim < first_run_dim else 1
        indices = torch.arange(box.offsets[dim], box.offsets[dim] + size, device=device)
        starts = (starts[:, None] + indices * prod(shape[dim + 1 :])).view(-1)
    return starts, prod(box.sizes[first_run_dim:])


def _words(key: Key, epoch: Tensor, starts: Tensor, length: int) -> Tensor:
    """Words of elements starts[r] to starts[r] + length: int64 [rows, length]. Elements share counters by four."""
    first = starts >> 2
    counters = first[:, None] + torch.arange((length + 6) // 4, device=starts.device)
    words = philox_torch(counters, counters >> 32, epoch, MASK_TAG, *key)
    in_order = torch.stack(words, -1).view(len(starts), -1)
    return in_order.gather(1, (starts & 3)[:, None] + torch.arange(length, device=starts.device))


def room(number: int, density: float) -> int:
    """Elements to store of a subset of ``number``: ten standard deviations more than expected."""
    expected = number * density
    return min(number, int(expected) + 10 * (isqrt(int(expected * (1 - density))) + 1) + 17)


class Subset:
    """Both moments of the subset that some consecutive local elements, ``first`` to ``last``, have in an epoch.

    Storage has ``room`` for more elements than expected, so that its size does not depend on the draw and nobody has to
    ask the device how many there are. Room that is left holds zeros.
    """

    def __init__(self, first: int, last: int, density: float, dtype: torch.dtype, device: torch.device) -> None:
        self.first, self.last, self.density = first, last, density
        self.exp_avg = torch.zeros(room(last - first, density), dtype=dtype, device=device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)

    def places(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (int64 [room]) into the elements, and which of them are some (bool [room]).

        ``kept`` is of all local elements, flat. Room that is left points where the first index does.
        """
        size = len(self.exp_avg)
        found = torch.nonzero_static(kept[self.first : self.last], size=size, fill_value=-1).view(-1)
        some = found >= 0
        return torch.where(some, found, found[:1].clamp(min=0)), some

    def zero_(self) -> None:
        """Forget the moments."""
        self.exp_avg.zero_()
        self.exp_avg_sq.zero_()


class PackedMoment(Packed):
    """One moment of a parameter as a checkpoint sees it."""

    def __init__(
        self,
        name: Literal["exp_avg", "exp_avg_sq"],
        subsets: list[Subset],
        logical: LogicalTensor,
        local: Tensor,
        key: Key,
        steps: Tensor,
        reset_interval: int,
    ) -> None:
        super().__init__(local.shape, torch.promote_types(local.dtype, torch.float32), local.device)
        moments = [getattr(subset, name) for subset in subsets]
        self._subsets, self._moments, self._logical, self._key = subsets, moments, logical, key
        self._steps, self._reset_interval = steps, reset_interval

    @property
    def nbytes(self) -> int:
        return sum(moment.nbytes for moment in self._moments)

    def _kept(self) -> Tensor:
        """Which of the local elements have moments: bool, flat."""
        if not self._subsets:
            return torch.zeros(0, dtype=torch.bool, device=self.device)
        epoch, density = self._steps // self._reset_interval, self._subsets[0].density
        return kept_elements(self._key, epoch, density, self._logical, self.shape).view(-1)

    @torch.no_grad()
    def dense(self) -> Tensor:
        result = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        flat, kept = result.view(-1), self._kept()
        for subset, moment in zip(self._subsets, self._moments, strict=True):
            places, some = subset.places(kept)
            # Several places may be the first: all of them must say what is there.
            values = torch.where(some, moment, torch.where(some[:1], moment[:1], 0.0))
            flat[subset.first : subset.last].index_copy_(0, places, values)
        return result

    @torch.no_grad()
    def store(self, dense: Tensor) -> None:
        flat, kept = dense.to(self.device).reshape(-1), self._kept()
        for subset, moment in zip(self._subsets, self._moments, strict=True):
            places, some = subset.places(kept)
            moment.copy_(torch.where(some, flat[subset.first : subset.last][places], 0.0))

    def zero_(self) -> None:
        for moment in self._moments:
            moment.zero_()
