import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rung.models import ModelConfig, build, forward_flops, train_flops_per_token

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=10, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_as_torch_counts_them(tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    model, tokens = build(config), torch.zeros(2, 12, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        logits = model(tokens)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert forward.get_total_flops() == forward_flops(config, 2, 12, causal=False)
    per_token = (forward.get_total_flops() + backward.get_total_flops()) / (2 * 12)
    assert per_token == train_flops_per_token(config, 12, causal=False)


@pytest.mark.parametrize("window", [None, 1, 5, 12, 40])
def test_only_pairs_that_see_each_other_count(window):
    config = dataclasses.replace(CONFIG, sliding_window=window)
    visible = sum(1 for q in range(12) for k in range(q + 1) if window is None or q - k < window)
    hidden = 12 * 12 - visible
    per_pair = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    assert forward_flops(config, 2, 12, causal=False) - forward_flops(config, 2, 12) == 2 * hidden * per_pair
