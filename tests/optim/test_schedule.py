"""The learning rate against closed forms, and at the ends of every phase."""

import math
from itertools import pairwise

import pytest

from rung.optim import ScheduleConfig, lr_at

PEAK, STEPS, WARMUP = 3e-3, 100, 10


def schedule(name: str, **settings: object) -> list[float]:
    config = ScheduleConfig(name=name, warmup_steps=WARMUP, **settings)  # type: ignore[arg-type]
    assert config.validate(STEPS) == []
    return [math.nan, *(lr_at(config, step, STEPS, PEAK) for step in range(1, STEPS + 1))]


@pytest.mark.parametrize("name", ["cosine", "wsd", "linear", "constant"])
def test_warm_up_starts_above_zero_and_reaches_the_peak(name: str) -> None:
    rates = schedule(name)
    assert rates[1] == pytest.approx(PEAK / WARMUP)
    assert rates[WARMUP] == PEAK
    assert all(a < b for a, b in pairwise(rates[1 : WARMUP + 1]))


def test_closed_forms() -> None:
    ratio = 0.25
    progress = [(step - WARMUP) / (STEPS - WARMUP) for step in range(STEPS + 1)]
    cosine, linear = schedule("cosine", min_lr_ratio=ratio), schedule("linear", min_lr_ratio=ratio)
    for step in range(WARMUP + 1, STEPS + 1):
        expected = ratio * PEAK + (1 - ratio) * PEAK * (1 + math.cos(math.pi * progress[step])) / 2
        assert cosine[step] == pytest.approx(expected, rel=1e-14)
        assert linear[step] == pytest.approx(PEAK + (ratio - 1) * PEAK * progress[step], rel=1e-14)
    assert set(schedule("constant")[WARMUP:]) == {PEAK}


@pytest.mark.parametrize("settings", [{"decay_steps": 30}, {"decay_fraction": 0.3}])
def test_wsd_stays_then_decays(settings: dict[str, float]) -> None:
    linear = schedule("wsd", min_lr_ratio=0.1, **settings)
    sqrt = schedule("wsd", min_lr_ratio=0.1, decay_shape="sqrt", **settings)
    assert set(linear[WARMUP:71]) == set(sqrt[WARMUP:71]) == {PEAK}
    for step in range(71, STEPS + 1):
        progress = (step - 70) / 30
        assert linear[step] == pytest.approx(PEAK * (1 - 0.9 * progress), rel=1e-13)
        assert sqrt[step] == pytest.approx(PEAK * (1 - 0.9 * math.sqrt(progress)), rel=1e-13)


@pytest.mark.parametrize("name", ["cosine", "wsd", "linear"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1 / 3, 1.0])
def test_last_step_is_exact_and_holds_afterwards(name: str, ratio: float) -> None:
    config = ScheduleConfig(name=name, warmup_steps=WARMUP, min_lr_ratio=ratio)
    assert lr_at(config, STEPS, STEPS, PEAK) == PEAK * ratio
    assert lr_at(config, STEPS + 7, STEPS, PEAK) == PEAK * ratio


def test_without_warm_up_and_all_warm_up() -> None:
    assert lr_at(ScheduleConfig(name="constant"), 1, STEPS, PEAK) == PEAK
    assert lr_at(ScheduleConfig(warmup_steps=STEPS), STEPS, STEPS, PEAK) == PEAK
    assert lr_at(ScheduleConfig(name="wsd", decay_steps=0), STEPS, STEPS, PEAK) == PEAK


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "cosin"}, ["schedule.name=cosin", "cosine"]),
        ({"warmup_steps": -1}, ["schedule.warmup_steps=-1"]),
        ({"warmup_steps": 101}, ["schedule.warmup_steps=101", "train.steps=100"]),
        ({"name": "wsd", "warmup_steps": 81}, ["schedule.warmup_steps=81", "20 steps of decay"]),
        ({"name": "wsd", "decay_shape": "cubic"}, ["schedule.decay_shape=cubic"]),
        ({"name": "wsd", "decay_fraction": 1.5}, ["schedule.decay_fraction=1.5"]),
        ({"min_lr_ratio": -0.1}, ["schedule.min_lr_ratio=-0.1"]),
        ({"decay_steps": 5}, ["schedule.decay_steps=5", "no effect"]),
        ({"name": "constant", "min_lr_ratio": 0.5}, ["schedule.min_lr_ratio=0.5", "no effect"]),
    ],
)
def test_problems_name_the_value(settings: dict[str, object], words: list[str]) -> None:
    (problem,) = ScheduleConfig(**settings).validate(STEPS)  # type: ignore[arg-type]
    assert all(word in problem for word in words)
