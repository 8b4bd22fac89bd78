"""Stable-SPAM against its equations, element by element in Python, and what a stranger may do with it."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from rung.layout import LogicalTensor
from rung.optim import LocalParameter, StableSPAM, StableSpamConfig, build_optimizer
from rung.optim.exact_sum import LIMBS, carry, exponent_above, power_of_two, square_limbs, to_float

SETTINGS = {
    "lr": 0.02,
    "betas": (0.9, 0.95),
    "eps": 1e-3,
    "weight_decay": 0.3,
    "gamma1": 0.7,
    "gamma2": 0.9,
    "gamma3": 0.99,
    "reset_interval": 5,
    "total_steps": 9,
    "eta_min": 0.3,
}


def oracle(start: Sequence[float], gradients: Sequence[Sequence[float]], s: dict[str, Any]) -> tuple[list[Any], int]:
    """One tensor, as a list of elements: its values after each step, and how many elements were clipped."""
    w, spikes, values = list(start), 0, []
    m, v = [0.0] * len(w), [0.0] * len(w)
    average_max = average_norm = average_square = 0.0
    since = 0
    for t, gradient in enumerate(gradients, 1):
        q, total = 1.0, s["total_steps"]
        if total is not None:
            q = s["eta_min"] + (1 - s["eta_min"]) * (1 + math.cos(math.pi * min(t, total + 1) / (total + 1))) / 2
        beta1, beta2 = s["betas"][0] * q, s["betas"][1]
        gamma1, gamma2, gamma3 = s["gamma1"] * q, s["gamma2"], s["gamma3"]
        g = list(gradient)
        top = max(map(abs, g))
        average_max = gamma3 * average_max + (1 - gamma3) * top
        level = average_max / (1 - gamma3**t)
        spikes += sum(abs(x) > level for x in g)
        g = [x / top * level if abs(x) > level else x for x in g]
        norm = math.sqrt(math.fsum(x * x for x in g))
        average_norm = gamma1 * average_norm + (1 - gamma1) * norm
        average_square = gamma2 * average_square + (1 - gamma2) * norm**2
        if norm:
            wanted = average_norm / (1 - gamma1**t)
            g = [x / norm * wanted / (math.sqrt(average_square / (1 - gamma2**t)) + s["eps"]) for x in g]
        since += 1
        if t % s["reset_interval"] == 0:
            m, v, since = [0.0] * len(w), [0.0] * len(w), 1
        for i, x in enumerate(g):
            w[i] -= s["lr"] * s["weight_decay"] * w[i]
            m[i] = beta1 * m[i] + (1 - beta1) * x
            v[i] = beta2 * v[i] + (1 - beta2) * x * x
            corrected = math.sqrt(v[i] / (1 - beta2**since))
            w[i] -= s["lr"] * m[i] / (1 - beta1**since) / (corrected + s["eps"])
        values.append(list(w))
    return values, spikes


def gradients(steps: int, size: int, seed: int) -> torch.Tensor:
    """With spikes, and one step of nothing."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(steps, size, dtype=torch.float64, generator=generator)
    found *= torch.where(torch.rand(steps, size, generator=generator) < 0.1, 20.0, 1.0)
    found[3] = 0
    return found


@pytest.mark.parametrize("total_steps", [9, None])
def test_equals_its_equations(total_steps: int | None) -> None:
    settings = {**SETTINGS, "total_steps": total_steps}
    starts = [torch.linspace(-1, 1, 12, dtype=torch.float64), torch.linspace(2, 3, 5, dtype=torch.float64)]
    parameters = [nn.Parameter(starts[0].view(4, 3).clone()), nn.Parameter(starts[1].clone())]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "reset_interval": 4}]
    optimizer = StableSPAM(groups, **settings)
    steps = [gradients(16, 12, 1), gradients(16, 5, 2)]
    found: list[list[torch.Tensor]] = [[], []]
    spikes = 0
    for step in range(16):
        for p, g in zip(parameters, steps, strict=True):
            p.grad = g[step].view_as(p).clone()
        optimizer.step()
        spikes += int(optimizer.spikes)
        assert optimizer.resets == (step + 1 in (4, 5, 8, 10, 12, 15, 16))
        for values, p in zip(found, parameters, strict=True):
            values.append(p.detach().flatten().clone())
    count = 0
    for start, g, values, more in zip(starts, steps, found, ({}, {"reset_interval": 4}), strict=True):
        truth, clipped = oracle(start.tolist(), g.tolist(), {**settings, **more})
        torch.testing.assert_close(torch.stack(values), torch.tensor(truth, dtype=torch.float64), rtol=1e-11, atol=0)
        count += clipped
    assert spikes == count > 5


