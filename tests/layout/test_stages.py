"""Stages, splits and the formulas of schedules. Real runs are held against the formulas in tests/parallel."""

from __future__ import annotations

import itertools
import random

import pytest

from rung.layout.stages import (
    SCHEDULES,
    bubble_share,
    default_virtual_stages,
    idle_slots,
    layers_of_stages,
    num_boundary_buffers,
    peak_live_micro_batches,
    rank_of_stage,
    schedule_problems,
    split_layers,
    splits_backward,
    stages_of,
)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_every_stage_has_one_rank(schedule: str, pp: int) -> None:
    virtual = default_virtual_stages(schedule)
    held = [stages_of(schedule, pp, virtual, rank) for rank in range(pp)]
    assert sorted(itertools.chain(*held)) == list(range(pp * virtual))
    for rank, stages in enumerate(held):
        assert stages == sorted(stages)
        assert [rank_of_stage(schedule, pp, virtual, stage) for stage in stages] == [rank] * virtual


def test_placements() -> None:
    assert stages_of("interleaved_1f1b", 2, 3, 1) == [1, 3, 5]
    assert [stages_of("zbv", 3, 2, rank) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]
    with pytest.raises(ValueError, match="stage=4"):
        rank_of_stage("1f1b", 4, 1, 4)


def test_layers_of_stages() -> None:
    assert layers_of_stages([2, 1, 3]) == [range(2), range(2, 3), range(3, 6)]


def all_splits(num_layers: int, num_stages: int) -> list[list[int]]:
    cuts = itertools.combinations(range(1, num_layers), num_stages - 1)
    return [[b - a for a, b in itertools.pairwise([0, *cut, num_layers])] for cut in cuts]


@pytest.mark.parametrize("seed", range(25))
def test_split_is_the_best_of_all(seed: int) -> None:
    """The dearest stage first, then memory, then evenness, against every split there is."""
    draw = random.Random(seed)
    num_layers = draw.randint(1, 8)
    num_stages = draw.randint(1, num_layers)
    costs = [draw.choice([1.0, 1.0, 2.0, 0.1]) for _ in range(num_layers)]
    first, last = draw.choice([0.0, 0.5]), draw.choice([0.0, 3.0])
    memory = draw.choice([None, lambda stage, layers: len(layers) * (num_stages - stage) + 2 * (stage == 0)])

    def merit(counts: list[int]) -> tuple[float, float, float]:
        stages = [sum(costs[layer] for layer in layers) for layers in layers_of_stages(counts)]
        stages[0] += first
        stages[-1] += last
        full = [memory(stage, layers) if memory else 0.0 for stage, layers in enumerate(layers_of_stages(counts))]
        return round(max(stages), 9), round(max(full), 9), round(sum(cost**2 for cost in stages), 6)

    found = split_layers(costs, first, last, num_stages, memory)
    assert len(found) == num_stages and sum(found) == num_layers and min(found) >= 1
    assert merit(found) == min(map(merit, all_splits(num_layers, num_stages)))


def test_split_makes_room_for_the_head() -> None:
    assert split_layers([1.0] * 8, 0.0, 0.0, 4) == [2, 2, 2, 2]
    assert sorted(split_layers([1.0] * 8, 0.0, 2.0, 3)) == [2, 3, 3]
    assert split_layers([1.0] * 8, 0.0, 2.0, 3)[-1] == 2
    assert split_layers([1.0] * 8, 0.0, 9.0, 4)[-1] == 1, "a head dearer than any stage still has a layer beside it"
    # The first stage keeps the most live micro-batches: of equal splits the one that spares it.
    assert split_layers([1.0] * 7, 0.0, 0.0, 2, lambda stage, layers: len(layers) * (2 - stage)) == [3, 4]
    with pytest.raises(ValueError, match="3 layers"):
        split_layers([1.0] * 3, 0.0, 0.0, 4)


