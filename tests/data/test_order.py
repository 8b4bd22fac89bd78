"""The data order: bijections, blends exact on every prefix, random access, no dependence on the length of the run."""

import numpy as np
import pytest

from rung.data.order import (
    MAX_PERIOD,
    WINDOW_BITS,
    SampleOrder,
    _feistel,
    _round_keys,
    blend_table,
    integer_weights,
    permuted,
)
from rung.errors import UserError

KEYS = [(1, 2), (0xFFFFFFFF, 0), (123456789, 987654321)]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 2**16 - 1, 2**16, 2**16 + 1, 100_003, 2**17])
def test_permutation_is_a_bijection(size, key):
    assert np.array_equal(np.sort(permuted(np.arange(size), size, key)), np.arange(size))


@pytest.mark.parametrize("bits", range(2, 14))
def test_feistel_network_is_a_bijection_of_its_domain(bits):
    values = np.arange(2**bits, dtype=np.uint64)
    assert np.array_equal(np.sort(_feistel(values, bits, _round_keys((3, 4)))), values)


@pytest.mark.parametrize("size", [2**29 + 1, 10**9, 2**40])
def test_large_permutations_stay_inside_and_distinct(size):
    for first in (0, size - 2**17):
        out = permuted(np.arange(first, first + 2**17), size, KEYS[2])
        assert out.min() >= 0
        assert out.max() < size
        assert len(np.unique(out)) == len(out)