def test_statistics_outlive_a_reset() -> None:
    """The level above which gradients are clipped does not jump, and the step of a reset is one of Adam's first."""
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = StableSPAM([parameter], lr=1.0, reset_interval=50)
    for step in range(1, 52):
        parameter.grad = torch.tensor([1.0, -1.0, 0.5, 0.25], dtype=torch.float64)
        before = parameter.detach().clone()
        optimizer.step()
        state = optimizer.state[parameter]
        assert float(state["average_max"]) / (1 - 0.999**step) == pytest.approx(1.0)
        change = parameter.detach() - before
        torch.testing.assert_close(change, -parameter.grad.sign(), rtol=1e-6, atol=0)


def test_momentum_stays_after_total_steps() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    settings = {"total_steps": 4, "eta_min": 0.5, "reset_interval": 100, "betas": (0.8, 0.9), "gamma1": 0.0}
    optimizer = StableSPAM([parameter], **settings)  # type: ignore[arg-type]
    betas = []
    for step in range(1, 10):
        parameter.grad = torch.ones_like(parameter)
        before = float(optimizer.state[parameter]["exp_avg"])
        optimizer.step()
        gain = float(optimizer.state[parameter]["exp_avg"])
        if step > 1:
            betas.append((gain - 1) / (before - 1))  # the gradient, scaled by its own history, is 1
    expected = [0.8 * (0.5 + 0.25 * (1 + math.cos(math.pi * min(t, 5) / 5))) for t in range(2, 10)]
    assert betas == pytest.approx(expected, rel=1e-5)
    assert betas[-1] == pytest.approx(0.4, rel=1e-5)


