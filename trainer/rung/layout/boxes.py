"""Boxes: rectangular parts of a tensor, and how splitting a dim cuts it. Imports nothing but the standard library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

__all__ = ["Box", "chunk", "Section"]


class Run(NamedTuple):
    """Consecutive indices along one dim, as a rank holds them."""

    start: int
    length: int
    owned: bool = True
    """Whether the rank is the first of those that hold them as copies along the axes that split the dim."""


class Section(NamedTuple):
    """Consecutive indices along one dim that are split over an axis by themselves."""

    size: int
    """Number of indices."""
    replicas: int = 1
    """Neighbours on the axis that hold one part together; a divisor of the axis' size. The first of them owns it."""


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


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of a part by torch.chunk's rule, which is DTensor's: the last parts may be short or empty."""
    step = -(-size // parts)
    first = min(index * step, size)
    return first, min(step, size - first)


def split(runs: Sequence[Run], parts: int, index: int) -> list[Run]:
    """Part ``index`` of ``parts`` of the indices in ``runs`` by torch.chunk's rule: the last may be short or empty."""
    first, size = chunk(sum(run.length for run in runs), parts, index)
    return _cut(runs, first, first + size)


def split_sections(runs: Sequence[Run], sections: Sequence[Section], size: int, place: int) -> list[Run]:
    """What of ``runs`` the rank at ``place`` on an axis of ``size`` gets: its part of each section, in their order.

    The sections lie one after another from index 0 on and hold all of ``runs``.
    """
    found, start = [], 0
    for section in sections:
        inside = _within(runs, start, start + section.size)
        part = split(inside, size // section.replicas, place // section.replicas)
        first = place % section.replicas == 0
        found += [run._replace(owned=run.owned and first) for run in part]
        start += section.size
    return found


def _cut(runs: Sequence[Run], first: int, last: int) -> list[Run]:
    """The runs' indices number ``first`` to ``last``, counted along the runs."""
    part, position = [], 0
    for run in runs:
        begin, end = max(first - position, 0), min(last - position, run.length)
        if begin < end:
            part.append(run._replace(start=run.start + begin, length=end - begin))
        position += run.length
    return part


def _within(runs: Sequence[Run], start: int, stop: int) -> list[Run]:
    """The indices in ``runs`` from ``start`` up to ``stop``."""
    clipped = [(run, max(run.start, start), min(run.start + run.length, stop)) for run in runs]
    return [run._replace(start=begin, length=end - begin) for run, begin, end in clipped if begin < end]