def test_a_large_split_is_quick_and_even() -> None:
    assert split_layers([0.1] * 126, 0.0, 0.0, 42) == [3] * 42


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("1f1b", 4, 0, 8, 32, ()), []),
        (("1f1b", 4, 1, 4, 4, (1, 1, 1, 1)), []),
        (("interleaved_1f1b", 2, 0, 4, 4, ()), []),
        (("interleaved_1f1b", 4, 0, 10, 8, ()), []),  # two rounds of five
        (("interleaved_1f1b", 4, 3, 3, 12, ()), []),  # one round of three
        (("interleaved_zero_bubble", 2, 1, 2, 2, ()), []),
        (("zbv", 4, 0, 1, 8, ()), []),
        (("gpipe", 2, 0, 1, 2, ()), []),
        (("1f1b", 1, 0, 1, 1, ()), []),
        (("wavelike", 2, 0, 4, 4, ()), ["pp_schedule='wavelike'", "legal values: gpipe, 1f1b"]),
        (("1f1b", 1, 2, 1, 4, (4,)), ["pp_virtual_stages=2 has no meaning", "pp_layers=[4] has no meaning"]),
        (("1f1b", 2, 2, 2, 4, ()), ["pp_virtual_stages=2", "legal values: 1 ", "interleaved_1f1b"]),
        (("interleaved_1f1b", 2, 1, 2, 4, ()), ["pp_virtual_stages=1", "legal values: 2 or more"]),
        (("zbv", 2, 3, 4, 8, ()), ["pp_virtual_stages=3", "legal values: 2 "]),
        (("zbv", 4, 0, 8, 6, ()), ["pp=4 × pp_virtual_stages=2 = 8", "num_hidden_layers=6", "pp up to 3", "1f1b"]),
        (("interleaved_1f1b", 2, 4, 2, 6, ()), ["= 8 stages", "num_hidden_layers=6", "pp_virtual_stages up to 3"]),
        (("1f1b", 4, 0, 4, 3, ()), ["= 4 stages", "num_hidden_layers=3", "pp up to 3"]),
        (("interleaved_1f1b", 4, 0, 4, 3, ()), ["= 8 stages", "num_hidden_layers=3", "at least 8 layers"]),
        (("1f1b", 2, 0, 4, 8, (3, 3, 2)), ["pp_layers=[3, 3, 2] names 3 stages", "= 2 stages"]),
        (("1f1b", 2, 0, 4, 8, (8, 0)), ["leaves a stage without a layer"]),
        (("1f1b", 2, 0, 4, 8, (4, 5)), ["sums to 9", "num_hidden_layers=8"]),
        (("1f1b", 4, 0, 3, 8, ()), ["has 3 micro-batches", "at least 4", "pp_schedule=gpipe"]),
        (("gpipe", 4, 0, 0, 8, ()), ["has 0 micro-batches", "at least 1"]),
        (("interleaved_1f1b", 2, 0, 5, 8, ()), ["has 5 micro-batches", "2 rounds", "legal values: 4 or 6"]),
        (("interleaved_zero_bubble", 4, 0, 11, 8, ()), ["nearest legal values: 10 or 12"]),
        (("1f1b", 4, 0, 2, 3, (1, 1)), ["= 4 stages need", "names 2 stages", "sums to 2", "has 2 micro"]),
    ],
)
def test_problems(arguments: tuple, words: list[str]) -> None:
    """All at once, with values and legal values."""
    problems = schedule_problems(*arguments)
    assert bool(problems) == bool(words), problems
    for word in words:
        assert word in "\n".join(problems)


def test_formulas_of_the_papers() -> None:
    """As the papers have them, with F = 1, B = 2 and W = 1 slots, for micro-batches enough."""
    for p, m in itertools.product(range(2, 9), (16, 32)):
        assert idle_slots("gpipe", p, 1, m) == idle_slots("1f1b", p, 1, m) == 3 * (p - 1)
        assert bubble_share("1f1b", p, 1, m) == pytest.approx((p - 1) / (m + p - 1))
        for v in (2, 3):
            idle = idle_slots("interleaved_1f1b", p, v, m)
            assert idle / (3 * m * v) == pytest.approx((p - 1) / (v * m)), "of the ideal time, as PTD-P counts"
        assert idle_slots("interleaved_zero_bubble", p, 1, m) == (p - 1) * (1 + 2 - 2 * 1)
        assert idle_slots("zbv", p, 2, m) == p - 1
        assert peak_live_micro_batches("gpipe", p, 1, m, 0) == m
        for rank in range(p):
            assert peak_live_micro_batches("1f1b", p, 1, m, rank) == p - rank
            assert peak_live_micro_batches("zbv", p, 2, m, rank) == 2 * p, "half as large: the memory of 1f1b's rank 0"
            assert peak_live_micro_batches("interleaved_zero_bubble", p, 1, m, rank) == p
        # Narayanan et al. 2021: a first rank keeps 1 + (p - 1)/(p v) times as much as 1f1b's, which is p v here.
        v, whole = 2, m // p * p
        assert peak_live_micro_batches("interleaved_1f1b", p, v, whole, 0) == p * v + p - 1


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if splits_backward(name)])
def test_weights_fill_bubbles_only_when_split(schedule: str) -> None:
    for p, m in itertools.product(range(2, 5), range(1, 9)):
        split, whole = (bubble_share(schedule, p, 2, m, split_backward=flag) for flag in (True, False))
        assert 0 < split < whole < 1


def test_nothing_waits_for_itself() -> None:
    for schedule in SCHEDULES:
        virtual = default_virtual_stages(schedule)
        assert idle_slots(schedule, 1, virtual, 3) == bubble_share(schedule, 1, virtual, 3) == 0


def test_boundary_buffers() -> None:
    """For each micro-batch one where activations come in and one where gradients do."""
    assert [num_boundary_buffers("1f1b", 3, 1, 4, rank) for rank in range(3)] == [4, 8, 4]
    assert [num_boundary_buffers("zbv", 2, 2, 4, rank) for rank in range(2)] == [8, 16]
