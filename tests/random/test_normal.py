"""Normals: right in distribution, the same bits everywhere, and independent of how a tensor is cut."""

import random

import numpy as np
import pytest
import torch
from scipy import stats

from rung.layout import Box
from rung.random import (
    name_key,
    normal_from_bits_numpy,
    normal_from_bits_torch,
    normals_box,
    normals_numpy,
    philox_numpy,
)
from rung.random._make_normal_table import NUM_SEGMENTS, make_table
from rung.random.normal import _LONGEST_RUN, _TABLE

KEY = name_key(0, "weight")


def quantiles(words):
    """What the normals of odd words (negative) ought to be."""
    return stats.norm.ppf(words / 2**33)


def test_the_table_is_what_its_script_writes():
    assert _TABLE.shape == (3, NUM_SEGMENTS)
    segments = [0, 1, 63, *range(64, NUM_SEGMENTS, 61), NUM_SEGMENTS - 1]
    np.testing.assert_array_equal(make_table(segments), _TABLE[:, segments])


@pytest.mark.parametrize("first", [0, 2**20, 2**28, 2**31 - 2**17, 2**32 - 2**18])
def test_values_are_quantiles(first):
    words = np.arange(first + 1, first + 2**18, 2)
    assert np.abs(normal_from_bits_numpy(words) - quantiles(words)).max() < 3e-8


def test_values_are_quantiles_everywhere():
    words = np.random.default_rng(0).integers(0, 1 << 31, 1 << 18) * 2 + 1
    values = normal_from_bits_numpy(words)
    assert np.abs(values - quantiles(words)).max() < 3e-8
    np.testing.assert_array_equal(normal_from_bits_numpy(words - 1), -values)


def test_tails():
    extremes = normal_from_bits_numpy(np.array([0, 1, 2**32 - 1, 2**32 - 2]))
    np.testing.assert_array_equal(extremes[:2], [-extremes[1], extremes[1]])
    assert 6.33 < extremes[0] < 6.34 and -1e-8 < extremes[2] < 0 < extremes[3] < 1e-8
    values = normals_numpy(KEY, 0, 1 << 20)
    for threshold in (2.0, 3.0, 4.0):
        expected = 2 * stats.norm.sf(threshold) * values.size
        assert abs((np.abs(values) > threshold).sum() - expected) < 4 * expected**0.5


def test_values_are_normal():
    values = normals_numpy(KEY, 12345, 1 << 20)
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(values.mean()) < 4e-3 and abs(values.std() - 1) < 3e-3
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4e-3
    assert abs(np.corrcoef(values, normals_numpy(name_key(1, "weight"), 12345, 1 << 20))[0, 1]) < 4e-3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_same_bits_in_torch_and_compiled(device):
    words = np.random.default_rng(1).integers(0, 1 << 32, (3, 1 << 16))
    words[0, :4] = 0, 1, 2**32 - 2, 2**32 - 1
    values, bits = normal_from_bits_numpy(words), torch.from_numpy(words).to(device)
    np.testing.assert_array_equal(values, normal_from_bits_torch(bits).cpu().numpy())
    np.testing.assert_array_equal(values, torch.compile(normal_from_bits_torch)(bits).cpu().numpy())
    np.testing.assert_array_equal(
        values * 2.0**40, np.rint(values * 2.0**40)
    )  # exact multiples: one rounding to any dtype


@pytest.mark.parametrize("start", [0, 1, 2**34 - 3, 2**40 + 7])
def test_normal_i_is_word_i_mod_4_of_counter_i_div_4(start):
    index = np.arange(start, start + 50)
    words = np.stack(philox_numpy(index // 4 % 2**32, index // 4 >> 32, 0, 0, KEY))
    expected = normal_from_bits_numpy(words[index % 4, np.arange(50)])
    np.testing.assert_array_equal(normals_numpy(KEY, start, 50), expected)


def test_long_streams_are_one_stream():
    count = 2 * _LONGEST_RUN + 5
    whole = normals_numpy(KEY, 3, count)
    assert whole.shape == (count,) and normals_numpy(KEY, 3, 0).shape == (0,)
    np.testing.assert_array_equal(whole[_LONGEST_RUN - 3 :], normals_numpy(KEY, _LONGEST_RUN, count - _LONGEST_RUN + 3))


def random_cuts(rng, shape):
    """Boxes that tile the shape: each is cut along a random dim until it is let be."""
    boxes, done = [Box((0,) * len(shape), shape)], []
    while boxes:
        box = boxes.pop()
        if not shape or rng.random() < 0.6:
            done.append(box)
            continue
        dim = rng.randrange(len(shape))
        size = rng.randint(0, box.sizes[dim])
        for offset, length in ((0, size), (size, box.sizes[dim] - size)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dim], sizes[dim] = offsets[dim] + offset, length
            boxes.append(Box(tuple(offsets), tuple(sizes)))
    return done


@pytest.mark.parametrize(
    "seed", [*range(20), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(20, 1000))]
)
def test_bits_do_not_depend_on_how_a_tensor_is_cut(seed):
    rng = random.Random(seed)
    shape = tuple(rng.choice([1, 2, 3, 5, 8, 13, 32]) for _ in range(rng.randint(0, 3)))
    whole = normals_numpy(KEY, 0, int(np.prod(shape, dtype=int))).reshape(shape)
    assembled = np.full(shape, np.nan)
    for box in random_cuts(rng, shape):
        part = normals_box(KEY, shape, box)
        assert part.shape == box.sizes
        assembled[box.slices()] = part
    np.testing.assert_array_equal(assembled, whole)


def test_boxes_of_large_tensors():
    shape = (1 << 20, 1 << 16)  # 2^36 elements: counters need their second word, and a row is more than a block
    box = Box(((1 << 20) - 2, 5), (2, (1 << 16) - 6))
    rows = [normals_numpy(KEY, row * shape[1] + 5, box.sizes[1]) for row in range(shape[0] - 2, shape[0])]
    np.testing.assert_array_equal(normals_box(KEY, shape, box), np.stack(rows))
