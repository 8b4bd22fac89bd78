"""AdamW against torch's own, and what a step may not touch."""

import pytest
import torch

from rung.layout import LogicalTensor
from rung.optim import AdamW, LocalParameter

SHAPES = {"embed_tokens.weight": (13, 8), "norm.weight": (8,), "empty.weight": (0, 8)}
SETTINGS = {"betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.3}


def make(dtype: torch.dtype) -> list[LocalParameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, dtype=dtype, generator=generator) for name, shape in SHAPES.items()}
    return [LocalParameter(name, t, LogicalTensor.from_tensor(name, t)) for name, t in tensors.items()]


def give_gradients(parameters: list[LocalParameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.local.grad = torch.randn(p.local.shape, dtype=p.local.dtype, generator=generator) * scale


def bits(parameters: list[LocalParameter], optimizer: AdamW) -> list[bytes]:
    tensors = [p.local for p in parameters] + [tensor for tensor, _ in optimizer.named_state().values()]
    return [tensor.numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_equals_torch(dtype: torch.dtype, tolerance: float) -> None:
    parameters, oracle = make(dtype), [p.local for p in make(dtype)]
    optimizer = AdamW(parameters, **SETTINGS)  # type: ignore[arg-type]
    groups = [{"params": oracle[::2]}, {"params": oracle[1:2], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, **SETTINGS, foreach=False, fused=False)  # type: ignore[arg-type]
    for step in range(1, 6):
        give_gradients(parameters, step)
        for p, tensor in zip(parameters, oracle, strict=True):
            assert p.grad is not None
            tensor.grad = p.grad.clone()
        for group in reference.param_groups:
            group["lr"] = 0.1 / step
        reference.step()
        optimizer.step(0.1 / step)
        optimizer.zero_grad()
        assert all(p.grad is None for p in parameters)
    for p, tensor in zip(parameters, oracle, strict=True):
        torch.testing.assert_close(p.local, tensor, rtol=tolerance, atol=tolerance)
    assert optimizer.named_state()["norm.weight/step"].tensor == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_grad_scale_divides_gradients(dtype: torch.dtype) -> None:
    ours, theirs = make(dtype), make(dtype)
    scaled, plain = AdamW(ours), AdamW(theirs)
    for step in range(1, 4):
        scale = torch.tensor(2.0**step / 3, dtype=torch.float64)
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for p in theirs:
            p.local.grad = p.local.grad / scale.to(dtype)
        scaled.step(1e-2, grad_scale=scale)
        plain.step(1e-2)
    assert bits(ours, scaled) == bits(theirs, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_skipped_step_changes_no_bit(dtype: torch.dtype) -> None:
    parameters = make(dtype)
    parameters[0].local[0, :2] = torch.tensor([-0.0, 1e-42])  # a signed zero and a denormal
    optimizer = AdamW(parameters)
    give_gradients(parameters, 1)
    optimizer.step(1e-2, skip=torch.tensor(0.0, dtype=torch.float64))
    before = bits(parameters, optimizer)
    give_gradients(parameters, 2, scale=float("nan"))
    skip = torch.tensor(1.0, dtype=torch.float64)
    optimizer.step(1e-2, grad_scale=torch.tensor(float("inf"), dtype=torch.float64), skip=skip)
    assert bits(parameters, optimizer) == before
    give_gradients(parameters, 3)
    optimizer.step(1e-2, skip=1 - skip)
    assert bits(parameters, optimizer) != before
    assert optimizer.named_state()["norm.weight/step"].tensor == 2


def test_strided_and_missing_gradients() -> None:
    ours, theirs = make(torch.float32), make(torch.float32)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(8, 13, generator=generator)
    ours[0].local.grad, theirs[0].local.grad = gradient.t(), gradient.t().contiguous()
    for p in theirs[1:]:
        p.local.grad = torch.zeros_like(p.local)
    for parameters in (ours, theirs):
        AdamW(parameters).step(1e-2)
    assert all(torch.equal(a.local, b.local) for a, b in zip(ours, theirs, strict=True))


def test_scattered_local_tensors_are_refused() -> None:
    weight = torch.ones(3, 4).t()
    with pytest.raises(RuntimeError, match=r"contiguous.*w\.weight"):
        AdamW([LocalParameter("w.weight", weight, LogicalTensor.from_tensor("w.weight", weight))])


def test_state_is_named_and_logical() -> None:
    parameters = make(torch.float32)
    state = AdamW(parameters).named_state()
    assert set(state) == {f"{name}/{kind}" for name in SHAPES for kind in ("step", "exp_avg", "exp_avg_sq")}
    for name, shape in SHAPES.items():
        tensor, logical = state[f"{name}/exp_avg"]
        assert (logical.name, tuple(logical.shape)) == (f"{name}/exp_avg", shape)
        assert tuple(tensor.shape) == shape
        tensor, logical = state[f"{name}/step"]
        assert tensor.shape == tuple(logical.shape) == ()
    assert state["norm.weight/step"].logical.owned == (True,)
