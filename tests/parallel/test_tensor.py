"""What tensor parallelism refuses, and what it leaves for others to know. What it computes is the law's to say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from rung.layout import chunk
from rung.models import ModelConfig, build
from rung.parallel.tensor import DECODER_PLAN, Heads, PartialGradient, TensorPlan, tensor_parallel


@pytest.fixture
def mesh() -> Any:
    """Rank 1 of four tensor parallel ranks that talk to nobody."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    return init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))


def split(
    mesh: Any, plan: dict[str, str] = DECODER_PLAN, model: nn.Module | None = None, **settings: Any
) -> TensorPlan:
    config = ModelConfig(
        **{"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "qk_norm": True}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
        | settings
    )
    if model is None:
        with torch.device("meta"):
            model = build(config)
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    return tensor_parallel(model, mesh, mesh.get_group().group_name, plan=plan, heads=heads, sequence_parallel=True)


@pytest.mark.parametrize("forgotten", ["norm", "layers.*.input_layernorm", "layers.*.self_attn.q_norm", "lm_head"])
def test_a_parameter_left_out_of_the_plan_is_an_error(mesh: Any, forgotten: str) -> None:
    plan = {name: role for name, role in DECODER_PLAN.items() if name != forgotten}
    with pytest.raises(ValueError, match="no plan for " + forgotten.replace("*", "0").replace(".", r"\.")):
        split(mesh, plan)


def test_a_bias_after_a_split_sum_is_an_error(mesh: Any) -> None:
    with torch.device("meta"):
        model = build(ModelConfig(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1))
        model.layers["0"].mlp.down_proj = nn.Linear(24, 16, bias=True)
    with pytest.raises(ValueError, match=r"down_proj\.bias: a bias after a split sum"):
        split(mesh, model=model)


def test_what_is_summed_later_is_told(mesh: Any) -> None:
    told = split(mesh, num_key_value_heads=2)
    stream = {"norm.weight", *(f"layers.0.{name}_layernorm.weight" for name in ("input", "post_attention"))}
    inside = {f"layers.0.self_attn.{letter}_norm.weight" for letter in "qk"}
    shared = {PartialGradient(f"layers.0.self_attn.{letter}_proj.weight", 2) for letter in "kv"}
    assert set(told.partial) == {PartialGradient(name, 4) for name in stream | inside} | shared
    fused = split(mesh, num_key_value_heads=2, fused_qkv=True)
    assert PartialGradient("layers.0.self_attn.qkv_proj.weight", 2, 16) in fused.partial


def test_chunks_are_those_of_torch() -> None:
    for size in range(20):
        for parts in range(1, 8):
            pieces = [piece.tolist() for piece in torch.arange(size).chunk(parts)] if size else []
            pieces += [[]] * (parts - len(pieces))
            for index, piece in enumerate(pieces):
                first, length = chunk(size, parts, index)
                assert list(range(first, first + length)) == piece
