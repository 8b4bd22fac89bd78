"""The data order as a function: which sample stands at place i of a training run.

A place names a corpus by a table of one blending period, then a window by a keyed permutation of that corpus. Nothing
is stored and nothing depends on how long the run is: place i is the same sample whatever comes after it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rung.errors import UserError
from rung.random import name_key
from rung.random.philox import philox_numpy

__all__ = ["MAX_PERIOD", "WINDOW_BITS", "SampleOrder", "blend_table", "integer_weights", "permuted"]

WINDOW_BITS = 40
"""A sample id is (corpus << WINDOW_BITS) | window."""
MAX_PERIOD = 2**16
"""Blending weights are integers that sum to at most this."""
_SMALLEST_FEISTEL = 2**16
_ROUNDS = 8

_Key = tuple[int, int]


class SampleOrder:
    """Sample ids of a run, by random access.

    Of each corpus, epoch after epoch, every window comes once, in an order keyed by (seed, fingerprint, epoch). In
    every prefix of the run each corpus has its share of samples to within less than one; see ``integer_weights``.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, fingerprints: Sequence[str]) -> None:
        """``sizes``: windows of each corpus; ``fingerprints``: what it is keyed by. Raises UserError for bad lists."""
        if not len(sizes) == len(weights) == len(fingerprints) >= 1:
            raise UserError(f"{len(sizes)} corpora, {len(weights)} weights, {len(fingerprints)} fingerprints differ")
        UserError.raise_all(
            f"corpus {corpus} has {size} windows; between 1 and {2**WINDOW_BITS} can be ordered"
            for corpus, size in enumerate(sizes)
            if not 1 <= size <= 2**WINDOW_BITS
        )
        if len(set(fingerprints)) < len(fingerprints):
            raise UserError("the same corpus is listed twice; list it once, with the sum of its weights")
        self.sizes, self.seed, self.fingerprints = tuple(sizes), seed, tuple(fingerprints)
        self.weights = integer_weights(weights)
        self._corpus_of_slot, self._rank_of_slot = blend_table(self.weights)

    def sample_ids(self, first: int, count: int) -> NDArray[np.int64]:
        """Ids of ``count`` samples from number ``first`` on. Step t (from 0) reads ``sample_ids(t * n, n)``."""
        periods, slots = np.divmod(np.arange(first, first + count, dtype=np.int64), len(self._corpus_of_slot))
        corpora = self._corpus_of_slot[slots]
        draws = periods * np.array(self.weights, dtype=np.int64)[corpora] + self._rank_of_slot[slots]
        ids = corpora << WINDOW_BITS
        for corpus in np.unique(corpora).tolist():
            chosen = np.flatnonzero(corpora == corpus)
            epochs, places = np.divmod(draws[chosen], self.sizes[corpus])
            for epoch in np.unique(epochs).tolist():
                key = name_key(self.seed, f"data/{self.fingerprints[corpus]}/{epoch}")
                now = epochs == epoch
                ids[chosen[now]] |= permuted(places[now], self.sizes[corpus], key)
        return ids


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Positive integers in the ratio of ``weights`` whose sum is at most MAX_PERIOD.

    The ratio is exact where that sum allows it (0.7, 0.3 -> 7, 3: decimals are taken as written); else each share is
    rounded to a neighbouring multiple of 1/MAX_PERIOD, largest remainders up.
    """
    UserError.raise_all(
        f"weight {weight} of corpus {corpus} must be a number above zero; leave the corpus out instead"
        for corpus, weight in enumerate(weights)
        if not (weight > 0 and math.isfinite(weight))
    )
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period > MAX_PERIOD:
        period = MAX_PERIOD
        UserError.raise_all(
            f"weight {weights[corpus]} of corpus {corpus} is below 1/{MAX_PERIOD} of the sum; raise it or leave it out"
            for corpus, share in enumerate(shares)
            if share * period < 1
        )
    floors = [math.floor(share * period) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda corpus: (floors[corpus] - shares[corpus] * period, corpus))
    for corpus in by_remainder[: period - sum(floors)]:
        floors[corpus] += 1
    divisor = math.gcd(*floors)
    return tuple(weight // divisor for weight in floors)


def blend_table(weights: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One period: for every slot the corpus, and how many slots of the period that corpus had before.

    With D the sum of K weights, corpus i has n·w_i/D ± e of the first n slots, e = 1 - 1/(2K - 2), the least that is
    possible for all weights (R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980). The bound
    gives every copy of a corpus a first and a last slot; since such a schedule exists, taking the earliest deadline
    first finds one, in integers only.
    """
    if len(weights) == 1:
        return np.zeros(weights[0], np.int64), np.arange(weights[0], dtype=np.int64)
    period, scale = sum(weights), 2 * len(weights) - 2
    jobs = []
    for corpus, weight in enumerate(weights):
        for rank in range(weight):
            # Slots count from 1. Not before scale·(w n - D rank) >= D, not after the first n with > (scale - 1) D.
            release = -(-(period + scale * period * rank) // (scale * weight))
            deadline = ((scale - 1) * period + scale * period * rank) // (scale * weight) + 1
            jobs.append((release, deadline, corpus, rank))
    jobs.sort(reverse=True)
    corpora, ranks = np.empty(period, np.int64), np.empty(period, np.int64)
    ready: list[tuple[int, int, int]] = []
    for slot in range(1, period + 1):
        while jobs and jobs[-1][0] <= slot:
            heapq.heappush(ready, jobs.pop()[1:])
        deadline, corpora[slot - 1], ranks[slot - 1] = heapq.heappop(ready)
        assert slot <= deadline, "earliest deadline first meets every deadline that can be met"
    return corpora, ranks


def permuted(places: NDArray[np.int64], size: int, key: _Key) -> NDArray[np.int64]:
    """Where the permutation of range(size) under ``key`` sends each of ``places`` (int64, in range).

    From 2**16 on a Feistel network over the next power of two, walked until it lands inside. Below, where so few rounds
    are visibly not random, the order of keyed hashes.
    """
    if size < _SMALLEST_FEISTEL:
        return _sorted_hashes(size, key)[places]
    return _walk(places.astype(np.uint64), size, _round_keys(key)).astype(np.int64)


@lru_cache(maxsize=64)
def _sorted_hashes(size: int, key: _Key) -> NDArray[np.int64]:
    """range(size) sorted by Philox of each; ties by value."""
    return np.argsort(_philox64(np.arange(size, dtype=np.uint64), 0, key), kind="stable").astype(np.int64)


@lru_cache(maxsize=64)
def _round_keys(key: _Key) -> NDArray[np.uint64]:
    return _philox64(np.arange(_ROUNDS, dtype=np.uint64), 1, key)


def _philox64(index: NDArray[np.uint64], stream: int, key: _Key) -> NDArray[np.uint64]:
    """The first two words of Philox at counter (index, 0, 0, stream) as one 64-bit integer."""
    zero = np.zeros_like(index)
    words = philox_numpy(index, zero, zero, zero + np.uint64(stream), key)
    return words[0].astype(np.uint64) | words[1].astype(np.uint64) << np.uint64(32)


def _walk(places: NDArray[np.uint64], size: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Cycle walking: the network permutes a power of two; following it back into range(size) permutes that."""
    bits = (size - 1).bit_length()
    out = _feistel(places, bits, round_keys)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _feistel(out[outside], bits, round_keys)
        outside = outside[out[outside] >= size]
    return out


def _feistel(values: NDArray[np.uint64], bits: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of range(2**bits): the halves, unlike in width when bits is odd, take turns in masking each other."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for number, key in enumerate(round_keys):
        if number % 2:
            high = high ^ (_mix(low ^ key) & high_mask)
        else:
            low = low ^ (_mix(high ^ key) & low_mask)
    return high << low_bits | low


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The 64-bit finalizer of splitmix64 (D. Stafford's variant 13 of MurmurHash3's)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
