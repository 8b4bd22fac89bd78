"""Boxes: rectangular parts of a tensor, as arithmetic. Imports nothing but the standard library."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

__all__ = ["Box"]


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
