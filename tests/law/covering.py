"""Covering arrays: few cases in which every pair of choices of any two factors meets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Case", "covering_array", "possible_pairs", "uncovered_pairs"]

Case = dict[str, Any]


def covering_array(
    factors: Mapping[str, Sequence[Any]],
    neutral: Case,
    legal: Callable[[Case], bool] = lambda case: True,
    *,
    seed: int = 0,
    tries: int = 20,
) -> list[Case]:
    """A strength-2 covering array of ``factors`` by greedy search: every pair that can be legal is in some case.

    ``neutral`` is a legal case whose choices go with any other: a pair is possible if and only if it is legal with
    everything else neutral. Deterministic for a seed.
    """
    generator = random.Random(seed)
    open_pairs = possible_pairs(factors, neutral, legal)
    cases: list[Case] = []
    while open_pairs:
        ordered = sorted(open_pairs, key=repr)
        found = [
            _complete(factors, neutral, generator.choice(ordered), open_pairs, generator, legal) for _ in range(tries)
        ]
        best = max(found, key=lambda case: len(_pairs(case, list(factors)) & open_pairs))
        cases.append(best)
        open_pairs -= _pairs(best, list(factors))
    return cases


def possible_pairs(factors: Mapping[str, Sequence[Any]], neutral: Case, legal: Callable[[Case], bool]) -> set[Any]:
    """Pairs of choices that are legal with everything else neutral."""
    return {pair for pair in uncovered_pairs(factors, []) if legal(neutral | dict(pair))}


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
    neutral: Case,
    start: Any,
    open_pairs: set[Any],
    generator: random.Random,
    legal: Callable[[Case], bool],
) -> Case:
    """A legal case that holds ``start``: factor by factor, in random order, the choice that adds most open pairs."""
    case = neutral | dict(start)
    decided = list(dict(start))
    for name in generator.sample(list(factors), len(factors)):
        if name in decided:
            continue
        choices = list(factors[name])
        generator.shuffle(choices)
        choices.sort(
            key=lambda choice: -_new(name, choice, {key: case[key] for key in decided}, list(factors), open_pairs)
        )
        case[name] = next((c for c in choices if legal(case | {name: c})), case[name])
        decided.append(name)
    return {name: case[name] for name in factors}


def _new(name: str, choice: Any, decided: Case, names: Sequence[str], open_pairs: set[Any]) -> int:
    count = 0
    for other, value in decided.items():
        pair = ((name, choice), (other, value))
        if names.index(name) > names.index(other):
            pair = (pair[1], pair[0])
        count += pair in open_pairs
    return count
