"""The layout never changes the answer: a strength-2 covering array of layouts and options, in float64."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from law.covering import Case, covering_array, possible_pairs, uncovered_pairs
from law.harness import (
    FACTORS,
    NEUTRAL,
    RARE,
    LawBrokenError,
    Record,
    compare,
    compare_start,
    compare_steps,
    global_batch_size,
    legal,
    one_process,
    run_case,
    world_size,
)
from law.mutants import CASES, MUTANTS
from law.workers import Workers

# This seed needs few cases.
COVERING = sorted(covering_array(FACTORS, NEUTRAL, legal, seed=6), key=lambda case: (-world_size(case), repr(case)))
PLAIN: Case = NEUTRAL | {"dp_shard": 2, "accumulation": 1, "kv_heads": 2}


_truths: dict[str, Record] = {}


def truth(case: Case, corpus: Path) -> Record:
    """What one plain process computes; the layout and what trades memory for work are no part of it."""
    same = ("dropout", "packed", "tied", "kv_heads", "fused_qkv", "qk_norm", "window", "optim", "clip")
    key = repr([case[name] for name in same] + [global_batch_size(case), case.get("precision")])
    if key not in _truths:
        _truths[key] = one_process(case, str(corpus))
    return _truths[key]


def check(workers: Workers, case: Case, corpus: Path, mutant: str | None = None, thorough: bool = False) -> None:
    record = workers.run(world_size(case), run_case, case, str(corpus), mutant, thorough)[0]
    compare(record, truth(case, corpus))


def test_covering_array_covers_every_pair() -> None:
    possible = possible_pairs(FACTORS, NEUTRAL, legal)
    assert not possible & uncovered_pairs(FACTORS, COVERING)
    assert all(legal(case) for case in COVERING)
    # What cannot meet is refused, or asks for more ranks than run here.
    refused = {name for pair in uncovered_pairs(FACTORS, []) - possible for name, _ in pair}
    assert refused == {"dp_shard", "tensor", "pipeline", "context", "accumulation", "compile"}


@pytest.mark.parametrize("case", COVERING, ids=lambda case: "-".join(f"{v}" for v in case.values()))
def test_the_layout_never_changes_the_answer(case: Case, corpus: Path, workers: Workers) -> None:
    check(workers, case, corpus)


@pytest.mark.parametrize(
    "choices",
    [
        {"dp_shard": 3, "tensor": "2", "optim": "muon"},
        {"dp_shard": 2, "tensor": "3", "kv_heads": 1, "fused_qkv": True},
        {"dp_shard": 3, "dp_replicate": 2, "dropout": 0.25, "tied": True},
        {"pipeline": "1f1b-3", "context": "ring-2", "accumulation": 4, "tied": True},
        {"pipeline": "zero_bubble-3x1", "tensor": "2-whole-stream", "accumulation": 3, "optim": "muon"},
        {"context": "ring-3", "tensor": "2", "packed": True, "dropout": 0.25},
        {"context": "ulysses-3", "dp_shard": 2, "window": 5},
    ],
    ids=str,
)
def test_threes(choices: Case, corpus: Path, workers: Workers) -> None:
    """What halves well may not divide by three: offsets, shares of a head, uneven shards, places of a ring."""
    case = {**PLAIN, "dp_shard": 1, **choices}
    assert legal(case) and world_size(case) == 6
    check(workers, case, corpus)


def test_the_plain_case_of_every_mutant_is_green(corpus: Path, workers: Workers) -> None:
    for case in {repr(CASES[name]): {**PLAIN, **CASES[name]} for name in MUTANTS}.values():
        check(workers, case, corpus)


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_every_mutant_is_caught(name: str, corpus: Path, workers: Workers) -> None:
    case = {**PLAIN, **CASES[name]}
    with pytest.raises((LawBrokenError, RuntimeError)) as caught:
        check(workers, case, corpus, name)
    if caught.type is RuntimeError:
        # A rank may also refuse; but it must be our guard that speaks, not a broken mutant.
        assert "other samples than the data order prescribes" in str(caught.value)


@pytest.mark.parametrize(
    "choices",
    [
        {"dp_shard": 4},
        {"dp_replicate": 2, "dropout": 0.25, "packed": True},
        {"dp_shard": 1, "tensor": "2", "pipeline": "1f1b-2"},
        {"dp_shard": 1, "tensor": "2", "context": "ring-2"},
    ],
)
def test_float32_keeps_the_first_step_to_1e_5(choices: Case, corpus: Path, workers: Workers) -> None:
    case = {**PLAIN, "micro_batch_size": 1, "accumulation": 2, "precision": "float32", **choices}
    record = workers.run(world_size(case), run_case, case, str(corpus))[0]
    compare_start(record, truth(case, corpus))
    compare_steps(record, truth(case, corpus), 1e-5, 1)


@pytest.mark.parametrize(
    "choices",
    [
        {"dp_shard": 1},
        {"dp_shard": 4},
        {"dp_replicate": 2},
        {"dp_shard": 1, "tensor": "2", "pipeline": "zbv-2"},
        {"dp_shard": 1, "tensor": "2-whole-stream", "context": "ulysses-2"},
    ],
)
def test_bf16_keeps_start_and_samples(choices: Case, corpus: Path, workers: Workers) -> None:
    case = {**PLAIN, "micro_batch_size": 1, "accumulation": 2, "precision": "bf16", **choices}
    record = workers.run(world_size(case), run_case, case, str(corpus))[0]
    compare_start(record, truth(case, corpus))
    # No promise on gradients; but they are gradients of the same loss.
    compare_steps(record, truth(case, corpus), 0.1, 1)


def random_case(seed: int) -> Case:
    """A random legal case, of choices that the covering array has no room for too."""
    generator = random.Random(seed)
    while True:
        case = {name: generator.choice(choices + RARE.get(name, [])) for name, choices in FACTORS.items()}
        case["compile"] = case["compile"] and seed % 10 == 0
        if legal(case) and world_size(case) > 1:
            return case


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 300))])
def test_random_layouts(seed: int, corpus: Path, workers: Workers) -> None:
    check(workers, random_case(seed), corpus, thorough=True)
