"""Every way of spreading a model, over groups of one rank: gloo here, NCCL where there is a GPU.

One rank sends nothing worth having, but every path of code runs: DTensors, collectives, rings, schedules.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from rung.data import Batch
from rung.layout import local_view
from rung.models import Decoder, ModelConfig, build
from rung.models.decoder import Attention
from rung.parallel.context import ContextAttention, ContextMask
from rung.parallel.pipeline import Pipeline
from rung.parallel.spread import run_model
from rung.parallel.tensor import DECODER_PLAN, Heads, tensor_parallel

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, qk_norm=True, initializer_range=0.2,
)  # fmt: skip


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def group(request: pytest.FixtureRequest) -> Iterator[dist.ProcessGroup]:
    """The world of this process alone."""
    backend = "nccl" if request.param == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def device_of(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda" if "nccl" in group.name() else "cpu")


def some_batch(device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(0, CONFIG.vocab_size, (2, 4, 16), generator=generator)
    documents = (torch.arange(16) // 5).expand(4, 16)
    return Batch(tokens, labels, torch.arange(4), torch.arange(16).expand(4, 16), documents).to(device)


def loss_of(outputs: Tensor, batch: Batch) -> Tensor:
    return torch.nn.functional.cross_entropy(outputs.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum")


def plain(device: torch.device) -> Decoder:
    torch.manual_seed(0)
    model = build(CONFIG).double()
    return model.to(device)


def gradients(model: Decoder) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = local_view(parameter.grad).cpu()
    return found


def truth(device: torch.device) -> dict[str, Tensor]:
    model, batch = plain(device), some_batch(device)
    loss_of(run_model(model, batch), batch).backward()
    return gradients(model)


def assert_same(model: Decoder, device: torch.device) -> None:
    for name, expected in truth(device).items():
        torch.testing.assert_close(gradients(model)[name], expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tensor_parallel(group: dist.ProcessGroup, sequence_parallel: bool) -> None:
    device = device_of(group)
    values = {name: p.detach() for name, p in plain(device).named_parameters()}
    with torch.device("meta"):
        model = build(CONFIG).double()
    mesh = DeviceMesh.from_group(group, device.type, mesh_dim_names=("tp",))
    heads = Heads(CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim)
    plan, name = DECODER_PLAN, group.group_name
    tensor_parallel(model, mesh, name, plan=plan, heads=heads, sequence_parallel=sequence_parallel)
    model.to_empty(device=device)
    for key, parameter in model.named_parameters():
        local_view(parameter).copy_(values[key])
    batch = some_batch(device)
    loss_of(run_model(model, batch), batch).backward()
    assert_same(model, device)


def test_context_parallel(group: dist.ProcessGroup) -> None:
    device = device_of(group)
    model, batch = plain(device), some_batch(device)
    model.attention_mask = ContextMask(group)
    for module in model.modules():
        if isinstance(module, Attention):
            module.inner = ContextAttention(group)
    loss_of(run_model(model, batch), batch).backward()
    assert_same(model, device)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_zero_bubble"])
def test_pipeline(group: dist.ProcessGroup, schedule: str) -> None:
    device = device_of(group)
    model, batch = plain(device), some_batch(device)
    micro = batch.split(2)
    pipeline = Pipeline(
        [model],
        [0],
        1,
        group,
        schedule,
        len(micro),
        device,
        boundary=lambda one: (torch.empty(*one.tokens_BT.shape, 32, dtype=torch.float64, device="meta"),),
        logits=lambda one: torch.empty(*one.tokens_BT.shape, 64, dtype=torch.float64, device="meta"),
        split_backward=True,
    )
    pipeline.forward_backward(micro, torch.ones((), dtype=torch.int64, device=device), loss_of)
    assert_same(model, device)
