"""Muon against torch's own on whole matrices, who it updates, and what a step may not touch."""

import pytest
import torch

from rung.layout import LogicalTensor
from rung.optim import AdamW, LocalParameter, Muon, MuonConfig, is_hidden_matrix

SHAPES = {
    "embed_tokens.weight": (20, 8),
    "layers.0.self_attn.q_proj.weight": (12, 8),
    "layers.0.self_attn.o_proj.weight": (8, 12),
    "layers.0.mlp.gate_proj.weight": (24, 8),
    "layers.0.mlp.down_proj.weight": (8, 24),
    "layers.1.self_attn.q_proj.weight": (12, 8),
    "norm.weight": (8,),
    "lm_head.weight": (20, 8),
}
HIDDEN = [name for name in SHAPES if "_proj" in name]


def make(dtype: torch.dtype = torch.float64) -> list[LocalParameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, dtype=dtype, generator=generator) for name, shape in SHAPES.items()}
    return [LocalParameter(name, t, LogicalTensor.from_tensor(name, t)) for name, t in tensors.items()]


def give_gradients(parameters: list[LocalParameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.local.grad = torch.randn(p.local.shape, dtype=p.local.dtype, generator=generator) * scale


def bits(parameters: list[LocalParameter], optimizer: Muon) -> list[bytes]:
    tensors = [p.local for p in parameters] + [tensor for tensor, _ in optimizer.named_state().values()]
    return [tensor.contiguous().numpy().tobytes() for tensor in tensors]


def test_hidden_matrices() -> None:
    assert [p.name for p in make() if is_hidden_matrix(p)] == HIDDEN


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch(adjust_lr: str, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch iterates in bfloat16 whatever it is given; in float64 it can tell right from nearly right.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    parameters, twins = make(), make()
    config = MuonConfig(adjust_lr=adjust_lr, nesterov=nesterov, momentum=0.9, weight_decay=0.2, adamw_lr=3e-3)
    optimizer = Muon(parameters, config)
    hidden = [p.local for p in twins if is_hidden_matrix(p)]
    reference = torch.optim.Muon(
        hidden, weight_decay=0.2, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust_lr, ns_steps=5
    )
    others = [p for p in twins if not is_hidden_matrix(p)]
    adamw = AdamW(others, weight_decay=0.2)
    for step in range(1, 5):
        lr = 0.05 / step
        give_gradients(parameters, step)
        give_gradients(twins, step)
        reference.param_groups[0]["lr"] = lr
        reference.step()
        adamw.step(3 * lr)  # adamw_lr is three times lr
        optimizer.step(lr)
    for p, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(p.local, twin.local, rtol=1e-11, atol=1e-11)
    state = optimizer.named_state()
    assert set(state) == {f"{name}/momentum_buffer" for name in HIDDEN} | set(adamw.named_state())
    for name, tensor in zip(HIDDEN, hidden, strict=True):
        momentum, logical = state[f"{name}/momentum_buffer"]
        torch.testing.assert_close(momentum, reference.state[tensor]["momentum_buffer"], rtol=1e-12, atol=1e-12)
        assert tuple(logical.shape) == tuple(momentum.shape) == SHAPES[name]


def test_float32_stays_near_float64() -> None:
    exact, single = make(), make()
    for p in single:
        p.local = p.local.float()
    for parameters in (exact, single):
        optimizer = Muon(parameters, MuonConfig())
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for p in parameters:
                p.local.grad = torch.randn(p.local.shape, generator=generator).to(p.local.dtype)
            optimizer.step(0.01)
    for a, b in zip(exact, single, strict=True):
        torch.testing.assert_close(a.local, b.local.double(), rtol=1e-5, atol=1e-5)


def test_grad_scale_divides_gradients() -> None:
    ours, theirs = make(), make()
    scaled, plain = Muon(ours, MuonConfig()), Muon(theirs, MuonConfig())
    for step in range(1, 4):
        scale = torch.tensor(2.0**step / 3, dtype=torch.float64)
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for p in theirs:
            p.local.grad = p.local.grad / scale
        scaled.step(1e-2, grad_scale=scale)
        plain.step(1e-2)
    assert bits(ours, scaled) == bits(theirs, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_skipped_step_changes_no_bit(dtype: torch.dtype) -> None:
    parameters, twins = make(dtype), make(dtype)
    for p in (*parameters, *twins):
        p.local.view(-1)[:2] = torch.tensor([-0.0, 1e-42])  # a signed zero and a denormal
    optimizer, unasked = Muon(parameters, MuonConfig()), Muon(twins, MuonConfig())
    zero = torch.zeros((), dtype=torch.float64)
    before = bits(parameters, optimizer)
    give_gradients(parameters, 1, scale=float("nan"))
    optimizer.step(1e-2, grad_scale=zero / zero, skip=zero + 1)
    assert bits(parameters, optimizer) == before
    for step in (2, 3):
        give_gradients(parameters, step)
        give_gradients(twins, step)
        optimizer.step(1e-2, skip=zero)
        unasked.step(1e-2)
        give_gradients(parameters, step, scale=float("inf"))
        optimizer.step(1e-2, skip=zero + 1)
    assert bits(parameters, optimizer) == bits(twins, unasked)


def test_missing_gradient_counts_as_zero() -> None:
    ours, theirs = make(), make()
    for p in theirs:
        p.local.grad = torch.zeros_like(p.local)
    for parameters in (ours, theirs):
        Muon(parameters, MuonConfig()).step(1e-2)
    assert all(torch.equal(a.local, b.local) for a, b in zip(ours, theirs, strict=True))


def test_loading_is_copying_into_the_state() -> None:
    first, second = make(), make()
    old, new = Muon(first, MuonConfig()), Muon(second, MuonConfig())
    give_gradients(first, 1)
    old.step(1e-2)
    for a, b in zip(first, second, strict=True):
        b.local.copy_(a.local)
    target = new.named_state()
    for name, (tensor, _) in old.named_state().items():
        target[name].tensor.copy_(tensor)
    for parameters, optimizer in ((first, old), (second, new)):
        give_gradients(parameters, 2)
        optimizer.step(1e-2)
    assert bits(first, old) == bits(second, new)
