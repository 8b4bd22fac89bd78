"""Boxes: rectangular parts of a tensor, and how splitting a dim cuts it. Imports nothing but the standard library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

__all__ = ["Box"]

Run = tuple[int, int]
"""Start and length of consecutive indices along one dim."""


@dataclass(frozen=True)
class Box:
    """The elements of a tensor with offsets[d] <= index[d] < offsets[d] + sizes[d] in every dim d. May be empty."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes) or any(number < 0 for number in self.offsets + self.sizes):
            raise ValueError(f"a box needs as many offsets as sizes, none negative: {self.offsets}, {self.sizes}")

    @property
    def numel(self) -> int:
        """Number of elements (1 for the box of a tensor without dims)."""
        return prod(self.sizes)

    def slices(self) -> tuple[slice, ...]:
        """What to index the tensor with to get the box."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True))

    def intersect(self, other: Box) -> Box:
        """The elements in both boxes of one tensor; empty where there are none."""
        starts = tuple(map(max, self.offsets, other.offsets))
        stops = [min(a.stop, b.stop) for a, b in zip(self.slices(), other.slices(), strict=True)]
        return Box(starts, tuple(max(stop - start, 0) for start, stop in zip(starts, stops, strict=True)))

    def within(self, outer: Box) -> Box:
        """The same elements, counted from the corner of ``outer``, which must contain them."""
        offsets = tuple(mine - its for mine, its in zip(self.offsets, outer.offsets, strict=True))
        return Box(offsets, self.sizes)


def split(runs: Sequence[Run], parts: int, index: int, pieces: int = 1) -> list[Run]:
    """Part ``index`` of ``parts`` of the indices in ``runs`` by torch.chunk's rule: the last may be short or empty.

    With ``pieces``, the indices are that many pieces one after another (a fused projection) and each of them is split.
    """
    if pieces > 1:
        return [run for piece in range(pieces) for run in split(split(runs, pieces, piece), parts, index)]
    total = sum(length for _, length in runs)
    step = -(-total // parts)
    first, last = min(index * step, total), min((index + 1) * step, total)
    part, position = [], 0
    for start, length in runs:
        begin, end = max(first - position, 0), min(last - position, length)
        if begin < end:
            part.append((start + begin, end - begin))
        position += length
    return part
