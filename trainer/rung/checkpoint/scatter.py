"""A run of a box's elements, as it comes from a file, put where it belongs. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from rung.layout import Box

__all__ = ["pieces", "scatter"]


def scatter(items: Any, first: int, sizes: Sequence[int], wanted: Box, destination: Any) -> None:
    """Copy what of a run of a box's elements lies in ``wanted``.

    items: [N], the elements with flat indices ``first`` to ``first + N`` of a box of ``sizes``, row by row.
    wanted: a part of that box, counted from its corner. destination: of shape ``wanted.sizes``; written.
    Both are NumPy arrays, or both tensors of torch, which may be on different devices.
    """
    for start, piece in pieces(first, len(items), sizes):
        part = piece.intersect(wanted)
        if part.numel:
            values = items[start : start + piece.numel].reshape(piece.sizes)
            destination[part.within(wanted).slices()] = values[part.within(piece).slices()]


def pieces(first: int, count: int, sizes: Sequence[int]) -> Iterator[tuple[int, Box]]:
    """A run of elements of a box of ``sizes`` as smaller boxes: (place in the run, box), one after another.

    There are at most two for each dim, less one: the end of a slab, whole slabs, the beginning of a slab, where the
    first and the last are runs of one slab's elements again.
    """
    if not 0 <= first <= first + count <= prod(sizes):
        raise ValueError(f"elements {first} to {first + count} are not all in a box of {tuple(sizes)}")
    if not count:
        return
    if not sizes:
        yield 0, Box((), ())
        return
    slab = prod(sizes[1:])
    done = 0
    while done < count:
        index, inside = divmod(first + done, slab)
        whole = (count - done) // slab
        if not inside and whole:
            yield done, Box((index, *(0 for _ in sizes[1:])), (whole, *sizes[1:]))
            done += whole * slab
        else:
            length = min(slab - inside, count - done)
            for start, piece in pieces(inside, length, sizes[1:]):
                yield done + start, Box((index, *piece.offsets), (1, *piece.sizes))
            done += length
