"""The logical digest knows every bit by its place in the tensor, and nothing of how the tensor was cut."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
from checkpoint.writing import tiling, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from rung.checkpoint.digest import box_lanes, hex_digest

SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple) | st.sampled_from([(), (1,), (3, 40_000), (70_000,)])
WIDTHS = st.sampled_from([1, 2, 4, 8])
SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def random_words(shape, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (*shape, width), np.uint8).view(f"<u{width}")[..., 0]


def lanes(values):
    return box_lanes(np.ascontiguousarray(values).tobytes(), values.itemsize, values.shape, whole(values.shape))


def digest(values):
    return hex_digest(lanes(values))


@few
@given(SHAPES, WIDTHS, SEEDS)
def test_every_tiling_gives_the_same(shape, width, seed):
    values = random_words(shape, width, seed)
    total = [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # sums wrap, on purpose
        for box in tiling(shape, random.Random(seed)):
            part = np.ascontiguousarray(values[box.slices()]).tobytes()
            for lane, number in enumerate(box_lanes(part, width, shape, box)):
                total[lane] += number
        assert hex_digest((total[0], total[1])) == digest(values)


def test_against_its_definition():
    """Sum of word times the product of one weight per dim, modulo 2**64, in Python's own numbers."""
    mask = 2**64 - 1

    def weight(dim, lane, index):
        x = index * 0xD1342543DE82EF95 + (2 * dim + lane + 1) * 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31 | 1

    values = random_words((3, 2, 5), 8, 1)
    words = values.view("<u4")  # two to a number, along the last dim
    for lane in (0, 1):
        total = 0
        for (i, j, k), word in np.ndenumerate(words):
            total += int(word) * weight(0, lane, i) * weight(1, lane, j) * weight(2, lane, k)
        assert lanes(values)[lane] == total & mask


@few
@given(SHAPES.filter(lambda shape: 0 not in shape), WIDTHS, SEEDS)
def test_one_bit(shape, width, seed):
    values = random_words(shape, width, seed)
    changed = values.copy()
    rng = random.Random(seed)
    changed.reshape(-1).view(np.uint8)[rng.randrange(values.nbytes)] ^= 1 << rng.randrange(8)
    assert all(a != b for a, b in zip(lanes(values), lanes(changed), strict=True))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (3, 5, 6)])
def test_two_places_exchanged(shape, width):
    rng = random.Random(0)
    for seed in range(50):
        values = random_words(shape, width, seed)
        dim = rng.randrange(len(shape))
        one, other = rng.sample(range(shape[dim]), 2)
        order = list(range(shape[dim]))
        order[one], order[other] = other, one
        slabs = np.take(values, order, axis=dim)
        flat = values.reshape(-1).copy()
        one, other = rng.sample(range(flat.size), 2)
        flat[[one, other]] = flat[[other, one]]
        for changed in (slabs, flat.reshape(shape)):
            if (changed != values).any():
                assert digest(changed) != digest(values)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_signs(dtype):
    """The sign is the highest bit of a word: where it moves, only the lower bits of weights tell."""
    values = np.random.default_rng(0).standard_normal((40, 50)).astype(dtype)
    rng = random.Random(0)
    for number in (2, 2, 2, 3, 4, 16, 1000) * 30:
        changed = values.copy()
        places = rng.sample(range(values.size), number)
        changed.reshape(-1)[places] *= -1
        assert digest(changed) != digest(values), places
    rows = values.copy()
    rows[[3, 17]] *= -1
    assert digest(rows) != digest(values)


def test_dims_and_order_matter():
    values = random_words((4, 6), 4, 0)
    seen = {digest(values), digest(values.T), digest(values.reshape(6, 4)), digest(values.reshape(-1)), digest(-values)}
    assert len(seen) == 5


def test_nothing_is_zero():
    assert lanes(np.zeros((0, 3), np.float32)) == (0, 0)
    assert digest(np.zeros(3, np.float32)) == "0" * 32
