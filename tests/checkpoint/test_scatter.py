"""Runs of a box's elements, cut anywhere, arrive where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rung.checkpoint.scatter import pieces, scatter
from rung.layout import Box


@st.composite
def cases(draw):
    """Sizes of a box, a run of its elements, and a box in it."""
    sizes = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    count = int(np.prod(sizes, dtype=int))
    first = draw(st.integers(0, count))
    last = draw(st.integers(first, count))
    spans = [sorted((draw(st.integers(0, size)), draw(st.integers(0, size)))) for size in sizes]
    wanted = Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans))
    return sizes, first, last, wanted


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(cases(), st.booleans())
def test_against_masks(case, with_torch):
    sizes, first, last, wanted = case
    numbers = np.arange(1, np.prod(sizes, dtype=int) + 1)
    expected = np.where((numbers > first) & (numbers <= last), numbers, 0).reshape(sizes)[wanted.slices()]
    items, destination = numbers[first:last], np.zeros(wanted.sizes, int)
    if with_torch:
        scatter(torch.from_numpy(items), first, sizes, wanted, torch.from_numpy(destination))
    else:
        scatter(items, first, sizes, wanted, destination)
    np.testing.assert_array_equal(destination, expected)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(cases())
def test_pieces_follow_one_another(case):
    sizes, first, last, _ = case
    numbers = np.arange(np.prod(sizes, dtype=int)).reshape(sizes)
    found, end = [], 0
    for start, piece in pieces(first, last - first, sizes):
        assert start == end and piece.numel
        end = start + piece.numel
        found += numbers[piece.slices()].reshape(-1).tolist()
    assert found == list(range(first, last))
    assert len(list(pieces(first, last - first, sizes))) <= max(2 * len(sizes) - 1, 1)


def test_destination_may_be_a_view():
    whole = np.zeros((4, 6), int)
    scatter(np.arange(6), 0, (2, 3), Box((0, 1), (2, 2)), whole[1:3, 4:6])
    assert whole.tolist() == [[0] * 6, [0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 4, 5], [0] * 6]


def test_a_run_outside_is_refused():
    with pytest.raises(ValueError, match="5 to 7"):
        scatter(np.arange(2), 5, (2, 3), Box((0, 0), (2, 3)), np.zeros((2, 3)))