def chi_square(counts: np.ndarray) -> float:
    """Standard normal deviate of a uniformity chi-square (Wilson–Hilferty)."""
    freedom = counts.size - 1
    expected = counts.sum() / counts.size
    ratio = float(((counts - expected) ** 2 / expected).sum()) / freedom
    return (ratio ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


@pytest.mark.parametrize("size", [60_000, 2**16, 10**6 + 3, 2**29 + 1])
def test_neighbours_land_independently(size):
    """Adjacent places over a 32 × 32 grid of where they land; and how far place i lands from i."""
    out = permuted(np.arange(min(size, 2**18)), size, KEYS[0])
    cells = out * 32 // size
    pairs = np.bincount(cells[:-1] * 32 + cells[1:], minlength=1024)
    assert abs(chi_square(pairs)) < 4.5
    drift = np.bincount(((out - np.arange(len(out))) % size) * 256 // size, minlength=256)
    assert abs(chi_square(drift)) < 4.5


@pytest.mark.parametrize("size", [5, 2**16])
def test_permutations_of_other_keys_are_unrelated(size):
    """Over many keys, place 0 lands everywhere alike."""
    landed = np.array([permuted(np.zeros(1, np.int64), size, (key, 7))[0] for key in range(2000)])
    assert abs(chi_square(np.bincount(landed * 5 // size, minlength=5))) < 4.5


def prefix_errors(weights) -> np.ndarray:
    """|copies of corpus i in the first n slots - n·w_i/D| · D, exact integers [D + 1, K]."""
    corpora, ranks = blend_table(weights)
    period = sum(weights)
    assert len(corpora) == period
    chosen = np.zeros((period + 1, len(weights)), np.int64)
    chosen[np.arange(1, period + 1), corpora] = 1
    copies = chosen.cumsum(axis=0)
    assert np.array_equal(ranks, copies[np.arange(period), corpora])
    return np.abs(copies * period - np.outer(np.arange(period + 1), weights))


def test_blends_are_exact_over_every_prefix():
    """The error stays within Tijdeman's bound 1 - 1/(2K - 2), compared in integers."""
    draw = np.random.default_rng(0)
    cases = [[1, 1], [1, 99], [7, 3], [1] * 64, [1, 1, 1, 97], [50, 30, 15, 4, 1]]
    cases += [draw.integers(1, 40, size=draw.integers(2, 9)).tolist() for _ in range(200)]
    for weights in cases:
        worst = int(prefix_errors(weights).max())
        assert worst * (2 * len(weights) - 2) <= (2 * len(weights) - 3) * sum(weights), weights


def test_a_full_period_blends_exactly():
    weights = integer_weights([*np.random.default_rng(1).random(64) + 0.01])
    assert sum(weights) == MAX_PERIOD
    assert prefix_errors(weights).max() < MAX_PERIOD


def test_blend_error_is_below_one_across_periods():
    order = SampleOrder([50, 1000, 7], [0.5, 0.3, 0.2], 0, ["a", "b", "c"])
    corpora = order.sample_ids(0, 5000) >> WINDOW_BITS
    for corpus, share in enumerate([0.5, 0.3, 0.2]):
        taken = np.cumsum(corpora == corpus)
        assert np.abs(taken - share * np.arange(1, 5001)).max() < 1


@pytest.mark.parametrize(
    ("weights", "integers"),
    [
        ([0.7, 0.3], (7, 3)),
        ([1], (1,)),
        ([2, 2, 4], (1, 1, 2)),
        ([1 / 3, 1 / 3, 1 / 3], (1, 1, 1)),
        ([1e6, 3e6], (1, 3)),
    ],
)
def test_weights_become_the_integers_they_say(weights, integers):
    assert integer_weights(weights) == integers


def test_awkward_weights_are_rounded_to_the_finest_period():
    weights = [3347941, 150861, 12]
    with pytest.raises(UserError, match="weight 12 of corpus 2 is below 1/65536"):
        integer_weights(weights)
    rounded = integer_weights(weights[:2])
    assert sum(rounded) <= MAX_PERIOD
    assert abs(rounded[0] / sum(rounded) - weights[0] / sum(weights[:2])) < 1 / MAX_PERIOD


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_unusable_weights_are_refused(weight):
    with pytest.raises(UserError, match="of corpus 1 must be a number above zero"):
        integer_weights([1, weight])


def test_every_epoch_is_every_window_once_in_a_new_order():
    for size in (1000, 70_000):
        order = SampleOrder([size], [1], 5, ["print"])
        first, second = order.sample_ids(0, size), order.sample_ids(size, size)
        assert np.array_equal(np.sort(first), np.arange(size))
        assert np.array_equal(np.sort(second), np.arange(size))
        assert (first == second).mean() < 0.01


def test_random_access_equals_sequential():
    order = SampleOrder([130, 70_000, 1], [0.55, 0.4, 0.05], 9, ["a", "b", "c"])
    whole = order.sample_ids(0, 3000)
    assert np.array_equal(np.concatenate([order.sample_ids(i, 1) for i in range(300)]), whole[:300])
    for batch in (7, 64, 1000):
        steps = [order.sample_ids(step * batch, batch) for step in range(3000 // batch)]
        assert np.array_equal(np.concatenate(steps), whole[: 3000 // batch * batch])
    far = 10**15
    assert np.array_equal(order.sample_ids(far, 100)[40:], order.sample_ids(far + 40, 60))
    assert order.sample_ids(5, 0).tolist() == []


def test_order_depends_on_seed_and_fingerprint_only():
    def ids(seed=0, fingerprint="a", other="b"):
        return SampleOrder([500, 800], [1, 1], seed, [fingerprint, other]).sample_ids(0, 400)

    assert np.array_equal(ids(), ids())
    assert not np.array_equal(ids(), ids(seed=1))
    changed = ids(other="c")
    from_first = ids() >> WINDOW_BITS == 0
    assert np.array_equal(ids()[from_first], changed[from_first])
    assert not np.array_equal(ids()[~from_first], changed[~from_first])


def test_bad_lists_are_refused():
    with pytest.raises(UserError, match="listed twice"):
        SampleOrder([5, 5], [1, 1], 0, ["a", "a"])
    with pytest.raises(UserError, match="2 corpora, 1 weights"):
        SampleOrder([5, 5], [1], 0, ["a", "b"])
    with pytest.raises(UserError, match="corpus 1 has 0 windows"):
        SampleOrder([5, 0], [1, 1], 0, ["a", "b"])


def test_the_order_never_changes():
    """Ids written down when the format was made: a change would make every unfinished run read other data."""
    order = SampleOrder([1000, 10**6], [0.25, 0.75], 17, ["aa", "bb"])
    first, second = 0, 1 << WINDOW_BITS
    assert order.sample_ids(3000, 8).tolist() == [
        second + 133514,
        first + 925,
        second + 77588,
        second + 25719,
        second + 558025,
        first + 310,
        second + 916684,
        second + 634234,
    ]
