"""Covering arrays: few cases in which every pair of choices of any two factors meets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Case", "covering_array", "uncovered_pairs"]

Case = dict[str, Any]


def covering_array(
    factors: Mapping[str, Sequence[Any]],
    legal: Callable[[Case], bool] = lambda case: True,
    *,
    seed: int = 0,
    tries: int = 40,
) -> list[Case]:
    """A strength-2 covering array of ``factors`` by greedy search: every pair that some legal case holds is in one.

    Deterministic for a seed. ``legal`` refuses impossible combinations.
    """
    generator = random.Random(seed)
    names = list(factors)
    open_pairs = uncovered_pairs(factors, [])
    cases: list[Case] = []
    while open_pairs:
        best: Case | None = None
        gain = 0
        for attempt in range(tries):
            # Start from a pair that is still open, so that every round makes progress or proves the pair impossible.
            (a, x), (b, y) = generator.choice(sorted(open_pairs, key=repr)) if attempt else min(open_pairs, key=repr)
            case = _complete(factors, names, {a: x, b: y}, open_pairs, generator, legal)
            if case is not None and (found := len(_pairs(case, names) & open_pairs)) > gain:
                best, gain = case, found
        if best is None:
            open_pairs.discard(min(open_pairs, key=repr))
            continue
        cases.append(best)
        open_pairs -= _pairs(best, names)
    return cases


def uncovered_pairs(factors: Mapping[str, Sequence[Any]], cases: Sequence[Case]) -> set[Any]:
    """Pairs of choices that meet in none of ``cases``."""
    names = list(factors)
    pairs = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}
    for case in cases:
        pairs -= _pairs(case, names)
    return pairs


def _pairs(case: Case, names: Sequence[str]) -> set[Any]:
    return {((a, case[a]), (b, case[b])) for a, b in itertools.combinations(names, 2)}


def _complete(
    factors: Mapping[str, Sequence[Any]],
    names: Sequence[str],
    start: Case,
    open_pairs: set[Any],
    generator: random.Random,
    legal: Callable[[Case], bool],
) -> Case | None:
    for _ in range(30):
        case = dict(start)
        for name in generator.sample(list(names), len(names)):
            if name not in case:
                choices = list(factors[name])
                generator.shuffle(choices)
                case[name] = max(choices, key=lambda choice: _new(case, name, choice, names, open_pairs))
                if generator.random() < 0.15:
                    case[name] = generator.choice(choices)
        if legal(case):
            return {name: case[name] for name in names}
    return None


def _new(case: Case, name: str, choice: Any, names: Sequence[str], open_pairs: set[Any]) -> int:
    count = 0
    for other, value in case.items():
        pair = ((name, choice), (other, value))
        if names.index(name) > names.index(other):
            pair = (pair[1], pair[0])
        count += pair in open_pairs
    return count
