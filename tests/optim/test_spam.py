"""SPAM against its equations, element by element in Python, and what a stranger may do with it."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rung.layout import LogicalTensor, Shard
from rung.observe.metrics import read_metrics
from rung.optim import SPAM, LocalParameter, SpamConfig, build_optimizer
from rung.optim.sparse import MASK_TAG, kept_elements
from rung.random import name_key
from rung.random.philox import rounds

SHORT = {"reset_interval": 5, "warmup_steps": 3, "grace_steps": 2, "spike_threshold": 40.0}
PLAIN = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.3}


def oracle(
    start: float, gradients: Sequence[float], settings: dict[str, Any], kept: Sequence[bool] | None = None
) -> tuple[list[float], int]:
    """One element: its value after each step, and how often it was clipped. ``kept``: per epoch, whether it moves."""
    lr, (beta1, beta2), eps, decay = (settings[k] for k in ("lr", "betas", "eps", "weight_decay"))
    interval, warmup, grace, threshold = (
        settings[k] for k in ("reset_interval", "warmup_steps", "grace_steps", "spike_threshold")
    )
    w, m, v, spikes, values = start, 0.0, 0.0, 0, []
    for k, g in enumerate(gradients, 1):
        c = k % interval
        scale = 1.0
        if k >= interval and c < warmup:
            scale = 1 - 0.99 * (1 + math.cos(math.pi * c / (warmup + 1))) / 2
        if c == 0:
            m = v = 0.0
        if kept is None or kept[k // interval]:
            if threshold and c >= grace and v > 0 and g * g > threshold * v:
                g = math.copysign(math.sqrt(threshold * v), g)
                spikes += 1
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            w -= lr * scale * math.sqrt(1 - beta2**k) / (1 - beta1**k) * m / (math.sqrt(v) + eps)
            w -= lr * decay * w
        values.append(w)
    return values, spikes


def mask_bit(seed: int, name: str, epoch: int, index: int, density: float) -> bool:
    words = rounds(index // 4 & 0xFFFFFFFF, index // 4 >> 32, epoch, MASK_TAG, *name_key(seed, f"spam/{name}"))
    return bool(words[index % 4] < round(density * 2**32))


def gradients(steps: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """With spikes, and with zeros at the start of one element."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(steps, *shape, dtype=torch.float64, generator=generator)
    found *= torch.where(torch.rand(steps, *shape, generator=generator) < 0.1, 50.0, 1.0)
    found[: steps // 2, 0] = 0
    return found


def train(optimizer: SPAM, parameters: Sequence[torch.Tensor], steps: torch.Tensor) -> None:
    for step in steps:
        for parameter in parameters:
            parameter.grad = step.to(parameter.dtype).clone()
        optimizer.step()


def state_at(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Pretend that ``step`` steps are done."""
    state = copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        values["step"] = torch.tensor(step)
    optimizer.load_state_dict(state)


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_equals_its_equations(density: float) -> None:
    settings = {**PLAIN, **SHORT}
    steps = gradients(17, (6, 3))
    weight = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3)
    parameter = nn.Parameter(weight.clone())
    optimizer = SPAM([("blocks.w", parameter)], **settings, density=density, seed=3)
    found, spikes = [], 0
    for step in steps:
        parameter.grad = step.clone()
        optimizer.step()
        found.append(parameter.detach().clone())
        spikes += int(optimizer.spikes)
    truths = []
    for index in range(18):
        kept = None if density == 1 else [mask_bit(3, "blocks.w", epoch, index, density) for epoch in range(4)]
        truths.append(oracle(weight.flatten()[index].item(), steps.view(17, 18)[:, index].tolist(), settings, kept))
    values = torch.tensor([value for value, _ in truths], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(found).view(17, 18).T, values, rtol=1e-12, atol=1e-13)
    assert spikes == sum(count for _, count in truths) > 3


def moved(step: int, **settings: Any) -> float:
    """By how much one step, ``step``, changes an element with gradient 1, divided by the learning rate."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SPAM([parameter], lr=1e-3, eps=1e-30, **settings)
    state_at(optimizer, step - 1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return -parameter.item() / 1e-3


@pytest.mark.parametrize(("c", "scale"), [(0, 0.01), (75, 0.49985), (149, 0.99957), (150, 1.0), (499, 1.0)])
def test_scale_after_a_reset(c: int, scale: float) -> None:
    assert moved(1000 + c, betas=(0.0, 0.0)) == pytest.approx(scale, abs=5e-6)
    assert moved(c or 500, betas=(0.0, 0.0)) == (1.0 if c else pytest.approx(0.01))  # none at the start of training


def test_no_warmup() -> None:
    assert moved(500, betas=(0.0, 0.0), warmup_steps=0) == 1.0


def test_gain_after_a_late_reset() -> None:
    """What a constant gradient does between two resets, in learning rates: figures made apart from this code."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SPAM([parameter], lr=1.0)
    state_at(optimizer, 500 * 100 - 1)
    gains = []
    for _ in range(500):
        before = parameter.item()
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        gains.append(before - parameter.item())
    expected = {0: 0.03, 20: 0.32, 50: 1.14, 100: 2.41, 135: 2.73, 150: 2.67, 300: 1.96, 499: 1.59}
    assert {j: round(gains[j], 2) for j in expected} == expected
    assert gains.index(max(gains)) == 135 and sum(gains) / 500 == pytest.approx(1.87, abs=0.005)


def test_an_element_that_was_still_may_move() -> None:
    """Clipping by v = 0 would hold it until the next reset."""
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = SPAM([parameter], lr=0.1, grace_steps=3)
    for step in range(8):
        parameter.grad = torch.tensor([1.0, float(step >= 5)], dtype=torch.float64)
        optimizer.step()
        assert optimizer.spikes == 0
    assert parameter[1].item() < -0.1


def test_threshold_zero_never_clips() -> None:
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = SPAM([parameter], grace_steps=0, spike_threshold=0.0)
    for size in (1e-3, 1.0, 1e6):
        parameter.grad = torch.full_like(parameter, size)
        optimizer.step()
        assert optimizer.spikes == 0


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_weight_decay_acts_at_every_density(density: float) -> None:
    parameter = nn.Parameter(torch.ones(1000))
    optimizer = SPAM([("w", parameter)], lr=0.1, weight_decay=0.5, density=density)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = [mask_bit(0, "w", 0, index, density) for index in range(1000)]
    assert parameter.tolist() == [pytest.approx(0.95) if here else 1.0 for here in kept]
    assert sum(kept) == pytest.approx(1000 * density, abs=60)


def test_subsets_are_those_of_the_whole_tensor() -> None:
    """Any box of any shard, also past 2^32 counters, against integers."""
    cases: list[tuple[tuple[int, ...], dict[str, Shard], dict[str, int], dict[str, int]]] = [
        ((7, 5), {}, {"x": 1}, {"x": 0}),
        ((7, 5), {"x": Shard(0)}, {"x": 3}, {"x": 1}),
        ((7, 5), {"x": Shard(1)}, {"x": 2}, {"x": 1}),
        ((7, 3, 4), {"x": Shard(1), "y": Shard(0)}, {"x": 2, "y": 2}, {"x": 0, "y": 1}),
        ((2**34, 3), {"x": Shard(0)}, {"x": 2**32}, {"x": 2**32 - 5}),
        ((13,), {"x": Shard(0)}, {"x": 4}, {"x": 3}),
        ((), {}, {"x": 1}, {"x": 0}),
    ]
    for shape, shards, sizes, place in cases:
        logical = LogicalTensor.from_spec("w", shape, torch.float32, shards, sizes, place)
        for epoch in (0, 3):
            found = kept_elements(name_key(1, "spam/w"), torch.tensor(epoch), 0.3, logical, logical.local_shape)
            for box, local, _ in logical.pieces():
                for offset in itertools.product(*map(range, box.sizes)):
                    index = 0
                    for size, at, start in zip(shape, offset, box.offsets, strict=True):
                        index = index * size + at + start
                    assert found[local][offset] == mask_bit(1, "w", epoch, index, 0.3)


def test_a_new_subset_starts_from_nothing() -> None:
    parameter = nn.Parameter(torch.ones(64, 8))
    optimizer = SPAM([("w", parameter)], density=0.25, reset_interval=2, warmup_steps=0, seed=5)
    for epoch in range(3):
        for step in (0, 1):
            if (epoch, step) == (2, 1):
                break
            parameter.grad = torch.ones_like(parameter)
            before = parameter.detach().clone()
            optimizer.step()
            moment = optimizer.state_dict()["state"][0]["exp_avg"]
            now = (2 * epoch + step + 1) // 2
            kept = torch.tensor([mask_bit(5, "w", now, i, 0.25) for i in range(512)]).view(64, 8)
            assert torch.equal(moment != 0, kept) and torch.equal(parameter != before, kept)
    packed = sum(s.exp_avg.numel() for s in optimizer._subsets[parameter])
    assert packed < 512 * 0.7


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_state_dict_goes_on_bit_for_bit(density: float) -> None:
    steps = gradients(14, (9, 4))
    settings = {**PLAIN, **SHORT, "density": density, "seed": 9}
    whole, first = (nn.Parameter(torch.ones(9, 4)) for _ in range(2))
    optimizer, before = (SPAM([("w", p)], **settings) for p in (whole, first))
    train(optimizer, [whole], steps)
    train(before, [first], steps[:7])
    file = io.BytesIO()
    torch.save({"model": first.detach(), "optimizer": before.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    second = nn.Parameter(saved["model"])
    after = SPAM([("w", second)], lr=1.0, density=0.7)  # other settings, which are loaded over
    after.load_state_dict(saved["optimizer"])
    assert {k: after.param_groups[0][k] for k in settings} == {**settings, "betas": (0.9, 0.95)}
    train(after, [second], steps[7:])
    assert torch.equal(whole, second)
    ours, theirs = (o.state_dict()["state"][0] for o in (optimizer, after))
    assert all(torch.equal(ours[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_skipped_step_changes_no_bit(density: float) -> None:
    parameter = nn.Parameter(torch.randn(20, 4))
    with torch.no_grad():
        parameter[0, :2] = torch.tensor([-0.0, 1e-42])
    optimizer = SPAM([("w", parameter)], **PLAIN, reset_interval=3, density=density)
    for step in range(5):
        parameter.grad = torch.randn(20, 4)
        optimizer.step()
        before = [x.clone() for x in (parameter.detach(), *optimizer.state_dict()["state"][0].values())]
        parameter.grad = torch.full((20, 4), math.nan)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(math.inf), torch.tensor(1.0)
        optimizer.step()
        assert optimizer.spikes == optimizer.resets == 0
        del optimizer.grad_scale, optimizer.found_inf
        after = (parameter.detach(), *optimizer.state_dict()["state"][0].values())
        assert [x.numpy().tobytes() for x in before] == [x.numpy().tobytes() for x in after], step


def test_grad_scaler() -> None:
    scaled, plain = (nn.Parameter(torch.ones(3)) for _ in range(2))
    ours, theirs = SPAM([scaled], lr=0.1), SPAM([plain], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    for factor in (1.0, math.inf, 2.0):
        for p, optimizer, scale in ((scaled, ours, scaler.scale), (plain, theirs, lambda x: x)):
            optimizer.zero_grad()
            scale((p * p).sum() * factor).backward()
        scaler.step(ours)
        scaler.update()
        if factor != math.inf:
            theirs.step()
    assert torch.equal(scaled, plain) and ours.state[scaled]["step"] == 2


def test_a_missing_gradient_leaves_the_tensor_and_resets_its_moments() -> None:
    parameters = [nn.Parameter(torch.ones(6)) for _ in range(2)]
    optimizer = SPAM([{"params": parameters[:1]}, {"params": parameters[1:], "density": 0.5}], reset_interval=3)
    for step in (1, 2, 3):
        for p in parameters:
            p.grad = None if step > 1 else torch.ones_like(p)
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        assert [torch.equal(p, b) for p, b in zip(parameters, before, strict=True)] == [step > 1] * 2
        moments = [s["exp_avg"].abs().sum().item() for s in optimizer.state_dict()["state"].values()]
        assert [moment > 0 for moment in moments] == [step < 3] * 2
        assert optimizer.resets == (step == 3)


def test_low_precision_and_strides() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        parameter = nn.Parameter(torch.ones(8, 5, dtype=dtype).t())
        exact = nn.Parameter(torch.ones(5, 8))
        ours, theirs = SPAM([parameter], lr=0.01), SPAM([exact], lr=0.01)
        for seed in range(3):
            gradient = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
            parameter.grad, exact.grad = gradient.t().contiguous().t(), gradient.float()
            ours.step()
            theirs.step()
            with torch.no_grad():
                exact.copy_(exact.to(dtype))
        assert torch.equal(parameter.float(), exact)
        assert ours.state[parameter]["exp_avg_sq"].dtype == torch.float32


def test_learning_rates_may_be_tensors_and_schedules() -> None:
    by_tensor, by_schedule = (nn.Parameter(torch.ones(3)) for _ in range(2))
    rate = torch.tensor(0.1, dtype=torch.float64)
    ours, other = SPAM([by_tensor], lr=rate), SPAM([by_schedule], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(other, 0.5)
    for _ in range(3):
        by_tensor.grad, by_schedule.grad = torch.ones(3), torch.ones(3)
        ours.step()
        other.step()
        schedule.step()
        rate /= 2
    assert torch.equal(by_tensor, by_schedule)


def test_closure_and_local_parameters() -> None:
    weight = torch.ones(4, 4)
    given = LocalParameter("layers.0.w", weight, LogicalTensor.from_tensor("layers.0.w", weight))
    optimizer = SPAM([given], lr=0.5, density=0.5, seed=1)
    plain = nn.Parameter(torch.ones(4, 4))
    other = SPAM([("module.layers.0.w", plain)], lr=0.5, density=0.5, seed=1)  # DDP's prefix is no part of a name

    def closure() -> float:
        plain.grad = torch.ones(4, 4)
        return 2.5

    weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert other.step(closure) == 2.5
    assert torch.equal(weight, plain.detach())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"eps": 0.0}, "eps=0.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"spike_threshold": -1.0}, "spike_threshold=-1.0"),
        ({"reset_interval": 0}, "reset_interval=0"),
        ({"reset_interval": 1.5}, "reset_interval=1.5"),
        ({"warmup_steps": -1, "grace_steps": -2}, "warmup_steps=-1.*grace_steps=-2"),
        ({"density": 0.0}, r"density=0.0 must lie in \(0, 1\]"),
        ({"density": 1.5}, "density=1.5"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPAM([torch.ones(2)], **settings)
    optimizer = SPAM([torch.ones(2)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [torch.ones(3)], **settings})
    assert len(optimizer.param_groups) == len(optimizer.state) == 1


def test_bad_parameters_and_gradients() -> None:
    with pytest.raises(ValueError, match=r"param\.1 is torch.int64"):
        SPAM([torch.ones(2), torch.ones(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match="complex64"):
        SPAM([torch.ones(2, dtype=torch.complex64)])
    with pytest.raises(ValueError, match="on meta"):
        SPAM([torch.ones(2, device="meta")])
    with pytest.raises(ValueError, match="two parameters are called 'w'"):
        SPAM([("w", torch.ones(2)), ("module.w", torch.ones(2))])
    with pytest.raises(ValueError, match="empty parameter list"):
        SPAM([])
    embedding = nn.Embedding(3, 2, sparse=True)
    optimizer = SPAM(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"weight: the gradient is torch\.sparse_coo"):
        optimizer.step()
    with pytest.raises(ValueError, match="is not of SPAM"):
        SPAM([torch.ones(2)]).load_state_dict(torch.optim.SGD([torch.ones(2)]).state_dict())


def test_in_a_run_density_and_decay_are_of_matrices() -> None:
    shapes = {"embed_tokens.weight": (9, 4), "layers.0.mlp.up_proj.weight": (9, 4), "norm.weight": (4,)}
    weights = {name: torch.ones(shape) for name, shape in shapes.items()}
    parameters = [LocalParameter(name, w, LogicalTensor.from_tensor(name, w)) for name, w in weights.items()]
    optimizer = build_optimizer(SpamConfig(density=0.5, weight_decay=0.5), parameters, seed=4)
    optimizer.step(0.1)  # gradients are zero where there are none
    kept = torch.tensor([mask_bit(4, "layers.0.mlp.up_proj.weight", 0, i, 0.5) for i in range(36)]).view(9, 4)
    decayed = 1 - 0.1 * 0.5
    assert torch.equal(weights["embed_tokens.weight"], torch.full((9, 4), decayed))
    assert torch.equal(weights["layers.0.mlp.up_proj.weight"], torch.where(kept, decayed, 1.0))
    assert torch.equal(weights["norm.weight"], torch.ones(4))
    state = optimizer.named_state()
    assert set(state) == {f"{name}/{kind}" for name in shapes for kind in ("step", "exp_avg", "exp_avg_sq")}
    assert all(state[f"{name}/step"].tensor == 1 for name in shapes)


@pytest.mark.parametrize("name", ["spam", "stable_spam"])
def test_a_run_tells_of_spikes_and_resets(name: str, rung: Callable[..., Any], tiny: list[str], tmp_path: Path) -> None:
    clipping = ["optim.grace_steps=0", "optim.spike_threshold=10"] if name == "spam" else []
    result = rung("train", *tiny, f"optim={name}", "optim.reset_interval=2", *clipping, "export.huggingface=false")
    assert result.status == 0, result.err
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [line["optimizer_resets"] for line in lines] == [0, 1, 0]
    assert lines[2]["spikes"] > 0 and all(type(line["spikes"]) is int for line in lines)


def test_moments_of_another_subset_are_refused() -> None:
    weight = torch.nn.Parameter(torch.randn(64))
    optimizer = SPAM([("a", weight)], density=0.5)
    weight.grad = torch.ones(64)
    optimizer.step()
    for names in ("b", "a"):
        other = SPAM([(names, torch.nn.Parameter(weight.detach().clone()))], density=0.5)
        if names == "a":
            other.load_state_dict(optimizer.state_dict())
        else:
            with pytest.raises(ValueError, match="another subset"):
                other.load_state_dict(optimizer.state_dict())


def test_what_another_optimizer_saved_is_refused_untouched() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    adamw = torch.optim.AdamW([weight])
    weight.grad = torch.ones(4)
    adamw.step()
    optimizer = SPAM([weight], lr=0.5)
    with pytest.raises(ValueError, match=r"not of SPAM.*density"):
        optimizer.load_state_dict(adamw.state_dict())
    wrong = optimizer.state_dict()
    wrong["param_groups"][0]["eps"] = -1.0
    with pytest.raises(ValueError, match=r"eps=-1\.0"):
        optimizer.load_state_dict(wrong)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.param_groups[0]["eps"] > 0


def test_a_copy_is_refused() -> None:
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(SPAM([torch.nn.Parameter(torch.ones(2))]))


@pytest.mark.parametrize("setting", ["eps=inf", "grace_steps=100000000000000000000000000"])
def test_numbers_no_device_can_hold(setting: str) -> None:
    key, value = setting.split("=")
    assert SpamConfig(**{key: float(value) if key == "eps" else int(value)}).validate()


def test_a_run_says_that_moments_of_other_subsets_are_lost(rung: Callable[..., Any], tiny: list[str]) -> None:
    spam = ["optim=spam", "optim.reset_interval=4", "schedule=constant", "export.huggingface=false", "eval.batches=0"]
    assert rung("train", *tiny, *spam, "optim.density=0.5").status == 0
    refused = rung("train", *tiny, *spam, "optim.density=0.4", "train.steps=4")
    assert refused.status == 2 and "optim.density" in refused.err
    done = rung("train", *tiny, *spam, "optim.density=0.4", "train.steps=4", "run.allow_changes=[optim.*]")
    assert done.status == 0 and "moments of subsets start at zero: optim.density changed" in done.out