def test_state_dict_goes_on_bit_for_bit() -> None:
    steps = gradients(14, 36, 3).float().view(14, 9, 4)
    whole, first = (nn.Parameter(torch.ones(9, 4).bfloat16()) for _ in range(2))
    optimizer, before = (StableSPAM([("w", p)], **SETTINGS) for p in (whole, first))

    def train(optimizer: StableSPAM, parameter: nn.Parameter, part: torch.Tensor) -> None:
        for step in part:
            parameter.grad = step.to(parameter.dtype)
            optimizer.step()

    train(optimizer, whole, steps)
    train(before, first, steps[:7])
    file = io.BytesIO()
    torch.save({"model": first.detach(), "optimizer": before.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    second = nn.Parameter(saved["model"])
    after = StableSPAM([("w", second)], lr=1.0)
    after.load_state_dict(saved["optimizer"])
    assert {k: after.param_groups[0][k] for k in SETTINGS} == SETTINGS
    train(after, second, steps[7:])
    assert torch.equal(whole, second)
    ours, theirs = optimizer.state[whole], after.state[second]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and len(ours) == 6


def test_a_skipped_step_changes_no_bit() -> None:
    parameter = nn.Parameter(torch.randn(20, 4))
    optimizer = StableSPAM([parameter], reset_interval=3)
    for step in range(5):
        parameter.grad = torch.randn(20, 4)
        optimizer.step()
        before = copy.deepcopy([parameter.detach(), *optimizer.state[parameter].values()])
        parameter.grad = torch.full((20, 4), (math.nan, math.inf)[step % 2])
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(math.inf), torch.tensor(1.0)
        optimizer.step()
        assert optimizer.spikes == optimizer.resets == 0
        del optimizer.grad_scale, optimizer.found_inf
        after = [parameter.detach(), *optimizer.state[parameter].values()]
        assert [x.numpy().tobytes() for x in before] == [x.numpy().tobytes() for x in after], step


def test_a_missing_gradient_leaves_the_tensor_and_its_averages() -> None:
    parameters = [nn.Parameter(torch.ones(6)) for _ in range(2)]
    optimizer = StableSPAM(parameters, reset_interval=2)
    for step in (1, 2):
        parameters[0].grad, parameters[1].grad = torch.ones(6), torch.ones(6) if step == 1 else None
        before = parameters[1].detach().clone()
        averages = float(optimizer.state[parameters[1]]["average_max"])
        optimizer.step()
    assert torch.equal(parameters[1], before) and averages == float(optimizer.state[parameters[1]]["average_max"]) > 0
    assert optimizer.state[parameters[1]]["exp_avg"].abs().sum() == 0 < optimizer.state[parameters[0]]["exp_avg"].sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": math.nan}, "lr=nan"),
        ({"gamma1": -1}, r"gamma1=-1 must lie in \[0, 1\); the released code's -1"),
        ({"gamma2": 1.0, "gamma3": -0.1}, "gamma2=1.0.*gamma3=-0.1"),
        ({"reset_interval": 0}, "reset_interval=0"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"eta_min": 1.1}, "eta_min=1.1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StableSPAM([torch.ones(2)], **settings)


def test_a_part_of_a_tensor_without_the_others_is_refused() -> None:
    half = torch.ones(2, 3)
    from rung.layout import Shard

    logical = LogicalTensor.from_spec("w", (4, 3), torch.float32, {"x": Shard(0)}, {"x": 2}, {"x": 0})
    with pytest.raises(ValueError, match="hold 6 of 12 elements"):
        StableSPAM([LocalParameter("w", half, logical)])


def test_in_a_run_vectors_are_not_decayed() -> None:
    shapes = {"layers.0.mlp.up_proj.weight": (9, 4), "norm.weight": (4,)}
    weights = {name: torch.ones(shape) for name, shape in shapes.items()}
    parameters = [LocalParameter(name, w, LogicalTensor.from_tensor(name, w)) for name, w in weights.items()]
    optimizer = build_optimizer(StableSpamConfig(weight_decay=0.5), parameters)
    optimizer.step(0.1)
    assert [w.unique().tolist() for w in weights.values()] == [[pytest.approx(0.95)], [1.0]]
    kinds = ("step", "exp_avg", "exp_avg_sq", "average_max", "average_norm", "average_square")
    state = optimizer.named_state()
    assert set(state) == {f"{name}/{kind}" for name in shapes for kind in kinds}
    assert all(s.tensor.shape == () for name, s in state.items() if "average" in name)


def test_sums_of_squares_are_exact_in_any_order() -> None:
    generator = random.Random(1)
    values = [generator.choice((-1, 1)) * math.ldexp(generator.random(), -generator.randrange(60)) for _ in range(300)]
    values = torch.tensor(values, dtype=torch.float64).float()
    top = values.abs().amax().double()
    exponent = exponent_above(top)
    scale = power_of_two(-exponent)
    exact = sum((Fraction(v) * Fraction(float(scale))) ** 2 for v in values.tolist())
    limbs = square_limbs([values], scale, torch.device("cpu"))
    held = sum(Fraction(int(limb), 2 ** (32 * place)) for place, limb in enumerate(limbs))
    assert 0 <= exact - held < Fraction(300, 2**128)
    assert float(to_float(limbs)) == float(exact)
    shuffled = values[torch.randperm(300)]
    apart = torch.stack([square_limbs([p], scale, torch.device("cpu")) for p in shuffled.split(7)]).sum(0)
    assert not torch.equal(apart, limbs) and torch.equal(carry(apart), limbs)
    assert torch.equal(to_float(apart), to_float(limbs))


def test_sums_of_squares_at_the_ends_of_the_range() -> None:
    for top in (0.0, 5e-324, 1e-300, 1e-45, 1.0, 2.0, 3e38, 1e300):
        value = torch.tensor([top], dtype=torch.float64)
        exponent = exponent_above(value)[0]
        limbs = square_limbs([value, -value], power_of_two(-exponent), torch.device("cpu"))
        norm = to_float(limbs).sqrt() * power_of_two(exponent)
        assert limbs.shape == (LIMBS,)
        assert float(norm) == pytest.approx(math.hypot(top, top), rel=1e-15) or top < 1e-307
    powers = torch.tensor([-1022, -1, 0, 1, 1023])
    assert power_of_two(powers).tolist() == [2.0**p for p in powers.tolist()]
    assert exponent_above(torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0], dtype=torch.float64)).tolist() == [0, 0, 1, 1, 2]
